"""PEFT's files: the installed peft reads ours onto transformers' model, and we read what it writes."""

from __future__ import annotations

import pytest
import torch

from nemo_diffgemma import DiffusionGemma
from tests.distributed.cases import answer
from tests.lora import kit
from tests.parity import questions

WEIGHTS = dict(damp=0.1, sublayers=0.5)


@pytest.fixture(scope="module")
def theirs(reference):
    return reference("base", **WEIGHTS)


@pytest.fixture(scope="module")
def base(checkpoint):
    return checkpoint("base", **WEIGHTS)


def differences(theirs, adapted, ours) -> list[float]:
    """Largest differences of logits, of prompts encoded and canvases denoised, with a signal, and after a canvas."""
    asked = [questions.question(theirs, kind, 9) for kind in ("plain", "signal", "after_1_canvas")]
    with torch.no_grad():
        return [
            float((answer(ours, **one.asked()) - questions.answer(adapted.get_base_model(), one)).abs().max())
            for one in asked
        ]


@pytest.mark.parametrize(
    "keys",
    [
        dict(),
        dict(experts="shared", rslora=True, alpha=3.0),
        dict(experts="none", targets=["q_proj", "*.layers.1.mlp.down_proj"]),
        dict(targets=[], rank=3),
    ],
    ids=["everything", "shared", "some", "experts_alone"],
)
def test_peft_loads_ours_with_equal_logits(single, theirs, base, tmp_path, keys):
    network = kit.adapted(base, kit.group(**keys))
    directory = kit.save(network, tmp_path)
    adapted = kit.by_peft(theirs, directory)
    moved = differences(theirs, adapted, DiffusionGemma.from_checkpoint(base))
    assert max(differences(theirs, adapted, network)) < questions.TOLERANCE < 1e-2 < min(moved)
    again = DiffusionGemma.from_checkpoint(directory)
    assert max(differences(theirs, adapted, again)) < questions.TOLERANCE
