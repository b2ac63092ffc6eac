"""What a run would learn from: counts, histograms, a plot, bad rows, and one conversation as the network sees it.

show(task, statistics, results);  plot(statistics, file);  show_example(example, messages, ...)
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nemo_diffgemma.cli.output import Results, table
from nemo_diffgemma.data.bad_rows import summary
from nemo_diffgemma.data.example import Example
from nemo_diffgemma.data.tasks import Task

_SHOWN = 5  # bad rows
_BAR = 40  # characters of the longest bar
_ROLES = {"system": "35", "user": "36", "assistant": "1", "tool": "33"}  # magenta, cyan, bold, yellow
_TEMPLATE = "90"  # grey
_CANVASES = ("44", "42")  # backgrounds of every second canvas: blue, green
_END = "\033[0m"


@dataclass(frozen=True)
class Statistics:
    """Sizes of some examples of a stream: tokens, tokens of answers, canvases."""

    tokens: np.ndarray
    answer_tokens: np.ndarray
    canvases: np.ndarray

    @classmethod
    def of(cls, examples: Sequence[Example], canvas_length: int) -> Statistics:
        answers = [[end - start for start, end in example.answers] for example in examples]
        return cls(
            np.array([len(example.tokens) for example in examples]),
            np.array([sum(lengths) for lengths in answers]),
            np.array([sum(-(-length // canvas_length) for length in lengths) for lengths in answers]),
        )

    def json(self, canvas_length: int) -> dict[str, Any]:
        """Means, largest values, and what part of the canvases is fill."""
        return {
            "tokens_mean": round(float(self.tokens.mean()), 1),
            "tokens_max": int(self.tokens.max()),
            "answer_tokens_mean": round(float(self.answer_tokens.mean()), 1),
            "canvases_mean": round(float(self.canvases.mean()), 2),
            "canvases_max": int(self.canvases.max()),
            "fill": round(1 - float(self.answer_tokens.sum() / (self.canvases.sum() * canvas_length)), 4),
        }


def histogram(values: np.ndarray, title: str) -> str:
    """Bars of at most twelve bins whose edges are whole numbers."""
    low, high = int(values.min()), int(values.max())
    width = max(1, -(-(high - low + 1) // 12))
    counts = Counter(((values - low) // width).tolist())
    most = max(counts.values())
    lines = [title]
    for bin in range((high - low) // width + 1):
        begin, end = low + bin * width, min(high, low + (bin + 1) * width - 1)
        name = str(begin) if begin == end else f"{begin}-{end}"
        count = counts.get(bin, 0)
        lines.append(f"{name:>15} {'█' * max(bool(count), round(_BAR * count / most)):{_BAR}} {count}")
    return "\n".join(lines)


def show(task: Task, statistics: Statistics, results: Results) -> None:
    """Counts, notes and histograms."""
    report = task.report()
    if report is not None:
        results.show(table(["examples", ""], [[name, count] for name, count in report.examples.items()]) + "\n")
        for note, count in report.notes.items():
            results.show(f"{count} rows: {note}")
        if report.bad_rows:
            results.show(summary(report.bad_rows) + ":")
            shown = [f"  {row}" for row in report.bad_rows[:_SHOWN]] + ["  ..."] * (len(report.bad_rows) > _SHOWN)
            results.show("\n".join(shown) + "\n")
    results.show(histogram(statistics.tokens, f"tokens of an example ({len(statistics.tokens)} looked at)") + "\n")
    results.show(histogram(statistics.canvases, "canvases of an example") + "\n")


def show_example(
    example: Example, messages: Sequence[tuple[str, str]], tokenizer: Any, canvas_length: int, results: Results
) -> None:
    """Who says what in the colour of the role, and canvases on backgrounds that take turns; the template's own in grey.

    Without colours canvases stand in [1: brackets]. `messages` are (role, text), in their order.
    """
    pieces, position, number = [], 0, 0
    for start, end in example.answers:
        pieces.append((_text(tokenizer, example.tokens[position:start]), 0))
        for begin in range(start, end, canvas_length):
            number += 1
            last = min(begin + canvas_length, end)
            fill = canvas_length - (last - begin)
            text = _text(tokenizer, example.tokens[begin:last])
            pieces.append((text + (f" +{fill} fill" if fill else ""), number))
        position = end
    pieces.append((_text(tokenizer, example.tokens[position:]), 0))
    results.show(f"An example: {len(example.tokens)} tokens; its canvases of {canvas_length}: {number}")
    if not results.colours:
        results.show("".join(f"[{canvas}: {text}]" if canvas else text for text, canvas in pieces) + "\n")
        return
    whole = "".join(text for text, _ in pieces)
    canvases = [canvas for text, canvas in pieces for _ in text]
    roles = _roles(whole, canvases, messages)
    shown = [role for role in _ROLES if role in roles]
    if shown:
        results.show("roles: " + " ".join(_painted(role, role, 0) for role in shown) + "; backgrounds are canvases")
    runs = itertools.groupby(zip(whole, roles, canvases, strict=True), key=lambda letter: letter[1:])
    results.show("".join(_painted("".join(letter for letter, _, _ in run), *key) for key, run in runs) + "\n")


def _roles(text: str, canvases: Sequence[int], messages: Sequence[tuple[str, str]]) -> list[str]:
    """Of each letter who says it; "" is the template, or a message that it changes."""
    roles, position = ["assistant" if canvas else "" for canvas in canvases], 0
    for role, content in messages:
        said = re.compile(rf"(?<!\w){re.escape(content.strip())}(?!\w)")  # not inside of the template's words
        found = [match.span() for match in said.finditer(text, position)]
        answers = [span for span in found if canvases[span[0]]]
        chosen = (answers if role == "assistant" and answers else found)[:1] if content.strip() else []
        for begin, position in chosen:
            roles[begin:position] = [role] * (position - begin)
    return roles


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    if tokenizer is None:
        return " ".join(map(str, ids))
    return tokenizer.decode(list(ids), skip_special_tokens=False)


def _painted(text: str, role: str, canvas: int) -> str:
    """Line by line: a background that goes on over a line's end fills the terminal."""
    paint = f"\033[{_ROLES.get(role, _TEMPLATE)}" + (f";{_CANVASES[canvas % 2]}m" if canvas else "m")
    return "\n".join(f"{paint}{line}{_END}" if line else "" for line in text.split("\n"))


def plot(statistics: Statistics, file: Path) -> None:
    """Histograms of tokens and canvases as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    edges = np.linspace(0, int(statistics.tokens.max()) + 1, 41)
    left.hist(statistics.tokens, bins=edges, color="0.75", label="all tokens")
    left.hist(statistics.answer_tokens, bins=edges, histtype="step", linewidth=2, color="#76b900", label="of answers")
    left.legend()
    left.set(xlabel="tokens of an example", ylabel="examples")
    most = int(statistics.canvases.max())
    right.hist(statistics.canvases, bins=np.arange(0.5, most + 1.5, -(-most // 40)), color="#76b900", rwidth=0.9)
    right.set(xlabel="canvases of an example", ylabel="examples")
    for axis in (left.yaxis, right.yaxis, right.xaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
