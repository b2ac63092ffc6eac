"""Show a network's measures on its task as tables and as JSON; `evaluate` and `demo` share this. Collective."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_diffgemma.cli.output import Results, table
from nemo_diffgemma.data.tasks import Task
from nemo_diffgemma.diffusion.rows import Rows
from nemo_diffgemma.evaluation.likelihood import bits_per_token
from nemo_diffgemma.evaluation.measures import canvas_losses
from nemo_diffgemma.evaluation.samples import answers
from nemo_diffgemma.parallel.agreement import on_rank_zero
from nemo_diffgemma.tokenizer import Text


def measure(
    network: Any,
    task: Task,
    rows: Rows,
    levels: Sequence[float],
    budgets: Sequence[int],
    results: Results,
    batch_size: int = 400,
    *,
    seed: int,
    prediction: str = "denoiser",
) -> dict[str, Any]:
    """`canvas_loss` of held-out rows by noise level, and what the task measures by budget of denoising steps."""
    losses = canvas_losses(network, rows, levels, seed, prediction)
    results.show(table(["noise", "canvas loss"], [[level, f"{loss:.4f}"] for level, loss in losses.items()]) + "\n")
    measures = task.measures(network, budgets, seed, batch_size)
    if measures.header:
        results.show(f"{measures.title}\n{table(measures.header, measures.rows)}\n")
    return {"canvas_loss": {str(level): loss for level, loss in losses.items()}, **measures.values}


def bits(network: Any, rows: Rows, results: Results, *, seed: int, prediction: str) -> float:
    """The bound on bits a token of the answers in `rows`."""
    found = bits_per_token(network, rows, seed, prediction)
    results.show(f"at most {found:.4f} bits a token of the answers\n")
    return found


def write_samples(
    network: Any, task: Task, wanted: int, file: Path, seed: int, results: Results, batch_size: int
) -> dict[str, Any]:
    """Answers to the first `wanted` held-out questions, written to `file` beside the references; a summary."""
    tokenizer = Text(network.assets).tokenizer
    samples = list(answers(network, task, task.held_out_examples(wanted), seed, batch_size))
    judged = [sample.right for sample in samples if sample.right is not None]

    def write() -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(sample.line(tokenizer), ensure_ascii=False) for sample in samples]
        file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    on_rank_zero(write)
    share = sum(judged) / len(judged) if judged else None
    results.show(f"{len(samples)} answers beside their references: {file}")
    if share is not None:
        results.show(f"exactly right: {share:.4f}")
    return {"file": str(file), "count": len(samples), "exact_match": share}
