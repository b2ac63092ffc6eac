"""A network of many layers from three small ones.

Peaks, FLOPs, launches, waits and bytes are affine in the numbers of sliding and of global layers. So networks of 2 + 1,
4 + 1 and 2 + 2 layers (sliding + global) tell those of any other, as long as it has as many of both. What Megatron does
by buckets of gradients is not: calls and launches of `reduction` and `optimizer` come out 1 % of a step's too many or
too few, and peaks by some kilobytes (tests/dry_run/test_whole.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

from nemo_diffgemma.dry_run.case import Case, Measured
from nemo_diffgemma.dry_run.ledger import Numbers
from nemo_diffgemma.dry_run.play import play

PEAKS = ("peak_gb", "own_gb", "part_gb")
SMALL = ((2, 1), (4, 1), (2, 2))


def measure(case: Case, whole: bool = False, progress: Callable[[str], None] = lambda what: None) -> Measured:
    """Play a case: all of its layers, or three small networks where it has more layers than these together."""
    sliding, of_all = case.layers
    if whole or sliding < 4 or of_all < 2 or sliding + of_all <= sum(map(sum, SMALL)):
        measured = play(case, progress)
        return Measured(_whole_generation(measured.numbers), measured.violations, measured.largest)
    base, more_sliding, more_global = (_small(case, *layers, progress) for layers in SMALL)
    numbers = {}
    for key in {**base.numbers, **more_sliding.numbers, **more_global.numbers}:
        of_base, of_sliding, of_global = (
            measured.numbers.get(key, 0.0) for measured in (base, more_sliding, more_global)
        )
        per_sliding, per_global = (of_sliding - of_base) / 2, of_global - of_base
        numbers[key] = of_base + (sliding - 2) * per_sliding + (of_all - 1) * per_global
    violations: dict[str, int] = {}
    largest: dict[tuple[str, str], int] = {}
    for measured in (base, more_sliding, more_global):
        violations |= measured.violations
        largest |= measured.largest
    return Measured(_whole_generation(numbers), violations, largest)


def _whole_generation(numbers: Numbers) -> Numbers:
    """With the peak of a generation, which its steps are a part of."""
    if numbers.get(("peak_gb", "denoise"), 0.0) <= numbers.get(("peak_gb", "generate"), 0.0):
        return numbers
    peaks = {key: n for key, n in numbers.items() if key[0] in PEAKS and key[1] == "denoise"}
    return numbers | {(name, "generate", *rest): number for (name, _, *rest), number in peaks.items()}


def _small(case: Case, sliding: int, of_all: int, progress: Callable[[str], None]) -> Measured:
    name = f"{sliding} sliding and {of_all} global layers: "
    return play(case.with_layers(sliding, of_all), lambda what: progress(name + what))


def measure_in_child(case: Case, whole: bool) -> Measured:
    """`measure` as a process of its own does it, telling on standard error what it does."""
    from tqdm import tqdm

    with tqdm(total=0, bar_format="dry run: {desc} [{elapsed}]", file=sys.stderr) as bar:
        measured = measure(case, whole, bar.set_description_str)
        bar.set_description_str("done")
    return measured


def measure_all(cases: Mapping[str, Case]) -> dict[str, Measured]:
    """Any number of cases of one GPU in one process."""
    return {name: measure(case) for name, case in cases.items()}
