"""Three small networks tell what all layers need."""

from __future__ import annotations

import pytest

from nemo_diffgemma.cli.child_process import call_in_child
from nemo_diffgemma.dry_run.case import Case, released
from nemo_diffgemma.dry_run.driver import environment
from nemo_diffgemma.dry_run.whole import measure
from nemo_diffgemma.gpus import load_gpu
from tests.dry_run import figures


def both(case: Case) -> list[dict]:
    return [measure(case, whole=whole).numbers for whole in (True, False)]


@pytest.mark.slow  # minutes: all layers of the released network
@pytest.mark.parametrize("verb", ["train", "generate"])
def test_all_layers_follow_from_three_small_networks(verb: str) -> None:
    case = released(figures.TP4_EP8, verb)
    (whole, computed), _ = call_in_child(both, case, environment=environment(load_gpu("h100")))
    exact = {key for key in whole if key[0] in ("peak_gb", "own_gb", "launches", "waits", "calls", "wire_gb", "tflop")}
    assert exact == {key for key in computed if key[0] in {name for name, *_ in exact} and abs(computed[key]) > 1e-12}
    for key in exact:
        assert computed[key] == pytest.approx(whole[key], rel=1e-6), key
