"""The result of a dry run as tables for a reader and as JSON."""

from __future__ import annotations

from typing import Any

from nemo_diffgemma.cli.output import table
from nemo_diffgemma.dry_run.case import Case, Measured

BLIND = """\
What this cannot see: values (what has none reads 1.0, 0 or False) and unbalanced routing (experts get equal shares);
the CUDA context, cuBLAS, NCCL, workspaces inside of kernels and fragmentation of memory; how long anything takes, and
whether a kernel refuses its inputs when it runs. An operation counts as one launch, a product of groups too. Compiled
functions count as if they were not; FlexAttention, which needs Triton, as one launch forward and two backward, with
the FLOPs of the blocks that it visits. A CUDA graph counts at every replay what it holds. Not played: Lightning,
checkpoints, data, the other ranks."""


def as_json(case: Case, measured: Measured) -> dict[str, Any]:
    """The last line of the command."""
    phases = {
        phase: {
            "peak_gb": round(measured.numbers["peak_gb", phase], 4),
            "launches": round(measured.sum("launches", phase)),
            "waits": round(measured.sum("waits", phase)),
            "tflop": round(measured.sum("tflop", phase), 4),
            "wire_gb": round(measured.sum("wire_gb", phase), 4),
        }
        for phase in measured.phases
    }
    return {
        "verb": case.verb,
        "world": case.world,
        "rank": case.rank,
        "peak_gb": max((values["peak_gb"] for values in phases.values()), default=0.0),
        "phases": phases,
        "violations": sorted(measured.violations),
    }


def tables(case: Case, measured: Measured) -> str:
    """Everything that was counted, one table below the other."""
    parts = [
        ("by phase", _by_phase(measured)),
        ("memory at the peak of each phase, GB by part", _by_part(measured)),
        ("FLOPs, TFLOP", _sums(measured, "tflop", "product", 3)),
        ("attention", _sums(measured, "attention", "kernel", 0)),
        ("collectives", _collectives(measured)),
        ("waits of the host", _waits(measured)),
        ("largest temporaries", _largest(measured)),
    ]
    shown = [f"{title}\n{text}" for title, text in parts if text]
    return "\n\n".join([*shown, BLIND])


def _by_phase(measured: Measured) -> str:
    names = ("peak_gb", "own_gb", "launches", "waits", "tflop", "wire_gb")
    rows = []
    for phase in measured.phases:
        values = ((name, measured.sum(name, phase)) for name in names)
        rows.append([phase, *(f"{n:,.0f}" if name in ("launches", "waits") else f"{n:,.2f}" for name, n in values)])
    return table(["phase", "peak GB", "own GB", "launches", "waits", "TFLOP", "wire GB"], rows)


def _by_part(measured: Measured) -> str:
    parts = list(dict.fromkeys(key[2] for key in measured.numbers if key[0] == "part_gb"))
    rows = [
        [phase, *(f"{measured.numbers.get(('part_gb', phase, part), 0.0):.2f}" for part in parts)]
        for phase in measured.phases
    ]
    return table(["phase", *parts], rows)


def _sums(measured: Measured, name: str, what: str, digits: int) -> str:
    rows = [
        [key[1], key[2], f"{number:,.{digits}f}"]
        for key, number in measured.numbers.items()
        if key[0] == name and round(number, digits)
    ]
    return table(["phase", what, "calls" if name == "attention" else name], rows) if rows else ""


def _collectives(measured: Measured) -> str:
    rows = []
    for key, calls in measured.numbers.items():
        if key[0] == "calls" and round(calls):
            _, phase, name, axis = key
            sizes = [measured.numbers.get((unit, phase, name, axis), 0.0) for unit in ("gb", "wire_gb")]
            rows.append([phase, name, axis, f"{calls:,.0f}", *(f"{size:.4f}" for size in sizes)])
    return table(["phase", "collective", "axis", "calls", "GB", "GB sent"], rows) if rows else ""


def _waits(measured: Measured) -> str:
    rows = [
        [key[1], f"{number:,.0f}", key[2], key[3]]
        for key, number in measured.numbers.items()
        if key[0] == "wait" and round(number)
    ]
    return table(["phase", "times", "kind", "line"], rows) if rows else ""


def _largest(measured: Measured) -> str:
    largest = sorted(measured.largest.items(), key=lambda item: -item[1])
    rows = [[phase, f"{size / 1e9:.2f}", line] for (phase, line), size in largest[:12]]
    return table(["phase", "GB", "line"], rows) if rows else ""
