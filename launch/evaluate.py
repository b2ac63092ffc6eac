"""Evaluate a checkpoint on held-out data: canvas loss at fixed noise levels, and the share of puzzles solved.

    python launch/evaluate.py checkpoint=runs/sudoku_cpu/mine/checkpoints/step-1300
    python launch/evaluate.py checkpoint=... parallel=tp2_ep2 steps=[4,16] data.test_puzzles=100

The last line is JSON: canvas_loss by noise level (nats a token), solve_rate by number of denoising steps, and
tokens_per_forward with the most steps.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from omegaconf import MISSING

from nemo_diffgemma.cli.output import Results, table
from nemo_diffgemma.cli.processes import launch
from nemo_diffgemma.schema import BUDGETS, LEVELS, ClusterGroup, ConfigurationError, DataGroup, ParallelGroup


@dataclass
class EvaluateConfig:
    """What `launch/evaluate.py` reads."""

    checkpoint: str = MISSING  # Hugging Face directory, sharded checkpoint or .nemo
    data: DataGroup = field(default_factory=DataGroup)
    levels: list[float] = field(default_factory=lambda: list(LEVELS))  # share of replaced tokens
    steps: list[int] = field(default_factory=lambda: list(BUDGETS))  # budgets of denoising steps
    batch_size: int = 400  # puzzles generated at a time
    seed: int = 0
    dtype: str = "float32"  # or bfloat16
    parallel: ParallelGroup = field(default_factory=ParallelGroup)
    cluster: ClusterGroup = field(default_factory=ClusterGroup)
    dry_run: bool = False  # show the script of a cluster, submit nothing

    def __post_init__(self) -> None:
        if not all(0 <= level <= 1 for level in self.levels):
            raise ConfigurationError(f"levels={self.levels}; expected numbers from 0 to 1")
        if not all(steps >= 1 for steps in self.steps) or self.batch_size < 1:
            raise ConfigurationError(f"steps={self.steps}, batch_size={self.batch_size}; expected at least 1")


def evaluate(config: EvaluateConfig, results: Results) -> dict[str, Any]:
    """Evaluate one checkpoint."""
    from nemo_diffgemma.checkpoint.contents import open_network

    network = open_network(config.checkpoint, config.dtype)
    return {
        "canvas_loss": canvas_loss(network, config.data, config.levels, config.seed, results),
        **solve_rates(network, config.data, config.steps, config.seed, results, config.batch_size),
    }


def canvas_loss(
    network: Any, data: DataGroup, levels: Sequence[float], seed: int, results: Results
) -> dict[str, float]:
    """By noise level, also shown as a table."""
    from nemo_diffgemma.evaluation.measures import canvas_losses, held_out_rows

    losses = canvas_losses(network, held_out_rows(data, network.model), levels, seed)
    results.show(table(["noise", "canvas loss"], [[level, f"{loss:.4f}"] for level, loss in losses.items()]) + "\n")
    return {str(level): loss for level, loss in losses.items()}


def solve_rates(
    network: Any, data: DataGroup, steps: Sequence[int], seed: int, results: Results, batch: int = 400
) -> dict[str, Any]:
    """`solve_rate` by number of steps and `tokens_per_forward` with the most, also shown as a table."""
    from nemo_diffgemma.data import tasks
    from nemo_diffgemma.evaluation.measures import sudoku_solve_rate

    puzzles = [puzzle for puzzle, _ in tasks.sudoku_task(data).test_set]
    found = {budget: sudoku_solve_rate(network, puzzles, budget, seed, batch) for budget in sorted(steps)}
    rows = [[budget, f"{rate:.4f}", f"{per_forward:.2f}"] for budget, (rate, per_forward) in found.items()]
    results.show(f"{len(puzzles)} held-out puzzles\n{table(['steps', 'solved', 'tokens/forward'], rows)}\n")
    return {
        "solve_rate": {str(budget): rate for budget, (rate, _) in found.items()},
        "tokens_per_forward": found[max(found)].tokens_per_forward,
    }


if __name__ == "__main__":
    launch(evaluate, EvaluateConfig, "evaluate")
