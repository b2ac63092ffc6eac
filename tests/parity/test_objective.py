"""A training step is the reference's: loss and the gradient of every parameter, on one process."""

from __future__ import annotations

import pytest
import torch

from tests.distributed import cases
from tests.parity import objectives
from tests.parity.objectives import OBJECTIVES, WEIGHTS, Step, assert_same_step
from tests.reference import SIZES


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("size", SIZES)
def test_loss_and_gradients(single, reference, checkpoint, size, name):
    """All canvases of all rows in one pass, against one canvas of one row at a time."""
    ours = Step(*cases.gradients(checkpoint(size, **WEIGHTS[size]), {}, **objectives.asked(size, name)))
    assert_same_step(ours, objectives.by_transformers(reference(size, **WEIGHTS[size]), size, name), 5e-6)


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_recomputing_activations_changes_no_bit(single, checkpoint, name, recompute):
    """Keys and values that the canvases read carry their gradient through a recomputed layer."""
    asked = objectives.asked("base", name)
    plain = Step(*cases.gradients(checkpoint("base", **WEIGHTS["base"]), {}, **asked))
    recomputed = Step(*cases.gradients(checkpoint("base", **WEIGHTS["base"]), {}, **asked, recompute=recompute))
    assert recomputed.loss == plain.loss
    assert all(torch.equal(recomputed.gradients[key], gradient) for key, gradient in plain.gradients.items())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_backward_in_two_passes_is_that_of_one_graph(single, checkpoint, name):
    """First the canvases, then the context with what they ask of its keys and values."""
    asked = objectives.asked("base", name)
    passes = Step(*cases.gradients(checkpoint("base", **WEIGHTS["base"]), {}, **asked))
    graph = Step(*cases.gradients(checkpoint("base", **WEIGHTS["base"]), {}, **asked, one_graph=True))
    assert passes.loss == pytest.approx(graph.loss, abs=1e-6)
    assert_same_step(passes, graph, 5e-7)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_micro_batches_add_up(single, checkpoint, name):
    asked = objectives.asked("base", name)
    whole = Step(*cases.gradients(checkpoint("base", **WEIGHTS["base"]), {}, **asked))
    for parts in (2, 4):
        cut = Step(*cases.gradients(checkpoint("base", **WEIGHTS["base"]), {}, **asked, micro_batches=parts))
        assert_same_step(cut, whole, 2e-6)


def test_where_no_coin_falls_self_conditioning_learns_nothing(single, checkpoint):
    step = Step(*cases.gradients(checkpoint("base", **WEIGHTS["base"]), {}, **objectives.asked("base", "no_coin")))
    zero = {name for name, gradient in step.gradients.items() if not gradient.any()}
    assert zero == {name for name in step.gradients if ".self_conditioning." in name}
