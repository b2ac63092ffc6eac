"""Show a network's measures on its task as tables and as JSON; `evaluate` and `demo` share this."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nemo_diffgemma.cli.output import Results, table
from nemo_diffgemma.data.tasks import Task
from nemo_diffgemma.evaluation.measures import canvas_losses, held_out_rows


def measure(
    network: Any,
    task: Task,
    levels: Sequence[float],
    budgets: Sequence[int],
    seed: int,
    results: Results,
    batch_size: int = 400,
) -> dict[str, Any]:
    """`canvas_loss` by noise level, and what the task measures by budget of denoising steps. Collective."""
    losses = canvas_losses(network, held_out_rows(task, network.model_config), levels, seed)
    results.show(table(["noise", "canvas loss"], [[level, f"{loss:.4f}"] for level, loss in losses.items()]) + "\n")
    measures = task.measures(network, budgets, seed, batch_size)
    if measures.header:
        results.show(f"{measures.title}\n{table(measures.header, measures.rows)}\n")
    return {"canvas_loss": {str(level): loss for level, loss in losses.items()}, **measures.values}
