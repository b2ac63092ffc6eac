"""What a run would learn from: counts, histograms, a plot, bad rows, and one conversation as the network sees it.

show_report(task, canvas_length, results);  plot(statistics, file);  show_example(example, ...)
"""

from __future__ import annotations

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
_CONTEXT, _CANVAS = "\033[2m", ("\033[30;42m", "\033[30;46m", "\033[30;43m", "\033[30;45m")
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
            shown = report.bad_rows[:5]
            results.show(
                "\n".join(f"  {row}" for row in shown) + ("\n  ..." if len(report.bad_rows) > 5 else "") + "\n"
            )
    results.show(histogram(statistics.tokens, f"tokens of an example ({len(statistics.tokens)} looked at)") + "\n")
    results.show(histogram(statistics.canvases, "canvases of an example") + "\n")


def show_example(example: Example, tokenizer: Any, canvas_length: int, results: Results) -> None:
    """Context in grey and each canvas in a colour of its own; without colours canvases stand in [1: brackets]."""
    pieces, position, number = [], 0, 0
    for start, end in example.answers:
        pieces.append(_painted(_text(tokenizer, example.tokens[position:start]), None, results.colours))
        for begin in range(start, end, canvas_length):
            number += 1
            last = min(begin + canvas_length, end)
            text = _text(tokenizer, example.tokens[begin:last])
            fill = canvas_length - (last - begin)
            pieces.append(_painted(text + (f" +{fill} fill" if fill else ""), number, results.colours))
        position = end
    pieces.append(_painted(_text(tokenizer, example.tokens[position:]), None, results.colours))
    results.show(f"An example: {len(example.tokens)} tokens; its canvases of {canvas_length}: {number}")
    results.show("".join(pieces) + "\n")


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    if tokenizer is None:
        return " ".join(map(str, ids))
    return tokenizer.decode(list(ids), skip_special_tokens=False)


def _painted(text: str, canvas: int | None, colours: bool) -> str:
    if not colours:
        return text if canvas is None else f"[{canvas}: {text}]"
    paint = _CONTEXT if canvas is None else _CANVAS[canvas % len(_CANVAS)]
    return "\n".join(f"{paint}{line}{_END}" if line else "" for line in text.split("\n"))


def plot(statistics: Statistics, file: Path) -> None:
    """Histograms of tokens and canvases as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.hist([statistics.tokens, statistics.answer_tokens], bins=40, color=["0.6", "#76b900"])
    left.legend(["all tokens", "tokens of answers"])
    left.set(xlabel="tokens", ylabel="examples")
    most = int(statistics.canvases.max())
    right.hist(statistics.canvases, bins=np.arange(0.5, most + 1.5, max(1, most // 40)), color="#76b900")
    right.set(xlabel="canvases", ylabel="examples")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
