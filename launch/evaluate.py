"""Evaluate a checkpoint on held-out data: canvas loss by noise level, bits a token, answers, puzzles solved.

    python launch/evaluate.py checkpoint=runs/sudoku_cpu/mine/checkpoints/step-1300
    python launch/evaluate.py checkpoint=... parallel=tp2_ep2 steps=[4,16] data.test_puzzles=100
    python launch/evaluate.py checkpoint=... data=chat data.validation=[held_out.jsonl] samples=20

The last line is JSON: canvas_loss by noise level (nats a token), bits_per_token (an upper bound), and what the task of
the data measures; of Sudoku solve_rate by number of denoising steps, and tokens_per_forward with the most steps. With
`samples`, so many held-out questions are answered and written beside their references, as JSON Lines: samples.file,
samples.count, and samples.exact_match, the share that is right (null where nobody can say).
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
from nemo_diffgemma.diffusion.objective import PREDICTIONS
from nemo_diffgemma.repository import user_path
from nemo_diffgemma.schema import BUDGETS, LEVELS, ClusterGroup, ConfigurationError, ParallelGroup


@dataclass
class EvaluateConfig:
    """Configuration of `launch/evaluate.py`."""

    checkpoint: str = MISSING  # Hugging Face directory, sharded checkpoint, .nemo, or an adapter: with its base
    weights: str = "trained"  # ema: the average that a run with optim.ema has kept
    data: DataGroup = field(default_factory=default_data)
    levels: list[float] = field(default_factory=lambda: list(LEVELS))  # share of replaced tokens
    steps: list[int] = field(default_factory=lambda: list(BUDGETS))  # budgets of denoising steps
    batch_size: int = 400  # prompts generated at a time
    examples: int | None = None  # held-out ones for losses and bits; null: all
    samples: int = 0  # held-out questions that are answered
    out: str = "runs/evaluate"  # folder for samples.jsonl
    prediction: str = "denoiser"  # or leave_one_out, of networks that were trained with model.objective.prediction
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
        if self.samples < 0 or (self.examples is not None and self.examples < 1):
            raise ConfigurationError(
                f"samples={self.samples}, examples={self.examples}; expected 0 or more, and at least 1 or null"
            )
        if self.prediction not in PREDICTIONS:
            raise ConfigurationError(f"prediction={self.prediction!r}; use one of {', '.join(PREDICTIONS)}")


def evaluate(config: EvaluateConfig, results: Results) -> dict[str, Any]:
    """Evaluate one checkpoint."""
    from nemo_diffgemma import DiffusionGemma
    from nemo_diffgemma.checkpoint import average
    from nemo_diffgemma.checkpoint.open import dtype_of
    from nemo_diffgemma.cli.measures_view import bits, measure, write_samples
    from nemo_diffgemma.evaluation.measures import held_out_rows

    task = task_of(config.data)
    if config.weights not in average.WEIGHTS:
        raise ConfigurationError(f"weights={config.weights!r}; use one of {', '.join(average.WEIGHTS)}")
    network = DiffusionGemma.from_checkpoint(config.checkpoint, dtype_of(config.dtype))
    if config.weights == "ema":
        average.fill(network, user_path(config.checkpoint))
    task.open(network.assets)
    task.prepare(network.model_config)
    rows = held_out_rows(task, network.model_config, config.examples)
    found = measure(
        network,
        task,
        rows,
        config.levels,
        config.steps,
        results,
        config.batch_size,
        seed=config.seed,
        prediction=config.prediction,
    )
    found["bits_per_token"] = bits(network, rows, results, seed=config.seed, prediction=config.prediction)
    if config.samples:
        file = user_path(config.out) / "samples.jsonl"
        found["samples"] = write_samples(network, task, config.samples, file, config.seed, results, config.batch_size)
    return found


if __name__ == "__main__":
    start(evaluate, EvaluateConfig, "evaluate", distributed=True)
