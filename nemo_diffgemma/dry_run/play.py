"""Play a rank: the project's own network, objective, optimizer and generation on GPU tensors that are not there.

Runs in a process that has the driver preloaded (driver.py). A process may play any number of cases, one after another.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import sys
import types
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from nemo_diffgemma.dry_run.case import Case, Measured
from nemo_diffgemma.dry_run.ledger import Numbers
from nemo_diffgemma.dry_run.mode import DryRun, MixedDevicesError
from nemo_diffgemma.dry_run.world import one_rank

STEADY = 5  # denoising steps that are played: two computed, one recorded, two replayed
# methods of the network -> phase; memory that they take is activations but for the loss
FORWARD_PHASES = {
    "encode_clean": ("encode", "activations"),
    "canvas_hidden": ("canvas", "activations"),
    "soft_embedding": ("self_conditioning", "activations"),
    "cross_entropy_gradient": ("loss", "loss"),
}


def play(case: Case, progress: Callable[[str], None] = lambda what: None) -> Measured:
    """One training step, or an encoding and a generation; each is measured after a first one that fills caches."""
    from nemo_diffgemma.checkpoint.open import DTYPES
    from nemo_diffgemma.diffusion_gemma import DiffusionGemma

    _clear_caches()
    dry = DryRun(DTYPES[case.model.dtype])
    with one_rank(dry, case.layout, case.world, case.rank):
        progress("building the network")
        with dry.ledger.doing("build", "weights"):
            network = DiffusionGemma(case.config, DTYPES[case.model.dtype]).eval()
            network.recompute = case.model.recompute
            _onto_gpu(network)
        try:
            if case.verb == "train":
                numbers = _train(dry, network, case, progress)
            else:
                numbers = _generate(dry, network, case, progress)
        except MixedDevicesError:  # a violation; what there is until then
            numbers = _numbers(dry)
        measured = Measured(numbers, dict(dry.ledger.violations), dict(dry.memory.largest))
    del network
    gc.collect()
    return measured


def _clear_caches() -> None:
    """Forget what functions of the project keep: GPU tensors of another case, or streams of the last generation."""
    for name, module in list(sys.modules.items()):
        if name.startswith("nemo_diffgemma."):
            for kept in vars(module).values():
                if isinstance(kept, functools._lru_cache_wrapper):
                    kept.cache_clear()
    gc.collect()


def _onto_gpu(network: nn.Module) -> None:
    """Parameters that Megatron makes on the CPU and the project moves by assigning `weight.data`.

    A fake tensor cannot follow such an assignment, so they are made anew where they belong.
    """
    for module in network.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and not isinstance(parameter, FakeTensor):
                made = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device="cuda"))
                made.__dict__.update(parameter.__dict__)
                module._parameters[name] = made


def _numbers(dry: DryRun) -> Numbers:
    return {**dry.ledger.numbers, **dry.memory.numbers()}


def _start_measuring(dry: DryRun) -> None:
    dry.ledger.numbers.clear()
    dry.ledger.violations.clear()
    dry.memory.forget_peaks()


# -- training ----------------------------------------------------------------------------------------------------------


def _train(dry: DryRun, network: Any, case: Case, progress: Callable[[str], None]) -> Numbers:
    from nemo_diffgemma.data.tasks import default_data
    from nemo_diffgemma.training import optimizer_state, overlap
    from nemo_diffgemma.training.nemo_model import DiffusionGemmaModel, ModelSettings

    class Model(DiffusionGemmaModel):
        trainer = log_dict = optimizers = None  # Lightning's are properties

    rows = len(case.prompts)
    settings = ModelSettings(network=case.model, data=default_data(), optim=case.optim)
    settings.data.micro_batch_size = rows
    settings.data.global_batch_size = rows * case.micro_batches * case.layout.replicas(case.world)
    model: Any = Model(settings)
    model.network, model.trainer = network.train(), types.SimpleNamespace(global_step=0)
    progress("building the optimizer")
    with dry.ledger.doing("build", "gradients and optimizer"):
        adapter = model.configure_optimizers()
        optimizer_state._prime(adapter.megatron)  # the first step is then like any other
    _split_static(dry, model)
    model.optimizers, model.log_dict = (lambda: adapter), (lambda *_, **__: None)
    for name, (phase, part) in FORWARD_PHASES.items():
        _label(dry, network, name, phase, part)
    _label(dry, adapter, "step", "optimizer", "update")
    batch = _batch(case)
    progress("training step")
    with ExitStack() as stack:
        for owner, name, phase in (
            (torch.autograd, "backward", "backward"),
            (overlap, "finalize_gradients", "reduction"),
            (overlap, "start_gather", "optimizer"),
        ):
            stack.enter_context(mock.patch.object(owner, name, getattr(owner, name)))  # puts it back
            _label(dry, owner, name, phase, "update" if phase == "optimizer" else phase)
        _start_measuring(dry)
        with dry.ledger.doing("other", "other"):
            dry.memory.look()
            model.training_step(batch.to(torch.device("cuda", 0)), 0)
    return _numbers(dry)


def _batch(case: Case) -> Any:
    """The rows of all micro-batches, filled up to whole canvases as the data's are."""
    from nemo_diffgemma.data import Example, collate

    rows = list(zip(case.prompts, case.responses, strict=True)) * case.micro_batches
    examples = [
        Example((2,) * (prompt + response), ((prompt, prompt + response),), index)
        for index, (prompt, response) in enumerate(rows)
    ]
    return collate(examples, case.config.canvas_length, 1, fills_rows=True)


def _split_static(dry: DryRun, model: Any) -> None:
    """Tell what Megatron's DDP holds (gradients, and where it has moved them the weights) from the optimizer's."""
    wrapped = model.__dict__["_wrapped"]
    buffers = [*wrapped.buffers, *wrapped.expert_parallel_buffers]
    dry.memory.rename([buffer.grad_data for buffer in buffers], "gradients")
    dry.memory.rename([parameter.data for parameter in model.network.parameters()], "weights")
    dry.memory.rename_part("gradients and optimizer", "optimizer")


def _label(dry: DryRun, owner: Any, name: str, phase: str, part: str) -> None:
    """Calls of `owner.name` are this phase."""
    inner = getattr(owner, name)

    @functools.wraps(inner)
    def call(*args: Any, **kwargs: Any) -> Any:
        with dry.ledger.doing(phase, part):
            dry.memory.look()
            return inner(*args, **kwargs)

    object.__setattr__(owner, name, call) if isinstance(owner, nn.Module) else setattr(owner, name, call)


# -- generation --------------------------------------------------------------------------------------------------------


def _generate(dry: DryRun, network: Any, case: Case, progress: Callable[[str], None]) -> Numbers:
    """Phases `encode`, `denoise` (one step in the steady state) and `generate` (all steps of all canvases).

    A step is what is counted from one call of `canvas_step` to the next, so whatever stands around it is in it; those
    that are not played are like the last one that is.
    """
    config, length = network.model_config, max(case.prompts)
    ids = torch.randint(0, config.vocab_size, (len(case.prompts), length))
    mask = torch.arange(length) >= length - torch.tensor(case.prompts)[:, None]
    left_padded = None if bool(mask.all()) else mask.long()
    progress("encode")
    _start_measuring(dry)
    with dry.ledger.doing("encode", "activations"):
        dry.memory.look()
        cache = network.encode(ids, left_padded)
    encode = _numbers(dry)
    del cache
    progress("generate")
    _clear_caches()
    dry.ledger.numbers.clear()
    dry.memory.forget_peaks()
    steps = min(case.steps, STEADY)
    starts = _count_steps(dry, network)
    sampler = dataclasses.replace(network.sampler_defaults, max_denoising_steps=steps)
    with dry.ledger.doing("generate", "activations"):
        dry.memory.look()
        network.generate(ids, left_padded, max_new_tokens=case.canvases * config.canvas_length, sampler=sampler)
    return encode | _of_steps(starts, dry.ledger.numbers, case.canvases, case.steps - steps) | _peaks(dry)


def _count_steps(dry: DryRun, network: Any) -> list[Numbers]:
    """What was counted before each step of a canvas but the first, as they come."""
    starts: list[Numbers] = []
    step = network.canvas_step

    @functools.wraps(step)
    def counted(*args: Any, **kwargs: Any) -> Any:
        starts.append(dict(dry.ledger.numbers))
        with dry.ledger.doing("denoise"):
            dry.memory.look()
            return step(*args, **kwargs)

    object.__setattr__(network, "canvas_step", counted)
    return starts


def _of_steps(starts: list[Numbers], total: Numbers, canvases: int, unplayed: int) -> Numbers:
    """Counts of one step, and of a generation with as many more steps a canvas."""
    before, after, all_of_it = (_without_phase(numbers) for numbers in (*starts[-2:], total))
    numbers: Numbers = {}
    for key, number in all_of_it.items():
        step = after.get(key, 0.0) - before.get(key, 0.0)
        name, *rest = key
        if step:
            numbers[name, "denoise", *rest] = step
        numbers[name, "generate", *rest] = number + canvases * unplayed * step
    return numbers


def _peaks(dry: DryRun) -> Numbers:
    """Peaks of a step, and of the generation that it is a part of."""
    numbers = dry.memory.numbers()
    if numbers["peak_gb", "denoise"] > numbers["peak_gb", "generate"]:
        for (name, phase, *rest), number in list(numbers.items()):
            if phase == "denoise":
                numbers[name, "generate", *rest] = number
    return numbers


def _without_phase(numbers: Numbers) -> Numbers:
    sums: Numbers = {}
    for (name, _, *rest), number in numbers.items():
        sums[name, *rest] = sums.get((name, *rest), 0.0) + number
    return sums
