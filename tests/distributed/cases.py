"""Functions that every rank of a pool runs. Each builds its groups anew, so a case depends on its arguments alone."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from nemo_diffgemma.parallel import ParallelLayout, device, initialize, process_groups


def load(path: str, layout: dict[str, int], dtype: torch.dtype = torch.float32) -> Any:
    """The checkpoint at `path` in `layout`."""
    from nemo_diffgemma import DiffusionGemma

    initialize(ParallelLayout(**layout))
    return DiffusionGemma.from_huggingface(path, dtype=dtype)


def logits(path: str, layout: dict[str, int], questions: list[dict[str, Any]], dtype: str = "float32") -> list[Tensor]:
    """Answers to some `tests.parity.questions`, as this rank has them."""
    model = load(path, layout, getattr(torch, dtype))
    return [answer(model, **question) for question in questions]


def answer(
    model: Any,
    input_ids: Tensor,
    canvas: Tensor,
    attention_mask: Tensor | None = None,
    self_conditioning_logits: Tensor | None = None,
    finished: tuple[Tensor, ...] = (),
) -> Tensor:
    """Logits of a canvas after a prompt and finished canvases, each committed in the pass of a denoising step."""
    cache = model.encode(input_ids, attention_mask)
    for tokens in finished:
        cache = committed(model, cache, tokens, canvas)
    return model.denoise(canvas, cache, self_conditioning_logits).cpu()


def committed(model: Any, cache: Any, tokens: Tensor, canvas: Tensor) -> Any:
    """The cache with finished canvases [B, C], which join the pass of the first denoising step of the next ones."""
    from nemo_diffgemma.diffusion.generate import StepInputs

    canvas, context = canvas.to(device()), list(tokens.to(device()))
    inputs = StepInputs(canvas, torch.zeros(canvas.shape, device=device()), canvas, 1.0, 0.1, context=context)
    return model.sampling_step(inputs, cache).cache


def gradients(
    path: str,
    layout: dict[str, int],
    rows: Any,
    objective: dict[str, Any],
    seed: int = 5,
    recompute: str = "none",
    micro_batches: int = 1,
    one_graph: bool = False,
) -> tuple[float, dict[str, Tensor]]:
    """Loss of the objective over some `Rows`, and every whole gradient by its released name (rank 0; empty elsewhere).

    Backward in two passes, Megatron's DDP and sums over replicas are those of training; `one_graph` leaves all of the
    backward to autograd. With replicas, each takes its share of the rows.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from nemo_diffgemma.diffusion import objective as method
    from nemo_diffgemma.training import overlap

    model = load(path, layout).train()
    model.recompute = recompute
    settings = DistributedDataParallelConfig(overlap_grad_reduce=True)
    ddp = DistributedDataParallel(model.config, settings, model)
    ddp.zero_grad_buffer()
    config = method.ObjectiveConfig(**objective)
    data = process_groups().dp
    loss = torch.zeros((), device=device())
    whole, length = rows.to(device()), model.model_config.canvas_length
    wanted = config.canvases_per_example
    totals = method.count(whole, method.choose_canvases(whole, length, wanted, seed), length)
    shares = whole.split(len(whole) // data.size() // micro_batches)
    for part in shares[data.rank() * micro_batches : (data.rank() + 1) * micro_batches]:
        canvases = method.choose_canvases(part, length, wanted, seed)
        noised = method.corrupt(part, canvases, length, model.model_config.vocab_size, seed)
        with ddp.no_sync():
            if one_graph:
                result = method.objective(model, part, canvases, noised, config, seed, totals)
                result.total.backward()
            else:
                scored = method.Scored(model, part, canvases, noised, config, seed, totals)
                result = scored.loss
                scored.backward_canvases()
                scored.backward_context()
        loss += result.total.detach()
    overlap.finalize_gradients(ddp)
    torch.distributed.all_reduce(loss, group=data)
    return float(loss), _whole_gradients(model)


def _whole_gradients(model: Any) -> dict[str, Tensor]:
    """Every reduced gradient by its released name (rank 0; empty elsewhere). The weights are lost."""
    from nemo_diffgemma.checkpoint.huggingface import full_tensors
    from nemo_diffgemma.checkpoint.names import released_name
    from nemo_diffgemma.parallel.sharding import declare, shard_of

    names = [name for name, _ in model.named_parameters()]
    with torch.no_grad():
        for parameter in model.parameters():  # gather gradients with the machinery that gathers weights
            shard = shard_of(parameter)
            parameter.data = parameter.main_grad.clone()
            declare(parameter, shard)
    model.file_dtypes = {}
    return {released_name(name): tensor for name, tensor in full_tensors(model, names)}


def mixed_passes(path: str, layout: dict[str, int], size: str, together: list[list[int]]) -> list[dict[str, Any]]:
    """Of each member of `tests.parity.mixed`, run in one pass with those of its list: logits, states, sampled step."""
    from tests.parity import mixed

    model, members = load(path, layout), mixed.members(size)
    results: dict[int, dict[str, Any]] = {}
    with torch.no_grad():
        for indices in together:
            chosen = [members[index] for index in indices]
            cache = mixed.encoded(model, chosen).trimmed(model.model_config)
            step = model.sampling_step(mixed.step_of(chosen), cache)
            for place, (index, outcome) in enumerate(zip(indices, mixed.pass_of(model, chosen, cache), strict=True)):
                results[index] = dict(
                    logits=mixed.logits_of(model, outcome),
                    context=outcome.context_hidden.cpu(),
                    keys_values=[x.cpu() for pair in outcome.keys_values for x in pair],
                    **{name: getattr(step, name)[place].cpu() for name in ("argmax", "canvas", "entropy", "soft")},
                )
    return [results[index] for index in range(len(members))]


def mixed_gradients(
    path: str, layout: dict[str, int], size: str, together: list[list[int]], recompute: str = "none"
) -> tuple[float, dict[str, Tensor]]:
    """Loss of `tests.parity.mixed` and every whole gradient; members of a list run in one pass behind their caches."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    from tests.parity import mixed

    model, members = load(path, layout).train(), mixed.members(size)
    model.recompute = recompute
    ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    ddp.zero_grad_buffer()
    total = 0.0
    for indices in together:
        chosen = [members[index] for index in indices]
        loss = mixed.loss_of(mixed.pass_of(model, chosen, mixed.encoded(model, chosen)), chosen)
        (loss / process_groups().tp.size()).backward()  # every rank has all states, and their gradients are summed
        total += float(loss.detach())
    finalize_model_grads([ddp])
    return total, _whole_gradients(model)


def generate(path: str, layout: dict[str, int], asked: list[dict[str, Any]]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Sequences, forwards and tokens per forward of some `tests.parity.generations`."""
    model = load(path, layout)
    return [generated(model, **arguments) for arguments in asked]


def generated(model: Any, sampler: dict[str, Any], **arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from nemo_diffgemma import SamplerConfig

    result = model.generate(sampler=SamplerConfig(**sampler), **arguments)
    return result.sequences.cpu(), result.forwards.cpu(), result.tokens_per_forward.cpu()


def influence(
    path: str,
    layout: dict[str, int],
    context: Tensor,
    canvas: Tensor,
    canvases: list[tuple[int, int]],
    joint: bool,
    recompute: str,
) -> list[tuple[Tensor, Tensor]]:
    """For each canvas, how strongly its hidden states depend on each embedding: of context [B, S], of canvases [M, C].

    The largest absolute gradient over the hidden axis, so 0 is exactly no influence.
    """
    from nemo_diffgemma.model.cache import Cache

    model = load(path, layout)
    model.recompute = recompute
    looked_up: list[Tensor] = []
    look_up = model.embed_tokens.look_up

    def keeping(ids: Tensor) -> Tensor:
        looked_up.append(look_up(ids))
        return looked_up[-1]

    model.embed_tokens.look_up = keeping
    rows, columns = context.shape
    if joint:
        stream = model.stream(Cache.empty([0] * rows).sequences, [columns] * rows, canvases)
        hidden = model.run(torch.cat([context.flatten(), canvas.flatten()]).to(device()), stream).canvas_hidden
    else:
        cache = model.encode_clean(context.flatten().to(device()), [columns] * rows).cache
        hidden = model.canvas_hidden(canvas.to(device()), canvases, cache, None)
    found = []
    for states in hidden.view(len(canvases), -1):
        local = torch.autograd.grad(states.square().sum(), looked_up, retain_graph=True)
        every = torch.cat([_all_tokens(gradient.abs().amax(-1)) for gradient in local])
        end = context.numel() + canvas.numel()
        found.append((every[: context.numel()].view_as(context), every[context.numel() : end].view_as(canvas)))
    return found


def _all_tokens(x: Tensor) -> Tensor:
    group = process_groups().tp
    parts = [torch.empty_like(x) for _ in range(group.size())]
    torch.distributed.all_gather(parts, x, group=group)
    return torch.cat(parts).cpu()


def initial_weights(path: str, layout: dict[str, int], seed: int) -> dict[str, Tensor]:
    """Whole initial weights by released name, of the architecture at `path` (rank 0; empty elsewhere)."""
    from nemo_diffgemma import DiffusionGemma, ModelConfig
    from nemo_diffgemma.checkpoint.huggingface import full_tensors
    from nemo_diffgemma.checkpoint.names import released_name, text_tensors

    initialize(ParallelLayout(**layout))
    model = DiffusionGemma(ModelConfig.from_pretrained(path))
    model.init_weights(seed)
    names = [name for name, _ in text_tensors(model)]
    return {released_name(name): tensor for name, tensor in full_tensors(model, names)}


def round_trip(
    path: str, layout: dict[str, int], target: str, dtype: str = "float32", shard_bytes: int | None = None
) -> tuple[int, int]:
    """Load in a layout and write again, in files of up to `shard_bytes`; tensors and bytes written."""
    from nemo_diffgemma.checkpoint import huggingface

    model = load(path, layout, getattr(torch, dtype))
    with mock.patch.object(huggingface, "SHARD_BYTES", shard_bytes or huggingface.SHARD_BYTES):
        written = model.save_huggingface(target)
    return written.tensors, written.bytes


def save_initial(config: Any, layout: dict[str, int], target: str, seed: int) -> None:
    """Write a model from scratch."""
    from nemo_diffgemma import DiffusionGemma

    initialize(ParallelLayout(**layout))
    model = DiffusionGemma(config)
    model.init_weights(seed)
    model.save_huggingface(target)


def load_where_a_rank_fails(path: str, layout: dict[str, int], rank: int, at: str) -> None:
    """Load where one rank cannot read a file that the others can."""
    from nemo_diffgemma import ModelConfig
    from nemo_diffgemma.checkpoint import huggingface

    owner, name = {"config": (ModelConfig, "from_pretrained"), "weights": (huggingface, "_fill")}[at]
    with _failing_on(rank, owner, name, OSError("Stale file handle")):
        load(path, layout)


def generate_with_nan_on_the_last_rank(path: str, layout: dict[str, int]) -> None:
    """One entry of a matrix that only the last rank holds."""
    model = load(path, layout)
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    model.generate(torch.arange(12).view(2, 6), max_new_tokens=4)


def save_where_the_disk_is_full(path: str, layout: dict[str, int], target: str, after: int) -> None:
    """Write several files, of which the one after `after` fails on the rank that writes."""
    from nemo_diffgemma.checkpoint import huggingface

    model = load(path, layout)
    written = []
    save_file = huggingface.save_file

    def full(tensors: Any, file: Any, **arguments: Any) -> None:
        if len(written) == after:
            raise OSError("No space left on device")
        written.append(file)
        save_file(tensors, file, **arguments)

    with mock.patch.object(huggingface, "save_file", full), mock.patch.object(huggingface, "SHARD_BYTES", 20_000):
        model.save_huggingface(target)


def save_where_the_source_is_gone(path: str, layout: dict[str, int], target: str) -> None:
    """The vision tensors are copied from the directory that was loaded, one file of which has disappeared since."""
    model = load(path, layout)
    if torch.distributed.get_rank() == 0:
        for file in Path(path).glob("*.safetensors"):
            file.unlink()
    torch.distributed.barrier()
    model.save_huggingface(target)


def _failing_on(rank: int, owner: Any, name: str, error: Exception) -> Any:
    if torch.distributed.get_rank() != rank:
        return contextlib.nullcontext()
    return mock.patch.object(owner, name, side_effect=error)


def error_of(case: str, **arguments: Any) -> str:
    """Type and message of the exception that a case raises on this rank."""
    try:
        globals()[case](**arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def threads(layout: dict[str, int]) -> int:
    """Threads of this process once its groups are those of `layout`."""
    initialize(ParallelLayout(**layout))
    return len(os.listdir("/proc/self/task"))
