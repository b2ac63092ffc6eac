"""What a dry run counts: numbers by phase, every one of them affine in the numbers of layers, and violations.

A key is a tuple: ("launches", phase), ("tflop", phase, product), ("wait", phase, kind, place),
("calls" | "gb" | "wire_gb", phase, collective, axis), ("attention", phase, kernel), ("peak_gb", phase),
("own_gb", phase), ("part_gb" | "before_gb", phase, part): at the peak of a phase, and when it began. GB = 1e9 bytes.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

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
    attention_calls: int = 0  # of kernels of attention, so far

    def add(self, name: str, *rest: str, number: float = 1) -> None:
        """Count `number` for (name, phase, *rest); while a CUDA graph is captured, for each of its replays."""
        if self.captured is not None:
            self.captured[name, *rest] += number  # type: ignore[assignment]  # typeshed: whole numbers only
            return
        if name == "launches":
            self.enqueued += 1
        self.numbers[name, self.phase, *rest] += number  # type: ignore[assignment]

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
    """A line of the project, or one of Megatron and the line of the project that led there.

    `functions` are `file:function` of all lines of both on the stack, the innermost first.
    """

    text: str
    functions: tuple[str, ...] = field(compare=False)

    def __str__(self) -> str:
        return self.text

    def is_among(self, allowed: Mapping[str, str]) -> bool:
        """Whether a list has the innermost function, or `function < caller` for it and one further out."""
        if not self.functions:
            return False
        inner, *callers = self.functions
        return inner in allowed or any(f"{inner} < {caller}" in allowed for caller in callers)


def place() -> Place:
    """Where we are. Operations of autograd have no line."""
    frame: FrameType | None = sys._getframe(1)
    lines: list[str] = []
    functions: list[str] = []
    while frame is not None:
        name = frame.f_code.co_filename
        root = next((root for root in _ROOTS if root in name), None)
        if root is not None and _OURSELVES not in name:
            file = name[name.rindex(root) :]
            functions.append(f"{file}:{frame.f_code.co_name}")
            if not lines or (root == _ROOTS[0] and len(lines) == 1 and not lines[0].startswith(root)):
                lines.append(f"{file}:{frame.f_lineno} ({frame.f_code.co_name})")
        frame = frame.f_back
    return Place(" < ".join(lines) or "torch (autograd)", tuple(functions))
