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

STEADY = 3  # denoising steps after which one is like the other
# methods of the network -> phase; memory that they take is activations but for the loss
FORWARD_PHASES = {
    "encode_clean": ("encode", "activations"),
    "canvas_hidden": ("canvas", "activations"),
    "soft_embedding": ("self_conditioning", "activations"),
    "cross_entropy": ("loss", "loss"),
}


def play(case: Case, progress: Callable[[str], None] = lambda what: None) -> Measured:
    """One training step, or an encoding and a generation; each is measured after a first one that fills caches."""
    from nemo_diffgemma.checkpoint.open import DTYPES
    from nemo_diffgemma.training.nemo_model import empty_network

    _clear_caches()
    dry = DryRun(DTYPES[case.model.dtype])
    with one_rank(dry, case.layout, case.world, case.rank):
        progress("building the network")
        with dry.ledger.doing("build", "weights"):
            network = empty_network(case.model)
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
    from nemo_diffgemma.training import nemo_model, optimizer_state
    from nemo_diffgemma.training.nemo_model import DiffusionGemmaModel, ModelSettings

    class Model(DiffusionGemmaModel):
        trainer = log_dict = optimizers = None  # Lightning's are properties

    rows = len(case.prompts)
    settings = ModelSettings(network=case.model, data=default_data(), optim=case.optim)
    settings.data.micro_batch_size = rows
    settings.data.global_batch_size = rows * case.micro_batches * case.layout.replicas(case.world)
    model: Any = Model(settings)
    model.network, model.trainer = network, types.SimpleNamespace(global_step=0)
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
            (nemo_model, "finalize_model_grads", "reduction"),
        ):
            stack.enter_context(mock.patch.object(owner, name, getattr(owner, name)))  # puts it back
            _label(dry, owner, name, phase, phase)
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
        Example((2,) * prompt, (2,) * response, index) for index, (prompt, response) in enumerate(rows)
    ]
    return collate(examples, case.config.canvas_length, 1)


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

    Counts of a step are the difference between generations that are one step a canvas longer; so whatever stands
    around a step is in it. Its peak is that of the passes after the first.
    """
    network.eval()
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
    violations = dict(dry.ledger.violations)
    del cache
    runs = []
    for steps in (STEADY, STEADY + 1):
        progress(f"generate, {steps} steps a canvas")
        _clear_caches()
        _start_measuring(dry)
        runs.append(_one_generation(dry, network, case, ids, left_padded, steps))
    dry.ledger.violations.update(violations)
    return encode | _of_steps(*runs, case)


def _one_generation(dry: DryRun, network: Any, case: Case, ids: Any, mask: Any, steps: int) -> Numbers:
    sampler = dataclasses.replace(network.sampler_defaults, max_denoising_steps=steps)
    run, passes = network.run, 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal passes
        passes += 1
        if passes == 2:  # from here on it is the steady state, whoever runs the pass
            dry.ledger.phase = "denoise"
            dry.memory.look()
        return run(*args, **kwargs)

    object.__setattr__(network, "run", counted)
    with dry.ledger.doing("generate", "activations"):
        dry.memory.look()
        network.generate(ids, mask, max_new_tokens=case.canvases * case.config.canvas_length, sampler=sampler)
    object.__delattr__(network, "run")
    return _numbers(dry)


def _of_steps(short: Numbers, long: Numbers, case: Case) -> Numbers:
    """Numbers of one step and of the whole generation, from two of `STEADY` and one more steps a canvas."""
    peaks = ("peak_gb", "own_gb", "part_gb")
    numbers = {key: number for key, number in long.items() if key[0] in peaks}
    largest = {key: number for key, number in numbers.items() if key[1] == "denoise" and key[0] == "peak_gb"}
    if largest and max(largest.values()) > numbers.get(("peak_gb", "generate"), 0.0):
        for key, number in list(numbers.items()):
            if key[1] == "denoise":
                numbers[key[0], "generate", *key[2:]] = number
    counts = [_by_name(run) for run in (short, long)]
    for key in {**counts[0], **counts[1]}:
        step = (counts[1].get(key, 0.0) - counts[0].get(key, 0.0)) / case.canvases
        name, *rest = key
        numbers[name, "denoise", *rest] = step
        numbers[name, "generate", *rest] = counts[0].get(key, 0.0) + case.canvases * (case.steps - STEADY) * step
    return numbers


def _by_name(numbers: Numbers) -> Numbers:
    """Counts without their phase."""
    sums: Numbers = {}
    for (name, _, *rest), number in numbers.items():
        if name not in ("peak_gb", "own_gb", "part_gb"):
            sums[name, *rest] = sums.get((name, *rest), 0.0) + number
    return sums
