"""The project's targets for GPUs beside what a dry run of the released network finds, as the table in docs/dry_run.md.

    python -m tests.dry_run.figures h100       # plays the cases, some minutes on two cores
    python benchmarks/dry_run_targets.py       # prints the table from tests/dry_run/expected.yaml

Training: prompt 256, response 768, one canvas scored, full recompute, AdamW distributed over the ranks; "16 canvases":
prompt 1024, response 4096, all 16 scored, no recompute. Generation: prompt 1024, batch 1. "Own": the most that a phase
holds of what it has taken itself.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.dry_run import figures

GENERATE = ("generate, one GPU", "generate, TP4xEP8", "generate, EP8")
ONE_GPU, EP8, RANK_OF_512 = (
    "train, one GPU, full recompute",
    "train, EP8, full recompute",
    "train, TP4xEP8, rank 77 of 512",
)
LARGE = "train, TP4xEP8, no recompute, 16 canvases"


@dataclass(frozen=True)
class Target:
    """A row: what a phase (None: all) has of a number, in some cases."""

    text: str
    most: float
    cases: tuple[str, ...]
    number: str
    phase: str | None = None

    def found(self, results: dict[str, Any]) -> list[float]:
        """One figure for each case."""
        return [self._of(results[name]) for name in self.cases]

    def _of(self, result: dict[str, Any]) -> float:
        phases = result["phases"]
        values = [phases[name][self.number] for name in ([self.phase] if self.phase else phases)]
        return max(values) if self.number.endswith("_gb") else sum(values)

    def row(self, results: dict[str, Any]) -> str:
        """In Markdown."""
        found = self.found(results)
        shown = ", ".join(f"{figure:,.{1 if self.number.endswith('_gb') else 0}f}" for figure in found)
        return f"| {self.text} | {self.most:,g} | {shown} | {'yes' if max(found) <= self.most else '**no**'} |"


TARGETS = (
    Target("denoising step, one GPU: launches", 2500, GENERATE[:1], "launches", "denoise"),
    Target("denoising step, TP4xEP8: launches", 2500, GENERATE[1:2], "launches", "denoise"),
    Target("denoising step, one GPU, TP4xEP8, EP8: host waits", 0, GENERATE, "waits", "denoise"),
    Target("training step, one GPU, EP8, TP4xEP8 of 512: launches", 20_000, (ONE_GPU, EP8, RANK_OF_512), "launches"),
    Target(
        "the same: host waits (two a layer with EP, and six for the step)", 66, (ONE_GPU, EP8, RANK_OF_512), "waits"
    ),
    Target("peak GB, EP8, full recompute, one canvas", 72, (EP8,), "peak_gb"),
    Target("peak GB, TP4xEP8, no recompute, 16 canvases", 75, (LARGE,), "peak_gb"),
    Target("loss, own GB: EP8, TP4xEP8 of 512, 16 canvases", 1.2, (EP8, RANK_OF_512, LARGE), "own_gb", "loss"),
)


def main() -> None:
    results = figures.read()["h100"]
    print("| | target | dry run | met |\n|---|---|---|---|")
    print("\n".join(target.row(results) for target in TARGETS))


if __name__ == "__main__":
    main()
