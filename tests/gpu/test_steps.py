"""Denoising steps on a GPU: recorded as CUDA graphs, never waited for, the same tokens as without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.layouts import LAYOUTS
from tests.parity import generations

WORLDS = {"single": (1, {}), **{name: LAYOUTS[name] for name in ("tp2_ep2", "tp2_etp2_ep2")}}
CALM = dict(damp=generations.DAMP, sublayers=generations.SUBLAYERS)


# -- what a rank runs --------------------------------------------------------------------------------------------------


def generated(
    path: str, layout: dict[str, int], asked: list[dict[str, Any]], dtype: torch.dtype
) -> list[tuple[Any, Any, int, bool]]:
    """Without recordings and with them; how many geometries were recorded, and whether all could be.

    In bfloat16 steps of fixed shapes are what is recorded or not: others round differently.
    """
    from nemo_diffgemma.model import fixed_step
    from tests.distributed import cases

    fixed_step.FEWEST = 8
    model = cases.load(path, layout, dtype)
    recorded, model.fixed_steps = model.fixed_steps, None
    if dtype == torch.bfloat16:
        model.fixed_steps = fixed_step.FixedSteps(None)
    plain = [cases.generated(model, **given) for given in asked]
    model.fixed_steps = recorded
    results = []
    for before, given in zip(plain, asked, strict=True):
        found = cases.generated(model, **given)
        graphs = [step.recording for step in recorded._steps.values()]
        results.append((before, found, sum(graph is not None for graph in graphs), recorded.recorder is not None))
    return results


def without_waiting(path: str, layout: dict[str, int]) -> tuple[list[Tensor], list[Tensor]]:
    """Entropies of the steps of two canvases, where any wait for the device is an error, and of plain steps."""
    from nemo_diffgemma import SamplerConfig
    from nemo_diffgemma.diffusion.generate import StepInputs
    from nemo_diffgemma.diffusion.noise import CanvasNoise, KeyedNoise
    from nemo_diffgemma.diffusion.progress import Progress
    from nemo_diffgemma.parallel import device
    from tests.distributed import cases

    # torch's grouped product of float32 is a loop over the experts, whose limits the host reads
    model, here = cases.load(path, layout, torch.bfloat16), device()
    config = model.model_config
    noise = KeyedNoise.for_rows(3, 2, config.canvas_length, config.vocab_size, here)
    cache = model.encode(torch.arange(24).view(2, 12))
    temperature, bound = (torch.tensor(value, dtype=torch.float64, device=here) for value in (0.6, 5.0))
    ours, theirs = [], []
    for canvas in range(2):
        drawn = CanvasNoise.of(noise, canvas, 8, here)
        progress = Progress(SamplerConfig(), drawn.initial, torch.zeros(2, dtype=torch.bool, device=here), model.agreed)
        tokens, soft = drawn.initial, None
        for step in range(8):
            context = list(drawn.replacements[0].unbind()) if canvas and step == 0 else None
            numbers = drawn.uniforms[step], drawn.replacements[step]
            given = StepInputs(tokens, *numbers, temperature, bound, soft, context)
            run = model.sampling_step if context else model.canvas_step
            torch.cuda.synchronize()
            if step > 2 or context:  # the second fixed step is recorded, with waits
                torch.cuda.set_sync_debug_mode("error")
            try:
                settled = run(given, cache)
                progress.advance(settled.argmax, settled.entropy)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            if not context:
                ours.append(settled.entropy.cpu())
                theirs.append(model.sampling_step(given, cache).entropy.cpu())
            tokens, soft, cache = settled.canvas, settled.soft, settled.cache
    return ours, theirs


# -- claims ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", WORLDS)
def test_recorded_steps_give_the_tokens_of_launched_ones(gpu_pool, reference, checkpoint, layout, dtype):
    """In float32 those of transformers as well; there torch has no grouped product that could be recorded."""
    world, axes = WORLDS[layout]
    theirs, names = reference("base", **CALM), ("stable_1", "eos_many", "released")
    asked = [generations.asked(theirs, name) for name in names]
    ranks = gpu_pool(world).run(
        "tests.gpu.test_steps:generated", path=checkpoint("base", **CALM), layout=axes, asked=asked, dtype=dtype
    )
    for results in ranks:
        for name, (plain, ours, graphs, could) in zip(names, results, strict=True):
            assert could == bool(graphs) == (dtype == torch.bfloat16)
            if dtype == torch.float32:
                generations.assert_same_tokens(ours, generations.tokens(theirs, name))
                generations.assert_same_tokens(plain, generations.tokens(theirs, name))
            else:
                assert all(map(torch.equal, ours, plain))


@pytest.mark.parametrize("layout", WORLDS)
def test_no_step_waits_for_the_device(gpu_pool, checkpoint, layout):
    world, axes = WORLDS[layout]
    ranks = gpu_pool(world).run("tests.gpu.test_steps:without_waiting", path=checkpoint("base", **CALM), layout=axes)
    for ours, theirs in ranks:
        torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), atol=1e-5, rtol=0)
