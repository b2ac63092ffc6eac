"""A canvas as it settles: one line a denoising step, or one small grid a step, accepted tokens highlighted.

On a terminal accepted tokens are bold green; elsewhere they stand in [brackets]. Steps that change nothing
are left out.
"""

from __future__ import annotations

import math

from nemo_diffgemma.cli.output import Results
from nemo_diffgemma.diffusion.generate import Denoised
from nemo_diffgemma.tokenizer import Text

_WIDTH = 100


class CanvasView:
    """Pass it to `generate(observe=...)`; it shows the first row. `columns` draws the canvas as a grid so wide."""

    def __init__(self, results: Results, text: Text, columns: int | None = None) -> None:
        self._results, self._text, self._columns = results, text, columns
        self._steps: list[tuple[str, list[str]]] = []  # title and lines of each grid
        self._number, self._before = 0, [""]

    def __call__(self, step: Denoised) -> None:
        accepted = step.accepted[0].tolist()
        pieces = self._text.pieces(step.argmax[0].tolist())
        cells = [self._cell(piece, kept) for piece, kept in zip(pieces, accepted, strict=True)]
        self._number += 1
        if cells == self._before:
            return
        self._before = cells
        if self._columns is None:
            entropy = float(step.entropy[0].mean())
            title = f"canvas {step.canvas} step {step.remaining:2}: {sum(accepted)} accepted, entropy {entropy:.3f}"
            self._results.show(f"{title}\n  {''.join(cells)}")
            return
        rows = ["".join(cells[start : start + self._columns]) for start in range(0, len(cells), self._columns)]
        self._steps.append((f"step {self._number}: {sum(accepted)}/{len(accepted)}", rows))

    def _cell(self, piece: str, accepted: bool) -> str:
        if self._results.colours:
            return f"\033[1;32m {piece} \033[0m" if accepted else f"\033[2m {piece} \033[0m"
        return f"[{piece}]" if accepted else f" {piece} "

    def finish(self) -> None:
        """Show the grids side by side."""
        if not self._steps or self._columns is None:
            return
        width = max(*(len(title) for title, _ in self._steps), 3 * self._columns)
        across = max(1, _WIDTH // (width + 3))
        for band in range(math.ceil(len(self._steps) / across)):
            part = self._steps[band * across : (band + 1) * across]
            self._results.show("   ".join(title.ljust(width) for title, _ in part).rstrip())
            for lines in zip(*(lines for _, lines in part), strict=True):
                padding = " " * (width - 3 * self._columns)
                self._results.show("   ".join(line + padding for line in lines).rstrip())
            self._results.show("")
