"""Jobs for the pool of ranks: small training runs and what is asked of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ARCHITECTURE: dict[str, Any] = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_global_key_value_heads=2,
    global_head_dim=16,
    num_experts=8,
    top_k_experts=2,
    moe_intermediate_size=16,
    sliding_window=16,
    canvas_length=16,
    layer_types=["sliding_attention", "full_attention"],
)


def config(steps: int = 4, every: int = 0, layout: dict | None = None, **keys: Any) -> Any:
    """A tiny Sudoku run; `keys` are dotted, as `optim.lr` with `__` for the dot."""
    from nemo_diffgemma.training.schema import TrainConfig

    made = TrainConfig()
    made.model.architecture = dict(ARCHITECTURE)
    made.data.global_batch_size = 8
    made.data.test_puzzles = 8
    made.optim.lr = 1e-2
    made.optim.weight_decay = 0.01
    made.optim.warmup_steps = 2
    made.trainer.max_steps = steps
    made.trainer.checkpoint_every = every
    made.trainer.threads = 1
    made.trainer.progress = False
    made.exp_manager.tensorboard = False
    for axis, size in (layout or {}).items():
        setattr(made.parallel, axis, size)
    for name, value in keys.items():
        group, _, key = name.rpartition("__")
        setattr(getattr(made, group) if group else made, key, value)
    return made


def run(directory: str, **settings: Any) -> list[dict[str, Any]]:
    """Train and return the lines of the metrics file."""
    from nemo_diffgemma.training.run import train

    result = train(config(**settings), directory)
    lines = [json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text().splitlines()]
    assert result.step == settings.get("steps", 4) and result.loss == lines[-1]["loss"]
    return lines
