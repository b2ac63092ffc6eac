"""Memory, launches, waits, FLOPs and bytes of the released network: none moves by more than 2 % unnoticed."""

from __future__ import annotations

import pytest

from tests.dry_run import figures


@pytest.mark.parametrize("gpu", figures.CASES)
def test_figures_are_those_that_are_kept(gpu: str) -> None:
    lines = figures.moved(figures.read()[gpu], figures.measured(gpu), gpu)
    assert not lines, "\n".join([*lines, "if this is meant: python -m tests.dry_run.figures, and commit expected.yaml"])


@pytest.mark.parametrize("gpu", figures.CASES)
def test_nothing_is_kept_that_must_not_be(gpu: str) -> None:
    for name, result in figures.read()[gpu].items():
        assert result["violations"] == [], name


def test_a_moved_figure_is_told() -> None:
    expected = {"phases": {"denoise": {"launches": 1000, "waits": 0, "peak_gb": 10.0}}, "violations": []}
    within = {"phases": {"denoise": {"launches": 1019, "waits": 0, "peak_gb": 9.81}}, "violations": []}
    beyond = {"phases": {"denoise": {"launches": 1021, "waits": 1, "peak_gb": 9.79}}, "violations": ["a wait"]}
    assert figures.moved(expected, within) == []
    assert [line.partition(":")[0] for line in figures.moved(expected, beyond)] == [
        "phases denoise launches",
        "phases denoise waits",
        "phases denoise peak_gb",
        "violations",
    ]
    assert figures.moved(expected, {**within, "phases": {}}) and figures.moved({}, within)
