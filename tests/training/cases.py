"""Jobs for the pool of ranks: small training runs and what is asked of them."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

ARCHITECTURE: dict[str, Any] = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_global_key_value_heads=2,
    global_head_dim=16,
    num_experts=8,
    top_k_experts=2,
    moe_intermediate_size=16,
    sliding_window=16,
    canvas_length=16,
    layer_types=["sliding_attention", "full_attention"],
)


def config(steps: int = 4, every: int = 0, layout: dict | None = None, **keys: Any) -> Any:
    """A tiny Sudoku run; `keys` are dotted, as `optim.lr` with `__` for the dot."""
    from nemo_diffgemma.schema import TrainConfig

    made = TrainConfig()
    made.model.architecture = dict(ARCHITECTURE)
    made.data.global_batch_size = 8
    made.data.test_puzzles = 8
    made.optim.lr = 1e-2
    made.optim.weight_decay = 0.01
    made.optim.warmup_steps = min(2, steps)
    made.trainer.max_steps = steps
    made.trainer.checkpoint_every = every
    made.trainer.threads = 1
    made.trainer.progress = False
    made.exp_manager.tensorboard = False
    for axis, size in (layout or {}).items():
        setattr(made.parallel, axis, size)
    for name, value in keys.items():
        *groups, key = name.split("__")
        setattr(functools.reduce(getattr, groups, made), key, value)
    return made


def run(directory: str, **settings: Any) -> list[dict[str, Any]]:
    """Train and return the lines of the metrics file."""
    from nemo_diffgemma.training.run import train

    result = train(config(**settings), directory)
    lines = [json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text().splitlines()]
    assert result.step == settings.get("steps", 4) and result.loss == lines[-1]["loss"]
    return lines


def interrupted(directory: str, stop_after: int, **settings: Any) -> None:
    """Train, and leave what a kill after `stop_after` steps leaves: metrics up to it, checkpoints from before it."""
    import shutil

    import torch.distributed as dist

    from nemo_diffgemma.training import callbacks
    from nemo_diffgemma.training.run import train

    before = callbacks.MetricsFile.on_train_batch_end

    def stop(self: Any, trainer: Any, *rest: Any) -> None:
        before(self, trainer, *rest)
        trainer.should_stop = trainer.global_step == stop_after

    callbacks.MetricsFile.on_train_batch_end = stop  # type: ignore[method-assign]
    try:
        result = train(config(**settings), directory)
    finally:
        callbacks.MetricsFile.on_train_batch_end = before  # type: ignore[method-assign]
    assert result.step == stop_after
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(result.checkpoint)
    dist.barrier()


def losses(directory: str, **settings: Any) -> list[tuple[float, float]]:
    """Loss and gradient norm of every step of a run."""
    return [(line["loss"], line["grad_norm"]) for line in run(directory, **settings)]


def interrupted_and_resumed(directory: str, **settings: Any) -> list[dict[str, Any]]:
    """Metrics of a run of 6 steps that stopped after 5 and went on from the checkpoint of step 3."""
    return resumed_elsewhere(directory, settings, settings)


def resumed_elsewhere(directory: str, before: dict[str, Any], after: dict[str, Any]) -> list[dict[str, Any]]:
    """Metrics of a run that stopped with the settings `before` and went on with those of `after`."""
    interrupted(directory, stop_after=5, steps=6, every=3, **before)
    written = (Path(directory) / "checkpoints" / "step-3" / "manifest.json").stat().st_ino
    lines = run(directory, steps=6, every=3, **after)
    assert (Path(directory) / "checkpoints" / "step-3" / "manifest.json").stat().st_ino == written, "it began anew"
    return lines


def _restored(path: str) -> Any:
    from nemo_diffgemma.training.nemo_model import DiffusionGemmaModel

    return DiffusionGemmaModel.restore_from(path)


def save_archive(directory: str, path: str, layout: dict[str, int]) -> None:
    """Train a little and write the last checkpoint as a `.nemo`."""
    from nemo_diffgemma.training.nemo_model import DiffusionGemmaModel, ModelSettings

    run(directory, steps=2, layout=layout)
    settings = config(layout=layout, model__checkpoint=f"{directory}/checkpoints/step-2")
    model = DiffusionGemmaModel(ModelSettings.of(settings))
    model.configure_model()
    model.save_to(path)


def weights_of_archive(path: str, layout: dict[str, int]) -> dict[str, Any]:
    """Whole tensors of a restored archive, on rank 0."""
    from nemo_diffgemma.parallel import ParallelLayout, initialize

    initialize(ParallelLayout(**layout))
    return _whole(_restored(path).network)


def weights_of(path: str, layout: dict[str, int]) -> dict[str, Any]:
    """Whole tensors of any checkpoint, on rank 0."""
    from nemo_diffgemma import DiffusionGemma
    from nemo_diffgemma.parallel import ParallelLayout, initialize

    initialize(ParallelLayout(**layout))
    return _whole(DiffusionGemma.from_checkpoint(path))


def _whole(network: Any) -> dict[str, Any]:
    from nemo_diffgemma.checkpoint.huggingface import full_tensors
    from nemo_diffgemma.checkpoint.names import text_tensors

    names = [name for name, _ in text_tensors(network)]
    return {name: tensor.numpy() for name, tensor in full_tensors(network, names)}


def message(directory: str, **settings: Any) -> str:
    """What a run that cannot start says on this rank."""
    try:
        run(directory, **settings)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def validation_losses(micro_batch_size: int) -> list[float]:
    """Of each batch of six held-out examples, with weights of a seed."""
    from nemo_diffgemma.parallel import ParallelLayout, initialize
    from nemo_diffgemma.training.nemo_model import DiffusionGemmaModel, ModelSettings

    initialize(ParallelLayout())
    settings = config(data__micro_batch_size=micro_batch_size, trainer__validation_examples=6)
    model = DiffusionGemmaModel(ModelSettings.of(settings))
    model.configure_model()
    model.log = lambda *_, **__: None  # there is no trainer
    return [float(model.validation_step(batch, i)["val_loss"]) for i, batch in enumerate(model.val_dataloader())]


def message_while_another_works(directory: str) -> str:
    """What a run says on this rank while somebody else holds the lock of its directory."""
    import contextlib

    from nemo_diffgemma.parallel.agreement import is_rank_zero
    from nemo_diffgemma.training.run_directory import lock_of

    with contextlib.ExitStack() as stack:
        if is_rank_zero():
            other = lock_of(Path(directory))
            other.acquire()
            stack.callback(other.release)
        return message(directory, steps=1)


def message_when_rank_0_cannot_write(directory: str, error: Exception) -> str:
    """What a run says on this rank when writing its assets fails on rank 0 with `error`."""
    from unittest import mock

    from nemo_diffgemma.checkpoint import sharded

    with mock.patch.object(sharded, "write_assets", side_effect=error):
        return message(directory, steps=1)


def messages_of_what_is_not_finite(directory: str, layout: dict[str, int]) -> list[str]:
    """What runs say on this rank when on rank 1 a weight, an output, a gradient is not finite."""
    from unittest import mock

    import torch
    import torch.distributed as dist

    from nemo_diffgemma.training.nemo_model import DiffusionGemmaModel

    configure = DiffusionGemmaModel.configure_model

    def weight(network: Any) -> None:
        network.layers[1].mlp.down_proj.weight.data.view(-1)[3] = torch.nan

    def output(network: Any) -> None:
        network.layers[0].mlp.register_forward_hook(lambda module, inputs, result: result * torch.inf)

    def gradient(network: Any) -> None:
        network.layers[0].mlp.down_proj.weight.register_hook(lambda values: values * torch.inf)

    told = []
    for number, poison in enumerate((weight, output, gradient)):

        def poisoned(self: Any, poison: Any = poison) -> None:
            configure(self)
            if dist.get_rank() == 1:
                poison(self.network)

        with mock.patch.object(DiffusionGemmaModel, "configure_model", poisoned):
            told.append(message(f"{directory}/{number}", steps=1, layout=layout))
    return told


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


def messages_of_a_writer_that_fails(directory: str, rank: int, step: int) -> str:
    """What a run says on this rank whose disk is full on one rank when the files of `step` are written.

    The step after the next one begins when that has happened.
    """
    import errno
    from unittest import mock

    import torch.distributed as dist

    from nemo_diffgemma.checkpoint import sharded_writer
    from nemo_diffgemma.training import callbacks

    write, written = sharded_writer._Plan.write, callbacks.MetricsFile.on_train_batch_end

    def late(self: Any, trainer: Any, *rest: Any) -> None:
        if trainer.global_step == step + 1:
            trainer.strategy.saver._thread.join()
        written(self, trainer, *rest)

    def full(self: Any) -> Any:
        if dist.get_rank() == rank and f"step-{step}." in str(self.writer.path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self)

    with (
        mock.patch.object(sharded_writer._Plan, "write", full),
        mock.patch.object(callbacks.MetricsFile, "on_train_batch_end", late),
    ):
        return message(directory, steps=10, every=3)


def kept_beside(directory: str, frozen: str, **settings: Any) -> dict[str, Any]:
    """Train while sums of weights are kept beside them and parameters with `frozen` in their name stay as they are.

    Whole sums at the end, on rank 0, losses, and the names of the tensors of the last checkpoint.
    """
    from unittest import mock

    from nemo_diffgemma.checkpoint import sharded
    from nemo_diffgemma.training.nemo_model import DiffusionGemmaModel

    tensors, step = DiffusionGemmaModel.saved_tensors, DiffusionGemmaModel.training_step
    optimizers, seen = DiffusionGemmaModel.configure_optimizers, []

    def configure_optimizers(self: Any) -> Any:
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(frozen not in name)
        self.__dict__["sums"] = {n: p.detach() * 0 for n, p in self.network.named_parameters()}
        return optimizers(self)

    def saved_tensors(self: Any) -> dict[str, Any]:
        like, sums = dict(self.network.named_parameters()), self.__dict__["sums"]
        return tensors(self) | {
            f"sum.{name}": sharded.sharded_tensor(f"sum.{name}", sums[name], like[name]) for name in sums
        }

    def training_step(self: Any, *arguments: Any) -> None:
        step(self, *arguments)
        self.finish_gather()
        for name, parameter in self.network.named_parameters():
            self.__dict__["sums"][name].add_(parameter.detach())
        seen[:] = [self]

    with (
        mock.patch.object(DiffusionGemmaModel, "configure_optimizers", configure_optimizers),
        mock.patch.object(DiffusionGemmaModel, "saved_tensors", saved_tensors),
        mock.patch.object(DiffusionGemmaModel, "training_step", training_step),
    ):
        lines = run(directory, **settings)
    last = Path(directory) / "checkpoints" / f"step-{len(lines)}"
    (model,) = seen
    for name, parameter in model.network.named_parameters():
        parameter.data.copy_(model.__dict__["sums"][name])
    return {"sums": _whole(model.network), "keys": sorted(sharded.keys(last)), "losses": [one["loss"] for one in lines]}


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
    return _whole(build_network(config().model, seed=0))


def average_of(checkpoint: str, layout: dict[str, int]) -> dict[str, Any]:
    """Whole tensors of the average that a checkpoint has."""
    from nemo_diffgemma import DiffusionGemma
    from nemo_diffgemma.checkpoint import average
    from nemo_diffgemma.parallel import ParallelLayout, initialize

    initialize(ParallelLayout(**layout))
    network = DiffusionGemma.from_checkpoint(checkpoint)
    average.fill(network, Path(checkpoint))
    return _whole(network)


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
