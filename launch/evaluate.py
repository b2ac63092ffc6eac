"""Evaluate a checkpoint on held-out data: canvas loss at fixed noise levels, and the share of puzzles solved.

    python launch/evaluate.py checkpoint=runs/sudoku_cpu/mine/checkpoints/step-1300
    python launch/evaluate.py checkpoint=... parallel=tp2_ep2 steps=[4,16] data.test_puzzles=100

The last line is JSON: canvas_loss by noise level (nats a token), and what the task of the data measures; of Sudoku
solve_rate by number of denoising steps, and tokens_per_forward with the most steps.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from omegaconf import MISSING

from nemo_diffgemma.cli.output import Results
from nemo_diffgemma.cli.start import start
from nemo_diffgemma.data.tasks import DataGroup, default_data, task_of
from nemo_diffgemma.schema import BUDGETS, LEVELS, ClusterGroup, ConfigurationError, ParallelGroup


@dataclass
class EvaluateConfig:
    """Configuration of `launch/evaluate.py`."""

    checkpoint: str = MISSING  # Hugging Face directory, sharded checkpoint or .nemo
    data: DataGroup = field(default_factory=default_data)
    levels: list[float] = field(default_factory=lambda: list(LEVELS))  # share of replaced tokens
    steps: list[int] = field(default_factory=lambda: list(BUDGETS))  # budgets of denoising steps
    batch_size: int = 400  # prompts generated at a time
    seed: int = 0
    dtype: str = "float32"  # or bfloat16
    parallel: ParallelGroup = field(default_factory=ParallelGroup)
    cluster: ClusterGroup = field(default_factory=ClusterGroup)
    dry_run: bool = False  # show the script of a cluster, submit nothing

    def __post_init__(self) -> None:
        if not all(0 <= level <= 1 for level in self.levels):
            raise ConfigurationError(f"levels={self.levels}; expected numbers from 0 to 1")
        if not self.levels or not self.steps:
            raise ConfigurationError(f"levels={self.levels}, steps={self.steps}; expected at least one of each")
        if not all(steps >= 1 for steps in self.steps) or self.batch_size < 1:
            raise ConfigurationError(f"steps={self.steps}, batch_size={self.batch_size}; expected at least 1")


def evaluate(config: EvaluateConfig, results: Results) -> dict[str, Any]:
    """Evaluate one checkpoint."""
    from nemo_diffgemma import DiffusionGemma
    from nemo_diffgemma.checkpoint.open import dtype_of
    from nemo_diffgemma.cli.measures_view import measure

    task = task_of(config.data)
    network = DiffusionGemma.from_checkpoint(config.checkpoint, dtype_of(config.dtype))
    task.open(network.assets)
    task.prepare(network.model_config)
    return measure(network, task, config.levels, config.steps, config.seed, results, config.batch_size)


if __name__ == "__main__":
    start(evaluate, EvaluateConfig, "evaluate", distributed=True)
