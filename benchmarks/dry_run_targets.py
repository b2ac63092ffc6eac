"""What a dry run of the released network says of the project's targets for GPUs, as the table in docs/dry_run.md.

    python benchmarks/dry_run_targets.py            # some minutes; an H100 that is not there
    python benchmarks/dry_run_targets.py gpu=b200

Training: prompt 256, response 768, one canvas scored, AdamW distributed over the ranks, micro-batch 1; "16 canvases":
prompt 1024, response 4096, all 16 scored. Generation: prompt 1024. "Loss phase": the most that it holds of its own.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nemo_diffgemma.cli.child_process import call_in_child
from nemo_diffgemma.dry_run.case import Case, Measured, released
from nemo_diffgemma.dry_run.driver import environment
from nemo_diffgemma.dry_run.whole import measure_all
from nemo_diffgemma.gpus import load_gpu
from nemo_diffgemma.parallel.layout import ParallelLayout

SINGLE, EP8, TP4_EP8 = ParallelLayout(), ParallelLayout(expert=8), ParallelLayout(tensor=4, expert=8)
CASES: dict[str, Case] = {
    "generate": released(SINGLE, "generate"),
    "generate TP4xEP8": released(TP4_EP8, "generate"),
    "generate EP8": released(EP8, "generate"),
    "train": released(SINGLE),
    "train EP8": released(EP8),
    "train TP4xEP8": released(TP4_EP8),
    "train TP4xEP8, 16 canvases": released(TP4_EP8, recompute="none", canvases=16, prompts=(1024,), responses=(4096,)),
}


@dataclass(frozen=True)
class Target:
    """A row: the worst of some cases in what a phase (None: all) has of a number."""

    text: str
    most: float
    cases: tuple[str, ...]
    number: str
    phase: str | None = None

    def row(self, measured: dict[str, Measured]) -> str:
        """In Markdown, with the figures of all its cases."""
        figures = [self._of(measured[name]) for name in self.cases]
        digits = 1 if self.number.endswith("_gb") else 0
        shown = ", ".join(f"{figure:,.{digits}f}" for figure in figures)
        met = "yes" if max(figures) <= self.most else "**no**"
        return f"| {self.text} | {self.most:,g} | {shown} | {met} |"

    def _of(self, measured: Measured) -> float:
        phases = measured.phases if self.phase is None else [self.phase]
        values = [measured.sum(self.number, phase) for phase in phases]
        return max(values) if self.number.endswith("_gb") else sum(values)


GENERATE = ("generate", "generate TP4xEP8", "generate EP8")
TRAIN = ("train", "train EP8", "train TP4xEP8")
LARGE = "train TP4xEP8, 16 canvases"
TARGETS = (
    Target("denoising step, one GPU: launches", 2500, GENERATE[:1], "launches", "denoise"),
    Target("denoising step, TP4xEP8: launches", 2500, GENERATE[1:2], "launches", "denoise"),
    Target("denoising step, one GPU, TP4xEP8, EP8: host waits", 0, GENERATE, "waits", "denoise"),
    Target("training step, full recompute, one GPU, EP8, TP4xEP8: launches", 20_000, TRAIN, "launches"),
    Target("training step, EP8, TP4xEP8: host waits (two a layer, and two for the log)", 62, TRAIN[1:], "waits"),
    Target("training step, one GPU: host waits", 2, TRAIN[:1], "waits"),
    Target("peak GB, EP8, full recompute, one canvas", 72, TRAIN[1:2], "peak_gb"),
    Target("peak GB, TP4xEP8, no recompute, 16 canvases", 75, (LARGE,), "peak_gb"),
    Target("loss phase GB, EP8, TP4xEP8, 16 canvases", 1.2, (*TRAIN[1:], LARGE), "own_gb", "loss"),
)


def main() -> None:
    gpu = load_gpu(next((argument.removeprefix("gpu=") for argument in sys.argv[1:]), "h100"))
    measured, _ = call_in_child(measure_all, CASES, environment=environment(gpu))
    print(f"{gpu.name}\n\n| | target | dry run | met |\n|---|---|---|---|")
    print("\n".join(target.row(measured) for target in TARGETS))
    for name, result in measured.items():
        for text in result.violations:
            print(f"violation in {name}: {text}")


if __name__ == "__main__":
    main()
