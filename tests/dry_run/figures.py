"""The cases whose figures are kept, and the file that keeps them.

    python -m tests.dry_run.figures          # write tests/dry_run/expected.yaml anew, and say what has moved
    python -m tests.dry_run.figures h100     # only the cases of that GPU

A figure may move by 2 % before the file has to say so: memory, launches, waits, FLOPs and bytes cannot creep.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import yaml

from nemo_diffgemma.cli.child_process import call_in_child
from nemo_diffgemma.dry_run.case import Case
from nemo_diffgemma.dry_run.driver import environment
from nemo_diffgemma.dry_run.report import as_json
from nemo_diffgemma.dry_run.whole import measure_all
from nemo_diffgemma.gpus import load_gpu
from nemo_diffgemma.parallel.layout import ParallelLayout
from nemo_diffgemma.repository import CONF
from nemo_diffgemma.schema import ModelGroup, OptimGroup

EXPECTED = Path(__file__).with_name("expected.yaml")
TOLERANCE = 0.02

SINGLE, EP8, TP4_EP8 = ParallelLayout(), ParallelLayout(expert=8), ParallelLayout(tensor=4, expert=8)
TP2_EP4_ETP2 = ParallelLayout(tensor=2, expert=4, expert_tensor=2)


def case(layout: ParallelLayout, verb: str = "train", recompute: str = "full", canvases: int = 1, **more: Any) -> Case:
    """The released network; by default one row, prompt 256 and response 768, or prompt 1024 to generate."""
    model = ModelGroup(**yaml.safe_load((CONF / "model" / "diffusiongemma_26b_a4b.yaml").read_text()))
    model.recompute, model.objective.canvases_per_example = recompute, canvases
    plain = Case(
        verb=verb,
        model=model,
        optim=OptimGroup(),
        layout=layout,
        world=layout.world_size,
        rank=0,
        prompts=(256,) if verb == "train" else (1024,),
        responses=(768,),
    )
    return dataclasses.replace(plain, **more)


PACKED = dict(prompts=(100, 700), responses=(256, 1500))
CASES: dict[str, dict[str, Case]] = {
    "h100": {
        "train, one GPU, full recompute": case(SINGLE),
        "train, EP8, full recompute": case(EP8),
        "train, TP4xEP8, no recompute, 16 canvases": case(
            TP4_EP8, recompute="none", canvases=16, prompts=(1024,), responses=(4096,)
        ),
        "train, TP2xEP4xETP2, selective, packed rows": case(TP2_EP4_ETP2, recompute="selective", **PACKED),
        "train, TP4xEP8, rank 77 of 512": case(TP4_EP8, world=512, rank=77),
        "generate, one GPU": case(SINGLE, "generate"),
        "generate, TP4xEP8": case(TP4_EP8, "generate"),
    },
    "b200": {
        "train, EP8, selective": case(EP8, recompute="selective"),
        "generate, EP8, two rows": case(EP8, "generate", prompts=(1500, 700), responses=(1, 1)),
    },
    "rtx_5090": {
        "train, TP4xEP8, packed rows": case(TP4_EP8, **PACKED),
        "generate, TP2xEP4xETP2": case(TP2_EP4_ETP2, "generate"),
    },
}


def measured(gpu: str) -> dict[str, dict[str, Any]]:
    """The JSON line of each case of a GPU."""
    results, _ = call_in_child(measure_all, CASES[gpu], environment=environment(load_gpu(gpu)))
    return {name: as_json(CASES[gpu][name], result) for name, result in results.items()}


def read() -> dict[str, dict[str, dict[str, Any]]]:
    """What is expected, by GPU and case."""
    return yaml.safe_load(EXPECTED.read_text()) if EXPECTED.exists() else {}


def moved(expected: dict[str, Any], found: dict[str, Any], name: str = "") -> list[str]:
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
    header = "# Written by `python -m tests.dry_run.figures`: what a dry run finds, by GPU and case.\n"
    EXPECTED.write_text(header + yaml.safe_dump(expected, sort_keys=False, width=120))


if __name__ == "__main__":
    main()
