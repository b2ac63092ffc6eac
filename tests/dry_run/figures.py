"""The cases whose figures are kept, and the file that keeps them.

    python -m tests.dry_run.figures          # write tests/dry_run/expected.yaml anew, and say what has moved
    python -m tests.dry_run.figures h100     # only the cases of that GPU

A figure may move by 2 % before the file has to say so: memory, launches, waits, FLOPs and bytes cannot creep.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml

from nemo_diffgemma.cli.child_process import call_in_child
from nemo_diffgemma.dry_run.case import Case, released
from nemo_diffgemma.dry_run.driver import environment
from nemo_diffgemma.dry_run.report import as_json
from nemo_diffgemma.dry_run.whole import measure_all
from nemo_diffgemma.gpus import load_gpu
from nemo_diffgemma.lora.config import LoraGroup
from nemo_diffgemma.parallel.layout import ParallelLayout
from nemo_diffgemma.repository import CONF

EXPECTED = Path(__file__).with_name("expected.yaml")
TOLERANCE = 0.02

SINGLE, EP8, TP4_EP8 = ParallelLayout(), ParallelLayout(expert=8), ParallelLayout(tensor=4, expert=8)
TP2_EP4_ETP2 = ParallelLayout(tensor=2, expert=4, expert_tensor=2)


LORA = LoraGroup(**yaml.safe_load((CONF / "experiment" / "lora_1xh100.yaml").read_text())["model"]["lora"])
LORA_ROWS: dict[str, Any] = dict(prompts=(256,) * 3, responses=(768,) * 3)  # and a canvas of each: 3840 of 4096 tokens
PACKED: dict[str, Any] = dict(prompts=(100, 700), responses=(256, 1500))
CASES: dict[str, dict[str, Case]] = {
    "h100": {
        "train, one GPU, full recompute": released(SINGLE),
        "train, one GPU, adapters (experiment=lora_1xh100)": released(SINGLE, lora=LORA, **LORA_ROWS),
        "train, EP8, full recompute": released(EP8),
        "train, TP4xEP8, no recompute, 16 canvases": released(
            TP4_EP8, recompute="none", canvases=16, prompts=(1024,), responses=(4096,)
        ),
        "train, TP2xEP4xETP2, selective, packed rows": released(TP2_EP4_ETP2, recompute="selective", **PACKED),
        "train, TP4xEP8, rank 77 of 512": released(TP4_EP8, world=512, rank=77),
        "generate, one GPU": released(SINGLE, "generate"),
        "generate, EP8": released(EP8, "generate"),
        "generate, TP4xEP8": released(TP4_EP8, "generate"),
    },
    "b200": {
        "train, EP8, selective": released(EP8, recompute="selective"),
        "generate, TP4xEP8, two rows": released(TP4_EP8, "generate", prompts=(1500, 700), responses=(1, 1)),
    },
    "rtx_5090": {
        "train, TP4xEP8, packed rows": released(TP4_EP8, **PACKED),
        "generate, TP2xEP4xETP2": released(TP2_EP4_ETP2, "generate"),
    },
}


def measured(gpu: str) -> dict[str, dict[str, Any]]:
    """The JSON line of each case of a GPU, with what each phase holds of its own."""
    results, _ = call_in_child(measure_all, CASES[gpu], environment=environment(load_gpu(gpu)))
    found = {name: as_json(CASES[gpu][name], result) for name, result in results.items()}
    for name, result in results.items():
        for phase, figures in found[name]["phases"].items():
            figures["own_gb"] = round(result.sum("own_gb", phase), 4)
    return found


def read() -> dict[str, dict[str, dict[str, Any]]]:
    """What is expected, by GPU and case."""
    return yaml.safe_load(EXPECTED.read_text()) if EXPECTED.exists() else {}


def moved(expected: Any, found: Any, name: str = "") -> list[str]:
    """What differs, figures by more than the tolerance."""
    if isinstance(expected, dict) and isinstance(found, dict):
        return [
            line
            for key in dict.fromkeys([*expected, *found])
            for line in moved(expected.get(key), found.get(key), f"{name} {key}".strip())
        ]
    if isinstance(expected, int | float) and isinstance(found, int | float):
        same = abs(found - expected) <= TOLERANCE * abs(expected) + 5e-5  # the last digit that is written
    else:
        same = expected == found
    return [] if same else [f"{name}: {expected} -> {found}"]


def main() -> None:
    expected = read()
    for gpu in sys.argv[1:] or CASES:
        found = measured(gpu)
        print(*moved(expected.get(gpu, {}), found, gpu), sep="\n")
        expected[gpu] = found
        _write(expected)


def _write(expected: dict[str, Any]) -> None:
    header = "# Written by `python -m tests.dry_run.figures`: what a dry run finds, by GPU and case.\n"
    EXPECTED.write_text(header + yaml.safe_dump(expected, sort_keys=False, width=120))


if __name__ == "__main__":
    main()
