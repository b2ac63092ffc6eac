"""Jobs for the pool of ranks: losses and gradients of adapters, and what is read and written in a layout."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from nemo_diffgemma.parallel import ParallelLayout, initialize, process_groups
from tests.lora import kit


def gradients(
    path: str,
    layout: dict[str, int],
    lora: dict[str, Any],
    recompute: str,
    rows: Any,
    objective: dict[str, Any],
    seed: int,
) -> dict[str, Any]:
    """Loss, global norm and every whole gradient (rank 0; empty elsewhere) of adapters that are random.

    Gradients are found, summed and measured as in training; with replicas, each has its share of the packed rows.
    """
    from nemo_diffgemma.diffusion import objective as method
    from nemo_diffgemma.model.adapters import DropoutNoise
    from nemo_diffgemma.schema import OptimGroup
    from nemo_diffgemma.training import optimizer, overlap
    from nemo_diffgemma.training.update import gradient_norm
    from tests.model.test_experts import leaving_rows_undefined

    initialize(ParallelLayout(**layout))
    model = kit.adapted(path, kit.group(**lora)).train()
    model.recompute = recompute
    optim = OptimGroup(distributed=False)
    ddp = optimizer.data_parallel(model, optim)
    built = optimizer.build(ddp, optim, torch.float32)
    ddp.zero_grad_buffer()
    config = method.ObjectiveConfig(**objective)
    data, length, wanted = process_groups().dp, model.model_config.canvas_length, config.canvases_per_example
    totals = method.count(rows, method.choose_canvases(rows, length, wanted, seed), length)
    part = rows.split(len(rows) // data.size())[data.rank()]
    canvases = method.choose_canvases(part, length, wanted, seed)
    noised = method.corrupt(part, canvases, length, model.model_config.vocab_size, seed)
    model.dropout_of = DropoutNoise(seed, tuple(part.samples))
    # as on a GPU: rows that are no expert's here stay undefined, and nothing may read them
    undefined = mock.patch.object(torch.nn.functional, "grouped_mm", leaving_rows_undefined)
    with undefined if recompute == "full" else contextlib.nullcontext():
        scored = method.Scored(model, part, canvases, noised, config, seed, totals)
        with ddp.no_sync():
            scored.backward_canvases()
        scored.backward_context()
    overlap.finalize_gradients(ddp)
    loss = scored.loss.total.detach().clone()
    torch.distributed.all_reduce(loss, group=data)
    built.prepare_grads()
    norm = float(gradient_norm(built))
    return dict(loss=float(loss), norm=norm, gradients=_whole(model, ddp, optim))


def _whole(model: Any, ddp: Any, optim: Any) -> dict[str, Tensor]:
    """Every gradient by its name in PEFT's file. The adapters are lost."""
    from nemo_diffgemma.lora import attach
    from nemo_diffgemma.lora.peft_files import collected
    from nemo_diffgemma.parallel.sharding import declare, shard_of

    groups = process_groups()
    for _, adapter, _ in attach.adapters(model):
        for parameter in (adapter.A, adapter.B):
            shard, gradient = shard_of(parameter), parameter.main_grad.clone()
            # the distributed optimizer's sum leaves each replica its range of the buffer
            parameter.data = gradient
            declare(parameter, shard)
    assert groups is not None and ddp is not None and not optim.distributed
    files = collected(model)
    return {} if files is None else files.tensors


def logits(path: str, layout: dict[str, int], questions: list[dict[str, Any]]) -> list[Tensor]:
    """Answers of any checkpoint, as this rank has them."""
    from nemo_diffgemma import DiffusionGemma
    from tests.distributed.cases import answer

    initialize(ParallelLayout(**layout))
    model = DiffusionGemma.from_checkpoint(path)
    return [answer(model, **question) for question in questions]


def written(path: str, layout: dict[str, int], lora: dict[str, Any], target: str) -> None:
    """The random adapters of a network, saved from a layout."""
    initialize(ParallelLayout(**layout))
    kit.save(kit.adapted(path, kit.group(**lora)), Path(target))


def merged(path: str, layout: dict[str, int], target: str) -> None:
    """An adapter and its base, merged in memory and written as a Hugging Face directory."""
    from nemo_diffgemma import DiffusionGemma

    initialize(ParallelLayout(**layout))
    model = DiffusionGemma.from_checkpoint(path)
    model.merge_adapters()
    model.save_huggingface(target)
