"""Jobs for the pool of ranks: gradients, updates and averages of weights, and a step worked out plainly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.training.cases import config, interrupted, losses, run, weights_of, whole


def losses_in_small_buckets(directory: str, **settings: Any) -> tuple[list[tuple[float, float]], dict[str, int]]:
    """`losses` of a run whose gradients are summed, and whose weights gathered, in many buckets; how many, and when.

    `early`: sums under way before the backward pass was over, all but `last`, those of weights that have no gradient by
    the context's pass through autograd; `late`: gathers that were not yet waited for when an update returned.
    """
    import functools
    from unittest import mock

    from megatron.core.distributed import DistributedDataParallelConfig

    from nemo_diffgemma.training import optimizer, overlap

    counts = dict(buckets=0, early=0, last=0, late=0)
    finalize, start = overlap.finalize_gradients, overlap.start_gather

    def groups(wrapped: Any) -> list[Any]:
        return [*wrapped.bucket_groups, *wrapped.expert_parallel_bucket_groups]

    def finalized(wrapped: Any) -> None:
        counts["buckets"] = len(groups(wrapped))
        counts["early"] = sum(group.grad_reduce_handle is not None for group in groups(wrapped))
        network = wrapped.module
        last = {*network.embed_tokens.parameters(), *network.self_conditioning.parameters()}
        counts["last"] = sum(not last.isdisjoint(group.params) for group in groups(wrapped))
        finalize(wrapped)

    def started(wrapped: Any) -> None:
        start(wrapped)
        counts["late"] = sum(group.param_gather_handle is not None for group in groups(wrapped))

    small = functools.partial(DistributedDataParallelConfig, bucket_size=1000)
    with (
        mock.patch.object(optimizer, "DistributedDataParallelConfig", small),
        mock.patch.object(overlap, "finalize_gradients", finalized),
        mock.patch.object(overlap, "start_gather", started),
    ):
        return losses(directory, **settings), counts


def adamw(distributed: bool) -> list[dict[str, Any]]:
    """Three updates of a tiny network and of torch's own AdamW, with gradients that are sums over replicas.

    Of each: the norms, by how much the farthest weights are apart, and gathers under way when weights were read, as a
    state dict or as checkpoints are.
    """
    import torch
    import torch.distributed as dist

    from nemo_diffgemma.checkpoint.names import text_tensors
    from nemo_diffgemma.parallel import ParallelLayout, initialize
    from nemo_diffgemma.schema import OptimGroup
    from nemo_diffgemma.training import optimizer, overlap
    from nemo_diffgemma.training.nemo_model import build_network

    initialize(ParallelLayout())
    network = build_network(config().model, seed=0)
    optim = OptimGroup(lr=0.01, weight_decay=0.1, clip_grad=1.0, distributed=distributed)
    wrapped = optimizer.data_parallel(network, optim)
    adapter = optimizer.MegatronAdapter(optimizer.build(wrapped, optim, torch.float32))
    adapter.lr = optim.lr
    copies = [parameter.detach().clone().requires_grad_() for parameter in network.parameters()]
    groups = [{"params": [copy for copy in copies if (copy.ndim > 1) == matrix], "weight_decay": 0.1 * matrix}
              for matrix in (True, False)]  # fmt: skip
    plain = torch.optim.AdamW(groups, lr=optim.lr, betas=tuple(optim.betas), eps=optim.eps, foreach=False)
    steps = []
    for step in range(3):
        wrapped.zero_grad_buffer()
        for index, (parameter, copy) in enumerate(zip(network.parameters(), copies, strict=True)):
            shares = [_share(copy, seed=1000 * step + 10 * index + rank) for rank in range(dist.get_world_size())]
            parameter.main_grad.copy_(shares[dist.get_rank()])  # type: ignore[attr-defined]
            copy.grad = sum(shares)  # type: ignore[assignment]
        overlap.finalize_gradients(wrapped)
        adapter.step()
        overlap.start_gather(wrapped)
        list(text_tensors(network)) if step else network.state_dict()
        late = sum(group.param_gather_handle is not None for group in wrapped.bucket_groups)
        norm = torch.nn.utils.clip_grad_norm_(copies, optim.clip_grad)
        plain.step()
        apart = [(a - b).detach().abs().max() for a, b in zip(network.parameters(), copies, strict=True)]
        steps.append(
            dict(ours=adapter.grad_norm, plain=float(norm.detach()), apart=float(torch.stack(apart).max()), late=late)
        )
    return steps


def _share(like: Any, seed: int) -> Any:
    import torch

    return 0.01 * torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))


def averages(directory: str, **settings: Any) -> dict[str, Any]:
    """Of a run of 4 steps on rank 0: its average of weights, the same from all of its checkpoints, the last weights."""
    import numpy as np

    from nemo_diffgemma.training.average import decay_at

    decay = settings["optim__ema"]
    first = initial_weights(settings["layout"])
    run(directory, steps=4, every=1, **settings)
    weights = [weights_of(f"{directory}/checkpoints/step-{step}", settings["layout"]) for step in range(1, 5)]
    expected = {name: value.astype(np.float64) for name, value in first.items()}
    for step, values in enumerate(weights, start=1):
        part = decay_at(decay, step)
        expected = {name: part * value + (1 - part) * values[name] for name, value in expected.items()}
    return dict(
        average=average_of(f"{directory}/checkpoints/step-4", settings["layout"]),
        expected={name: value.astype(np.float32) for name, value in expected.items()},
        weights=weights[-1],
    )


def resumed_average(directory: str, **settings: Any) -> dict[str, Any]:
    """The average of a run of 4 steps that stopped after 3 and went on from the checkpoint of step 2."""
    interrupted(directory, stop_after=3, steps=4, every=2, **settings)
    run(directory, steps=4, every=2, **settings)
    return average_of(f"{directory}/checkpoints/step-4", settings["layout"])


def initial_weights(layout: dict[str, int]) -> dict[str, Any]:
    """Whole tensors of a network that no step has changed."""
    from nemo_diffgemma.parallel import ParallelLayout, initialize
    from nemo_diffgemma.training.nemo_model import build_network

    initialize(ParallelLayout(**layout))
    return whole(build_network(config().model, seed=0))


def average_of(checkpoint: str, layout: dict[str, int]) -> dict[str, Any]:
    """Whole tensors of the average that a checkpoint has."""
    from nemo_diffgemma import DiffusionGemma
    from nemo_diffgemma.checkpoint import average
    from nemo_diffgemma.parallel import ParallelLayout, initialize

    initialize(ParallelLayout(**layout))
    network = DiffusionGemma.from_checkpoint(checkpoint)
    average.fill(network, Path(checkpoint))
    return whole(network)


def first_step() -> dict[str, Any]:
    """Of the first step of `config()`, without `Scored`: losses and accuracy by level, and what the routers chose."""
    import torch
    from torch.nn.functional import cross_entropy

    from nemo_diffgemma.diffusion.levels import BINS
    from nemo_diffgemma.diffusion.objective import choose_canvases, corrupt, self_conditioned
    from nemo_diffgemma.evaluation.comparison import chosen_experts
    from nemo_diffgemma.parallel import ParallelLayout, initialize
    from nemo_diffgemma.training.nemo_model import DiffusionGemmaModel, ModelSettings

    initialize(ParallelLayout())
    model = DiffusionGemmaModel(ModelSettings.of(config()))
    model.configure_model()
    network = model.network
    assert network is not None
    model.setup_training_data()
    rows = next(iter(model._train_dl))
    canvases = choose_canvases(rows, 16, 1, 0)
    corrupted = corrupt(rows, canvases, 16, 64, 0)
    places = [(canvas.row, canvas.start) for canvas in canvases]
    with torch.no_grad():
        with chosen_experts(network) as of_context:
            cache = network.encode_clean(rows.tokens_T, rows.lengths).cache
        first = network.canvas_hidden(corrupted.noised_MC, places, cache, None)
        shown = self_conditioned(rows, canvases, 0.5, 0)[:, None, None]
        soft = network.soft_embedding(first).view(len(canvases), 16, -1) * shown
        with chosen_experts(network) as of_canvases:
            hidden = network.canvas_hidden(corrupted.noised_MC, places, cache, soft)
    z = 30 * torch.tanh(hidden @ network.embed_tokens.weight.detach()[:64].T / 30)
    labels = corrupted.clean_MC.flatten()
    losses, right = cross_entropy(z, labels, reduction="none").view(-1, 16), (z.argmax(1) == labels).view(-1, 16)
    by_level: dict[str, list[int]] = {}
    for canvas, level in enumerate(corrupted.levels_M.tolist()):
        by_level.setdefault(str(min(BINS, key=lambda middle: abs(middle - level))), []).append(canvas)
    by_level = {level: by_level[level] for level in sorted(by_level)}
    chosen = [torch.cat(pair).flatten() for pair in zip(of_context, of_canvases, strict=True)]
    return dict(
        loss_by_level={level: float(losses[which].mean()) for level, which in by_level.items()},
        accuracy_by_level={level: float(right[which].double().mean()) for level, which in by_level.items()},
        canvas_accuracy=float(right.double().mean()),
        loads=[torch.bincount(ids, minlength=8).tolist() for ids in chosen],
    )
