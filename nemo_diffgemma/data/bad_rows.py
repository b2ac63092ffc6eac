"""Rows of a data file from which there is nothing to learn: why, where, and how many of them.

They are counted, written to a file with source and line, and left out, or end the run where `data.bad_rows=fatal`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from nemo_diffgemma.errors import ConfigurationError

BAD_ROWS = "bad_rows.jsonl"
_SHOWN = 3


class RowError(Exception):
    """A row that cannot be used; `reason` is a kind that is counted, `detail` what is wrong with this one."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class BadRow:
    """A row that was left out, and why. `line` counts from 1; in Parquet and Arrow it counts rows."""

    source: str
    line: int
    reason: str
    detail: str

    def __str__(self) -> str:
        return f"{self.source}:{self.line}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


def summary(rows: Sequence[BadRow]) -> str:
    """ "3 rows left out: 2 empty answer, 1 broken JSON"; empty where there are none."""
    if not rows:
        return ""
    counts = Counter(row.reason for row in rows).most_common()
    number = f"{len(rows)} row{'s' if len(rows) > 1 else ''} left out"
    return f"{number}: " + ", ".join(f"{count} {reason}" for reason, count in counts)


def write(rows: Sequence[BadRow], file: Path) -> None:
    """One JSON object a line; no file where there are none."""
    file.unlink(missing_ok=True)
    if rows:
        file.write_text("".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def check(rows: Sequence[BadRow], policy: str, used: int, key: str) -> None:
    """Raise `ConfigurationError` where `policy` is fatal and there are bad rows, or where no row of `key` is left."""
    shown = "; ".join(map(str, rows[:_SHOWN])) + ("; ..." if len(rows) > _SHOWN else "")
    if not used:
        raise ConfigurationError(f"{key} has no row to learn from; {summary(rows)}: {shown}")
    if rows and policy == "fatal":
        raise ConfigurationError(
            f"{key}: {summary(rows)}: {shown}. Mend them, or leave them out with data.bad_rows=skip; launch/data.py "
            "lists all"
        )
