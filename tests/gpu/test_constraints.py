"""Constrained answers and locked places on a GPU: recorded steps, and no wait for the device in them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.layouts import LAYOUTS
from tests.serving import constrained as cases

PLACE, ID = 3, 11  # of a token that is locked
WORLDS = {"single": (1, {}), "tp2_ep2": LAYOUTS["tp2_ep2"]}


def steps_without_waiting(layout: dict[str, int], locks: bool) -> list[Tensor]:
    """What the steps of a canvas settle on, where any wait for the device is an error once the step is recorded.

    They are constrained, or with `locks` have a token that stands in its place.
    """
    from nemo_diffgemma.diffusion.generate import StepInputs
    from nemo_diffgemma.parallel import device
    from nemo_diffgemma.serving.constraints.sequence import ConstrainedBatch
    from tests.serving import examples

    model, place = cases.model(layout), device()
    constraints = [constraint for _, constraint in cases.constrained(3, 3)]
    told = ConstrainedBatch(constraints, 3, cases.LENGTH, 8, (examples.EOS,), place).of_canvas()
    cache = model.encode(torch.full((3, 5), 7))
    canvas = torch.full((3, cases.LENGTH), 9, device=place)
    uniforms = torch.full((3, cases.LENGTH), 0.5, device=place)
    bound, soft, found = torch.tensor(0.1, dtype=torch.float64, device=place), None, []
    locked = torch.full_like(canvas, -1)
    locked[:, PLACE] = ID
    held: dict[str, Any] = dict(locked=locked) if locks else dict(constraint=told)
    for step in range(5):
        given = StepInputs(canvas, uniforms, canvas, bound * 4, bound, soft, **held)
        torch.cuda.synchronize()
        if step > 2:  # the second is recorded, with waits
            torch.cuda.set_sync_debug_mode("error")
        settled = model.canvas_step(given, cache)
        torch.cuda.set_sync_debug_mode("default")
        canvas, soft = settled.canvas, settled.soft
        found.append((settled.argmax if settled.allowed is None else settled.allowed.tokens).cpu())
    return found


@pytest.mark.parametrize("layout", WORLDS)
def test_answers_are_of_their_languages(gpu_pool, layout):
    from tests.serving.test_constrained import check

    world, axes = WORLDS[layout]
    asked: dict[str, Any] = dict(layout=axes, seed=4, many=8, steps=4)
    for answers in gpu_pool(world).run("tests.serving.constrained:generated", **asked):
        check(answers[:-1], 4)


@pytest.mark.parametrize("locks", [False, True], ids=["constrained", "locked"])
@pytest.mark.parametrize("layout", WORLDS)
def test_no_step_waits_for_the_device(gpu_pool, layout, locks):
    world, axes = WORLDS[layout]
    job = "tests.gpu.test_constraints:steps_without_waiting"
    for steps in gpu_pool(world).run(job, layout=axes, locks=locks):
        assert all(tokens.shape == (3, cases.LENGTH) for tokens in steps)
        assert not locks or all((tokens[:, PLACE] == ID).all() for tokens in steps)
