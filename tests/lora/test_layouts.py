"""Adapters in every layout are those of one process: loss, gradients, norm, files and logits, of packed rows."""

from __future__ import annotations

import pytest
import torch

from nemo_diffgemma.model.adapters import DropoutNoise
from nemo_diffgemma.model.segments import Span, stream_of
from tests.distributed.layouts import LAYOUTS
from tests.lora import cases
from tests.parity import objectives

FORMS = {
    "each": dict(experts="each", dropout=0.2),
    "shared": dict(experts="shared", rslora=True, rank=3),
}
CASES = [
    *[("base", layout, form, "none") for layout in ("tp2", "tp2_ep2", "dp2_ep2", "tp2_etp2_ep2") for form in FORMS],
    ("one_global_kv", "tp4", "each", "none"),
    ("base", "tp2_ep2", "each", "full"),
    ("base", "dp2_ep2", "each", "selective"),
]


def asked(form: str, size: str) -> dict:
    return dict(lora=FORMS[form], **objectives.asked(size, "all_canvases_by_token"))


@pytest.fixture(scope="module")
def one_process(single, checkpoint):
    """`one_process(size, form)` -> what one process has."""
    found: dict[tuple[str, str], dict] = {}

    def get(size: str, form: str) -> dict:
        if (size, form) not in found:
            path = checkpoint(size, **objectives.WEIGHTS[size])
            found[size, form] = cases.gradients(str(path), {}, recompute="none", **asked(form, size))
        return found[size, form]

    return get


@pytest.mark.parametrize(("size", "layout", "form", "recompute"), CASES, ids=["-".join(case) for case in CASES])
def test_gradients_equal_one_process(pool, checkpoint, one_process, size, layout, form, recompute):
    truth = one_process(size, form)
    world, axes = LAYOUTS[layout]
    path = str(checkpoint(size, **objectives.WEIGHTS[size]))
    ranks = pool(world).run(
        "tests.lora.cases:gradients", path=path, layout=axes, recompute=recompute, **asked(form, size)
    )
    assert all(found["loss"] == pytest.approx(truth["loss"], abs=1e-5) for found in ranks)
    assert all(found["norm"] == pytest.approx(truth["norm"], rel=1e-4) for found in ranks)
    gradients = ranks[0]["gradients"]
    assert gradients.keys() == truth["gradients"].keys()
    off = {
        name: float((gradients[name] - whole).abs().max()) / truth["norm"] for name, whole in truth["gradients"].items()
    }
    worst = max(off, key=off.__getitem__)
    assert off[worst] < 5e-6, f"{worst} is off by {off[worst]:.1e}"
    assert all(torch.any(gradient) for gradient in gradients.values())


def test_dropout_is_of_the_sample(single, checkpoint, one_process):
    """Another seed drops other entries; a step without dropout has another loss."""
    path = str(checkpoint("base", **objectives.WEIGHTS["base"]))
    question = asked("each", "base")
    without = cases.gradients(path, {}, recompute="none", **(question | dict(lora=FORMS["each"] | dict(dropout=0.0))))
    assert abs(without["loss"] - one_process("base", "each")["loss"]) > 1e-3
    noises = []
    for seed, samples in ((1, (0, 1)), (2, (0, 1)), (1, (2, 3))):
        noises.append(DropoutNoise(seed, samples).of_tokens(STREAM))
    assert torch.equal(noises[0], DropoutNoise(1, (0, 1)).of_tokens(STREAM))
    keys = torch.cat(noises)
    assert len(keys.unique()) == len(keys)  # of two rows, of context and canvases that cover the same positions


STREAM = stream_of((Span(0, 0), Span(0, 0)), (5, 8), ((0, 1), (0, 5), (1, 3)), 4, 1)
