"""What a dry run counts: numbers by phase, every one of them affine in the numbers of layers, and violations.

A key is a tuple: ("launches", phase), ("tflop", phase, product), ("wait", phase, kind, place),
("calls" | "gb" | "wire_gb", phase, collective, axis), ("attention", phase, kernel), ("peak_gb", phase),
("own_gb", phase), ("part_gb", phase, part). GB = 1e9 bytes.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

type Key = tuple[str, ...]
type Numbers = dict[Key, float]

_ROOTS = ("nemo_diffgemma/", "megatron/core/")
_OURSELVES = "nemo_diffgemma/dry_run/"


@dataclass
class Ledger:
    """Counts of one run. `phase` is what is being done; memory that is taken belongs to `part`."""

    phase: str = "start"
    part: str = "other"
    numbers: Counter[Key] = field(default_factory=Counter)
    violations: Counter[str] = field(default_factory=Counter)
    captured: Counter[Key] | None = None  # of the CUDA graph that is being captured
    enqueued: int = 0  # launches so far

    def add(self, name: str, *rest: str, number: float = 1) -> None:
        """Count `number` for (name, phase, *rest); while a CUDA graph is captured, for each of its replays."""
        if self.captured is not None:
            self.captured[name, *rest] += number
            return
        if name == "launches":
            self.enqueued += 1
        self.numbers[name, self.phase, *rest] += number

    def replay(self, captured: Mapping[Key, float]) -> None:
        """Count what a CUDA graph holds."""
        for (name, *rest), number in captured.items():
            self.add(name, *rest, number=number)

    def violate(self, text: str) -> None:
        """Something that must not be."""
        self.violations[text] += 1

    @contextmanager
    def doing(self, phase: str, part: str | None = None) -> Iterator[None]:
        """The block is `phase`, and its memory belongs to `part`, else to what it belonged to."""
        before = self.phase, self.part
        self.phase, self.part = phase, part or self.part
        try:
            yield
        finally:
            self.phase, self.part = before


@dataclass(frozen=True)
class Place:
    """A line of the project, or of Megatron and the line of the project that called it."""

    file: str
    function: str
    line: int
    caller: Place | None = None

    def __str__(self) -> str:
        text = f"{self.file}:{self.line} ({self.function})"
        return text if self.caller is None else f"{text} < {self.caller}"

    @property
    def names(self) -> list[str]:
        """`file:function` of the line and of its caller, as lists of what is allowed have them."""
        return [f"{self.file}:{self.function}", *([] if self.caller is None else self.caller.names)]


NOWHERE = Place("torch", "autograd", 0)


def place() -> Place:
    """Where we are: the innermost line of the project or of Megatron."""
    frame, found = sys._getframe(1), []
    while frame is not None and not (found and found[-1].file.startswith("nemo_diffgemma/")):
        name = frame.f_code.co_filename
        root = next((root for root in _ROOTS if root in name), None)
        if root is not None and _OURSELVES not in name:
            found.append(Place(name[name.rindex(root) :], frame.f_code.co_name, frame.f_lineno))
        frame = frame.f_back  # type: ignore[assignment]
    if not found:
        return NOWHERE
    ours = found[-1] if found[-1].file.startswith("nemo_diffgemma/") else None
    if ours is None or ours is found[0]:
        return found[0]
    return Place(found[0].file, found[0].function, found[0].line, ours)
