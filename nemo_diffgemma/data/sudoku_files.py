"""Puzzles as conversations in files, as anyone would bring their own data: what `data=chat` is shown with.

    python -m nemo_diffgemma.data.sudoku_files FOLDER           # train.jsonl, held_out.jsonl, tokenizer/
    python -m nemo_diffgemma.data.sudoku_files FOLDER 2341      # the answers call the digits 1 2 3 4 by these names

The puzzles are those of `data=sudoku`, in its order; the held-out ones have one solution each, which was never trained
on. The tokenizer is that of `data=sudoku` with a chat template.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nemo_diffgemma.data.sudoku import SudokuDataset, SudokuTask
from nemo_diffgemma.data.sudoku_tokenizer import VOCABULARY, build_tokenizer

DIGITS = "1234"
TEMPLATE = """{{ bos_token }}{% for message in messages %}
{{- message.content }}{{ '<sep>' if message.role == 'user' }}
{%- endfor %}"""


def conversation(puzzle: str, solution: str, names: str = DIGITS) -> dict[str, Any]:
    """A puzzle and its solution, in which the digits 1 to 4 are called `names`."""
    answer = solution.translate(str.maketrans(DIGITS, names))
    return {"messages": [{"role": "user", "content": puzzle}, {"role": "assistant", "content": answer}]}


def write(folder: Path, train: int, held_out: int = 400, names: str = DIGITS) -> None:
    """The first `train` puzzles of the stream, `held_out` puzzles of the test, and the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    task = SudokuTask(test_puzzles=held_out)
    examples = map(SudokuDataset(task).__getitem__, range(train))
    stream = ("".join(VOCABULARY[token] for token in example.tokens if token > 3) for example in examples)
    tests = ("".join(str(digit or ".") for digit in (*puzzle, *solution)) for puzzle, solution in task.test_set)
    for name, cells in (("train", stream), ("held_out", tests)):
        _write(folder / f"{name}.jsonl", (conversation(text[:16], text[16:], names) for text in cells))
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "tokenizer")


def _write(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    with file.open("w") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    write(Path(sys.argv[1]), train=1300 * 64, names=sys.argv[2] if len(sys.argv) > 2 else DIGITS)
