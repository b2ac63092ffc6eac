"""The user's path learns as well as the built-in one: the demo's puzzles, written out as conversations in files.

python -m tests.launch.test_sudoku_as_chat FOLDER [overrides of launch/train.py]     # writes, trains, evaluates
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from nemo_diffgemma.data import SudokuDataset, SudokuTask, sudoku_files
from tests import commands

EXAMPLES = 1300 * 64  # of the demo, each seen once


def write(folder: Path, count: int = EXAMPLES) -> list[str]:
    """The files -> the overrides of launch/train.py that name them."""
    sudoku_files.write(folder, count)
    return [
        "data=chat",
        f"data.train=[{folder}/train.jsonl]",
        f"data.validation=[{folder}/held_out.jsonl]",
        f"data.tokenizer={folder}/tokenizer",
        f"exp_manager.exp_dir={folder}/runs",
        "exp_manager.version=chat",
    ]


def last_line(script: str, *arguments: str) -> dict:
    done = commands.run(f"launch/{script}", *arguments, timeout=6000)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def trained_and_solved(folder: Path, *overrides: str) -> float:
    """Share of the demo's held-out puzzles that are solved with 16 denoising steps."""
    trained = last_line("train.py", "experiment=sudoku_cpu", *write(folder), *overrides)
    evaluated = last_line("evaluate.py", f"checkpoint={trained['checkpoint']}", "data=sudoku", "steps=[16]")
    return evaluated["solve_rate"]["16"]


def test_puzzles_written_out_are_the_built_in_examples(tmp_path):
    from nemo_diffgemma.config import ModelConfig
    from nemo_diffgemma.data.chat_task import Chat, ChatData

    write(tmp_path, 30)
    task = Chat(ChatData(train=[str(tmp_path / "train.jsonl")], tokenizer=str(tmp_path / "tokenizer")))
    task.open(None)
    assert task.architecture() == {"vocab_size": 64, "eos_token_id": [1], "bos_token_id": 2, "pad_token_id": 0}
    task.prepare(ModelConfig(**task.architecture(), canvas_length=16))
    examples = {(example.tokens, example.answers) for example in map(lambda i: task.training_example(0, i), range(30))}
    stream = SudokuDataset(SudokuTask())
    assert examples == {(stream[index].tokens, stream[index].answers) for index in range(30)}


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_it_learns_as_well_as_the_built_in_task(tmp_path):
    assert trained_and_solved(tmp_path) >= 0.90


if __name__ == "__main__":
    place = Path(sys.argv[1]).absolute()
    place.mkdir(parents=True, exist_ok=True)
    print(trained_and_solved(place, *sys.argv[2:]))
