"""Three small networks tell what all layers need."""

from __future__ import annotations

import pytest

from nemo_diffgemma.cli.child_process import call_in_child
from nemo_diffgemma.dry_run.case import Case, released
from nemo_diffgemma.dry_run.driver import environment
from nemo_diffgemma.dry_run.whole import measure
from nemo_diffgemma.gpus import load_gpu
from tests.dry_run import figures

BY_BUCKETS = ("reduction", "optimizer")  # of gradients, whose number is not affine


def both(case: Case) -> list[dict]:
    return [measure(case, whole=whole).numbers for whole in (True, False)]


@pytest.mark.slow  # minutes: all layers of the released network
@pytest.mark.parametrize("verb", ["train", "generate"])
def test_all_layers_follow_from_three_small_networks(verb: str) -> None:
    case = released(figures.TP4_EP8, verb)
    (whole, computed), _ = call_in_child(both, case, environment=environment(load_gpu("h100")))
    for key in {*whole, *computed}:
        name, phase = key[:2]
        expected, found = whole.get(key, 0.0), computed.get(key, 0.0)
        if name in ("peak_gb", "tflop", "waits", "wire_gb"):
            assert found == pytest.approx(expected, rel=1e-5, abs=1e-9), key
        elif name in ("launches", "calls") and phase not in BY_BUCKETS:
            assert found == pytest.approx(expected, rel=1e-9), key
    totals = [sum(number for key, number in numbers.items() if key[0] == "launches") for numbers in (computed, whole)]
    assert totals[0] == pytest.approx(totals[1], rel=0.02)
