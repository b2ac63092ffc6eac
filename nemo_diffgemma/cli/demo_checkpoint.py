"""The model of `make demo`, which other demos start from."""

from __future__ import annotations

import json
import subprocess
import sys

from nemo_diffgemma.cli.output import Results
from nemo_diffgemma.repository import ROOT, user_path

RUNS = "runs/sudoku_cpu"


def demo_checkpoint(given: str | None, results: Results, steps: int) -> str:
    """`given`, else the last checkpoint of the newest run of the demo, else that of a run of `steps`, made now."""
    checkpoints = list(user_path(RUNS).glob("*/checkpoints/step-*"))
    if given or checkpoints:
        return given or str(max(checkpoints, key=lambda place: (place.stat().st_mtime, place.name)))
    arguments = ["experiment=sudoku_cpu", f"trainer.max_steps={steps}", "trainer.validate_every=0"]
    results.show(f"no checkpoint under {RUNS}; training a short one:")
    results.show(f"$ python launch/train.py {' '.join(arguments)}")
    command = [sys.executable, str(ROOT / "launch" / "train.py"), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)  # progress goes to standard error
    if done.returncode:
        raise SystemExit(done.returncode)  # it has said why
    last = done.stdout.splitlines()[-1]
    results.show(last + "\n")
    return json.loads(last)["checkpoint"]
