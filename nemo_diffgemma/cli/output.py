"""Output of an entry point: results on standard output, everything else on standard error.

Only rank 0 writes to standard output, and its last line is one JSON object.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import Any


class Results:
    """The real standard output on rank 0; nothing elsewhere. Until `close` a stray `print` goes to standard error."""

    def __init__(self, rank: int) -> None:
        sys.stdout.flush()
        self._stream = os.fdopen(os.dup(1), "w") if rank == 0 else None
        self.is_rank_zero = rank == 0
        self.exit_code = 0  # set on every rank, for work that was done: 1 where a check found a difference
        self.is_terminal = self._stream is not None and self._stream.isatty()
        self.colours = self.is_terminal and "NO_COLOR" not in os.environ
        os.dup2(2, 1)

    def show(self, text: str) -> None:
        """A line or more for the reader."""
        if self._stream is not None:
            print(text, file=self._stream, flush=True)

    def close(self, result: Mapping[str, Any]) -> None:
        """The last line."""
        self.show(json.dumps(result))
        self.restore()

    def restore(self) -> None:
        """Standard output is what it was."""
        if self._stream is not None:
            sys.stdout.flush()
            os.dup2(self._stream.fileno(), 1)  # another run of a sweep may follow
            self._stream.close()


def table(header: list[str], rows: list[list[Any]]) -> str:
    """Columns under their headers, right aligned; floats as given."""
    cells = [header, *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
    )
