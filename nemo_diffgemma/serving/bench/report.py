"""Figures of a load: of all its requests, as JSON, as a row of a table and as points of a plot.

K is denoising steps a canvas, as far as it was told; a forward is a step of one canvas. A canvas's tokens come at once:
what elsewhere is the time to the first token is here that to the first canvas. Of requests that failed nothing counts
but that they did.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nemo_diffgemma.serving.bench.client import Record
from nemo_diffgemma.serving.bench.load import Load

_PERCENTILES = (50, 90, 99)


def figures(load: Load, records: Sequence[Record]) -> dict[str, Any]:
    """What a load was and what came of it."""
    answered = [record for record in records if record.error is None]
    seconds = max(record.ended for record in records) - min(record.began for record in records)
    total = {
        name: sum(getattr(one, name) for one in answered)
        for name in ("tokens", "steps", "prompt_tokens", "cached_tokens")
    }
    canvases = sum(len(one.canvases) for one in answered)
    between = [end - begin for one in answered for begin, end in itertools.pairwise(one.canvases)]
    return {
        "load": "closed" if load.rate is None else "open",
        "concurrency": load.concurrency,
        "rate": load.rate,
        "requests": len(records),
        "answered": len(answered),
        "errors": dict(Counter(record.error for record in records if record.error is not None)),
        "refused": sum(record.refused for record in records),
        "seconds": round(seconds, 3),
        "canvases": canvases,
        **total,
        "K": _ratio(total["steps"], canvases),
        "tokens_per_forward": _ratio(total["tokens"], total["steps"]),
        "tokens_per_second": _ratio(total["tokens"], seconds),
        "tokens_per_second_of_one": _median([one.tokens / one.seconds for one in answered]),
        "first_canvas_s": percentiles([one.canvases[0] - one.began for one in answered if one.canvases]),
        "between_canvases_s": percentiles(between),
        "latency_s": percentiles([one.seconds for one in answered]),
    }


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """None of no values."""
    if not values:
        return None
    return {f"p{p}": round(float(np.percentile(values, p)), 4) for p in _PERCENTILES}


def _ratio(a: float, b: float) -> float | None:
    return round(a / b, 3) if b else None


def _median(values: Sequence[float]) -> float | None:
    return round(float(np.median(values)), 3) if values else None


def show(rows: Sequence[dict[str, Any]], loads: Sequence[Load], width: int | None) -> str:
    """A table, a row a load; seconds as their median / 90th / 99th percentile."""
    from rich.console import Console
    from rich.table import Table

    table = Table(header_style="bold")
    heads = ("load", "answered", "429", "K", "tokens/forward", "tokens/s", "tokens/s of one")
    for head in (*heads, "first canvas, s", "between canvases, s", "latency, s"):
        table.add_column(head, justify="right")
    for row, load in zip(rows, loads, strict=True):
        numbers = ("K", "tokens_per_forward", "tokens_per_second", "tokens_per_second_of_one")
        times = ("first_canvas_s", "between_canvases_s", "latency_s")
        counts = [f"{row['answered']}/{row['requests']}", str(row["refused"])]
        table.add_row(
            load.name, *counts, *(_number(row[name]) for name in numbers), *(_times(row[name]) for name in times)
        )
    console = Console(width=width or 160, color_system="standard" if width else None, force_terminal=bool(width))
    with console.capture() as captured:
        console.print(table)
    return captured.get().rstrip()


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _times(value: dict[str, float] | None) -> str:
    return "-" if value is None else " / ".join(f"{seconds:.3g}" for seconds in value.values())


def plot(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Tokens a second and latencies by concurrency, and by rate where there was an open load."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = [(name, [row for row in rows if row[name] is not None]) for name in ("concurrency", "rate")]
    kinds = [(name, sorted(some, key=lambda row: row[name])) for name, some in kinds if some]
    figure, axes = pyplot.subplots(len(kinds), 2, figsize=(10, 4 * len(kinds)), squeeze=False, layout="constrained")
    for (name, some), (left, right) in zip(kinds, axes, strict=True):
        x = [row[name] for row in some]
        label = "requests at a time" if name == "concurrency" else "requests a second"
        values = lambda name, some=some: [row[name] if row[name] is not None else np.nan for row in some]
        left.plot(x, values("tokens_per_second"), "o-", color="#76b900", label="all")
        left.plot(x, values("tokens_per_second_of_one"), "o-", color="0.4", label="one request")
        left.set(xlabel=label, ylabel="tokens a second", ylim=(0, None))
        for key, text, colour in (("first_canvas_s", "first canvas", "#76b900"), ("latency_s", "whole answer", "0.4")):
            for percentile, style in (("p50", "o-"), ("p99", "o:")):
                y = [row[key][percentile] if row[key] else np.nan for row in some]
                right.plot(x, y, style, color=colour, label=f"{text}, {percentile}")
        right.set(xlabel=label, ylabel="seconds", ylim=(0, None))
        for axis in (left, right):
            axis.legend()
            if name == "concurrency":  # 1, 2, 4, ... stand equally far apart
                axis.set_xscale("log", base=2)
                axis.set_xticks(x, map(str, x))
                axis.minorticks_off()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
