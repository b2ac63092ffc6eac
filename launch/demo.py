"""Train a small model to solve Sudoku, evaluate it, and watch it solve a puzzle: a few minutes on two CPU cores.

    make demo
    make demo ARGS="trainer.max_steps=20 exp_manager.exp_dir=/tmp/runs"      # any override of launch/train.py

Everything runs in the processes of the training's layout. The last line is JSON: what launch/train.py gives, and
solve_rate (by number of denoising steps), tokens_per_forward (with the most steps), seconds.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nemo_diffgemma.cli.canvas_view import CanvasView
from nemo_diffgemma.cli.output import Results
from nemo_diffgemma.cli.start import start
from nemo_diffgemma.data.tasks import task_of
from nemo_diffgemma.schema import BUDGETS, LEVELS, ConfigurationError, TrainConfig
from nemo_diffgemma.tokenizer import Text

STARTED = "NEMO_DIFFGEMMA_DEMO_STARTED"  # the processes inherit it: seconds count from the command


def demo(config: TrainConfig, results: Results) -> dict[str, Any]:
    """Train, evaluate, generate, draw."""
    if config.data.kind != "sudoku":
        raise ConfigurationError(f"data.kind={config.data.kind!r}; the demo is about sudoku: use launch/train.py")
    from nemo_diffgemma import DiffusionGemma
    from nemo_diffgemma.checkpoint.open import dtype_of
    from nemo_diffgemma.cli.measures_view import measure
    from nemo_diffgemma.evaluation.measures import held_out_rows
    from nemo_diffgemma.training import run  # NeMo: ten seconds

    done = run.train(config, config.exp_manager.run_dir)
    trained = done.json()
    if done.preempted:
        results.exit_code = done.exit_code
        return trained
    network = DiffusionGemma.from_checkpoint(trained["checkpoint"], dtype_of(config.model.dtype))
    results.show(f"trained {trained['step']} steps, loss {trained['loss']:.4f}\n")
    task = task_of(config.data)
    rows = held_out_rows(task, network.model_config)
    measures = measure(network, task, rows, LEVELS, BUDGETS, results, seed=config.seed)
    prompt = solve_one(network, config, results)
    run_dir = Path(trained["run_dir"])
    if results.is_rank_zero:
        draw(run_dir)
    results.show(f"loss and solve rate over training: {run_dir / 'demo.png'}")
    results.show(f"checkpoint: {trained['checkpoint']}")
    results.show(f"generate from it: python launch/generate.py checkpoint={trained['checkpoint']} prompt={prompt}\n")
    rates = {name: measures[name] for name in ("solve_rate", "tokens_per_forward")}
    return {**trained, **rates, "seconds": round(time.time() - float(os.environ[STARTED]), 1)}


def solve_one(network: Any, config: TrainConfig, results: Results) -> str:
    """Show a held-out puzzle, and its canvas at every denoising step -> the puzzle as a prompt."""
    import torch

    from nemo_diffgemma.data import decode_response, encode_puzzle, format_grid, is_solution
    from nemo_diffgemma.data.sudoku_task import Sudoku

    task = task_of(config.data)
    assert isinstance(task, Sudoku)
    puzzle = task.puzzles()[0]
    prompt = torch.tensor([encode_puzzle(puzzle)])
    results.show(f"A puzzle whose solution was never trained on:\n{format_grid(puzzle)}\n")
    results.show("The canvas after each denoising step. All cells are predicted at once; the accepted ones are marked,")
    results.show("the others become noise again.\n")
    view = CanvasView(results, Text(network.assets), columns=4)
    generation = network.generate(prompt, max_new_tokens=len(puzzle), seed=config.seed, observe=view)
    view.finish()
    answer = decode_response(generation.sequences[0, prompt.shape[1] :])
    if answer is not None and is_solution(puzzle, answer):
        results.show(
            f"Solved in {int(generation.forwards[0])} passes for {len(puzzle)} cells:\n{format_grid(answer)}\n"
        )
    else:
        results.show(f"Not solved in {int(generation.forwards[0])} passes.\n")
    return "".join(str(digit or ".") for digit in puzzle)


def draw(run_dir: Path) -> None:
    """`demo.png`: training loss, and solve rate where validation has measured it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    def lines(name: str) -> list[dict[str, Any]]:
        file = run_dir / name
        return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []

    figure, left = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    training, validation = lines("metrics.jsonl"), lines("validation.jsonl")
    left.plot([line["step"] for line in training], [line["loss"] for line in training], color="0.6", label="loss")
    left.set(xlabel="optimizer step", ylabel="training loss (nats a token)")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    if validation:
        right = left.twinx()
        right.plot(
            [line["step"] for line in validation], [line["solve_rate"] for line in validation], "o-", color="#76b900"
        )
        right.set(ylabel="held-out puzzles solved", ylim=(0, 1))
        right.yaxis.label.set_color("#76b900")
    left.set_title("4x4 Sudoku")
    figure.savefig(run_dir / "demo.png", dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    os.environ.setdefault(STARTED, str(time.time()))
    if not any(argument.startswith("experiment=") for argument in sys.argv):
        sys.argv.insert(1, "experiment=sudoku_cpu")
    start(demo, TrainConfig, "config", distributed=True)
