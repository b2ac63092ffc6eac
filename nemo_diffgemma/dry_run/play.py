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
from typing import Any, Protocol
from unittest import mock

import torch
from torch import nn

from nemo_diffgemma.diffusion_gemma import DiffusionGemma
from nemo_diffgemma.dry_run.case import Case, Measured
from nemo_diffgemma.dry_run.driver import check_loaded
from nemo_diffgemma.dry_run.ledger import Ledger, Numbers
from nemo_diffgemma.dry_run.memory import GB, Memory
from nemo_diffgemma.dry_run.mode import DryRun, MixedDevicesError
from nemo_diffgemma.dry_run.world import one_rank
from nemo_diffgemma.lora.opening import prepare_sizes
from nemo_diffgemma.parallel.groups import device
from nemo_diffgemma.schema import DTYPES

STEADY = 5  # denoising steps that are played: two computed, one recorded, two replayed
# methods of the network -> phase; memory that they take is activations but for the loss
FORWARD_PHASES = {
    "encode_clean": ("encode", "activations"),
    "canvas_hidden": ("canvas", "activations"),
    "soft_embedding": ("self_conditioning", "activations"),
    "cross_entropy_gradient": ("loss", "loss"),
}


class Watch(Protocol):
    """A dispatch mode that counts and tracks memory: of a dry run, or of a real one (tests/dry_run/test_reality.py)."""

    ledger: Ledger
    memory: Memory


def play(case: Case, progress: Callable[[str], None] = lambda what: None) -> Measured:
    """One training step like any but the first, or an encoding and a generation."""
    check_loaded()
    _clear_caches()
    gc.freeze()  # what imports have made, half a second of every collection
    dry = DryRun(DTYPES[case.model.dtype])
    with one_rank(dry, case.layout, case.world, case.rank):
        try:
            numbers = measure(dry, case, progress)
        except MixedDevicesError:  # a violation; what there is until then
            numbers = _numbers(dry)
        for (phase, line), size in dry.memory.largest.items():
            if size > case.temporary_gb * GB:
                dry.ledger.violate(f"a temporary of {size / GB:.2f} GB in {phase} at {line}")
        measured = Measured(numbers, dict(dry.ledger.violations), dict(dry.memory.largest))
    gc.collect()  # models hold their groups and themselves in cycles
    return measured


def measure(
    watch: Watch,
    case: Case,
    progress: Callable[[str], None] = lambda what: None,
    fill: Callable[[DiffusionGemma], None] = lambda network: None,
) -> Numbers:
    """Build the network of a case and play it, in process groups of its layout, counting what `watch` sees.

    `fill` gives the network weights, which only a real one needs.
    """
    progress("building the network")
    with watch.ledger.doing("build", "weights"):
        network = DiffusionGemma(case.config, DTYPES[case.model.dtype])
        network.recompute = case.model.recompute
        prepare_sizes(network, case.model)
        fill(network)
    verb = _train if case.verb == "train" else _generate
    return verb(watch, network, case, progress)


def _clear_caches() -> None:
    """Forget what functions of the project keep: GPU tensors of another case, or streams of the last generation."""
    for name, module in list(sys.modules.items()):
        if name.startswith("nemo_diffgemma."):
            for kept in vars(module).values():
                if isinstance(kept, functools._lru_cache_wrapper):
                    kept.cache_clear()


def _numbers(watch: Watch) -> Numbers:
    return {**watch.ledger.numbers, **watch.memory.numbers()}


def _start_measuring(watch: Watch) -> None:
    watch.ledger.numbers.clear()
    watch.ledger.violations.clear()
    watch.memory.forget_peaks()


# -- training ----------------------------------------------------------------------------------------------------------


def _train(watch: Watch, network: Any, case: Case, progress: Callable[[str], None]) -> Numbers:
    from nemo_diffgemma.data.tasks import default_data
    from nemo_diffgemma.training import optimizer_state, overlap
    from nemo_diffgemma.training.nemo_model import DiffusionGemmaModel, ModelSettings

    class Model(DiffusionGemmaModel):
        trainer = optimizers = None  # Lightning's are properties

    rows = len(case.prompts)
    settings = ModelSettings(network=case.model, data=default_data(), optim=case.optim)
    settings.data.micro_batch_size = rows
    settings.data.global_batch_size = rows * case.micro_batches * case.layout.replicas(case.world)
    model: Any = Model(settings)
    model.network, model.trainer = network.train(), types.SimpleNamespace(global_step=0)
    progress("building the optimizer")
    with watch.ledger.doing("build", "gradients and optimizer"):
        adapter = model.configure_optimizers()
        optimizer_state.prime(adapter.megatron)  # the first step is then like any other
    _split_static(watch, model)
    model.optimizers = lambda: adapter
    for name, (phase, part) in FORWARD_PHASES.items():
        _label(watch, network, name, phase, part)
    _label(watch, adapter, "step", "optimizer", "update")
    batch = _batch(case)
    progress("training step")
    with ExitStack() as stack:
        for owner, name, phase in (
            (torch.autograd, "backward", "backward"),
            (overlap, "finalize_gradients", "reduction"),
            (overlap, "start_gather", "optimizer"),
        ):
            stack.enter_context(mock.patch.object(owner, name, getattr(owner, name)))  # puts it back
            _label(watch, owner, name, phase, "update" if phase == "optimizer" else phase)
        _start_measuring(watch)
        with watch.ledger.doing("other", "other"):
            watch.memory.begin()
            model.training_step(batch.to(device()), 0)
    return _numbers(watch)


def _batch(case: Case) -> Any:
    """The rows of all micro-batches, filled up to whole canvases as the data's are."""
    from nemo_diffgemma.data import Example, collate

    rows = list(zip(case.prompts, case.responses, strict=True)) * case.micro_batches
    examples = [
        Example((2,) * (prompt + response), ((prompt, prompt + response),), index)
        for index, (prompt, response) in enumerate(rows)
    ]
    return collate(examples, case.config.canvas_length, 1, fills_rows=True)


def _split_static(watch: Watch, model: Any) -> None:
    """Tell what Megatron's DDP holds (gradients, and where it has moved them the weights) from the optimizer's."""
    wrapped = model.__dict__["_wrapped"]
    buffers = [*wrapped.buffers, *wrapped.expert_parallel_buffers]
    watch.memory.rename([buffer.grad_data for buffer in buffers], "gradients")
    watch.memory.rename([parameter.data for parameter in model.network.parameters()], "weights")
    watch.memory.rename_part("gradients and optimizer", "optimizer")


def _label(watch: Watch, owner: Any, name: str, phase: str, part: str) -> None:
    """Calls of `owner.name` are this phase."""
    inner = getattr(owner, name)

    @functools.wraps(inner)
    def call(*args: Any, **kwargs: Any) -> Any:
        with watch.ledger.doing(phase, part):
            watch.memory.begin()
            return inner(*args, **kwargs)

    object.__setattr__(owner, name, call) if isinstance(owner, nn.Module) else setattr(owner, name, call)


# -- generation --------------------------------------------------------------------------------------------------------


def _generate(watch: Watch, network: Any, case: Case, progress: Callable[[str], None]) -> Numbers:
    """Phases `encode`, `denoise` (one step in the steady state) and `generate` (all steps of all canvases).

    A step is what is counted from one call of `canvas_step` to the next, so whatever stands around it is in it; those
    that are not played are like the last one that is.
    """
    network.eval()
    config, length = network.model_config, max(case.prompts)
    ids = torch.randint(0, config.vocab_size, (len(case.prompts), length))
    mask = torch.arange(length) >= length - torch.tensor(case.prompts)[:, None]
    left_padded = None if bool(mask.all()) else mask.long()
    progress("encode")
    _start_measuring(watch)
    with watch.ledger.doing("encode", "activations"):
        watch.memory.begin()
        cache = network.encode(ids, left_padded)
    encode = _numbers(watch)
    del cache
    progress("generate")
    _clear_caches()
    watch.ledger.numbers.clear()
    watch.memory.forget_peaks()
    steps = min(case.steps, STEADY)
    starts = _count_steps(watch, network)
    sampler = dataclasses.replace(network.sampler_defaults, max_denoising_steps=steps)
    with watch.ledger.doing("generate", "activations"):
        watch.memory.begin()
        network.generate(ids, left_padded, max_new_tokens=case.canvases * config.canvas_length, sampler=sampler)
    return (
        encode
        | _of_steps(starts, dict(watch.ledger.numbers), case.canvases, case.steps - steps)
        | watch.memory.numbers()
    )


def _count_steps(watch: Watch, network: Any) -> list[Numbers]:
    """What was counted before each step of a canvas but the first, as they come."""
    starts: list[Numbers] = []
    step = network.canvas_step

    @functools.wraps(step)
    def counted(*args: Any, **kwargs: Any) -> Any:
        starts.append(dict(watch.ledger.numbers))
        with watch.ledger.doing("denoise"):
            watch.memory.begin()
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


def _without_phase(numbers: Numbers) -> Numbers:
    sums: Numbers = {}
    for (name, _, *rest), number in numbers.items():
        sums[name, *rest] = sums.get((name, *rest), 0.0) + number
    return sums
