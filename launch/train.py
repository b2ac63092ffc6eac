"""Train or fine-tune.

    python launch/train.py experiment=sudoku_cpu                               # what `make demo` trains
    python launch/train.py experiment=sudoku_cpu trainer.max_steps=20 seed=1 exp_manager.exp_dir=/tmp/runs
    python launch/train.py model=tiny parallel=tp2_ep2 data.global_batch_size=8
    python launch/train.py model=diffusiongemma_26b_a4b model.checkpoint=<directory> optim=finetune parallel=tp4_ep8
    python launch/train.py experiment=lora_1xh100 model.checkpoint=<directory> data.train=[a.jsonl]
    python launch/train.py experiment=sudoku_cpu exp_manager.version=mine      # again: continues runs/sudoku_cpu/mine

The number of processes follows from parallel.*; they are started here unless torchrun or srun has done so.
Results go to exp_dir/name/version; the last line of standard output is JSON: run_dir, checkpoint, step, loss.
SIGUSR1 and SIGTERM end it after the step with a checkpoint and exit code 85.
What every key means: nemo_diffgemma/schema.py.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nemo_diffgemma.training import signals

if "SLURM_PROCID" in os.environ:  # the imports take ten seconds, in which a signal would end a rank of a job
    signals.REQUEST.listen()

from nemo_diffgemma.cli.output import Results
from nemo_diffgemma.cli.start import start
from nemo_diffgemma.schema import TrainConfig


def train(config: TrainConfig, results: Results) -> dict[str, Any]:
    """Train; everything else is in the run directory."""
    from nemo_diffgemma.training import run  # NeMo: ten seconds

    done = run.train(config, config.exp_manager.run_dir)
    results.exit_code = done.exit_code
    return done.json()


if __name__ == "__main__":
    start(train, TrainConfig, "config", distributed=True)
