"""Jobs for the pool of ranks: small runs on conversations in files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.data import templates
from tests.training import cases


def files(folder: Path, count: int = 40) -> None:
    """Conversations of one to four turns, of very different lengths, and their tokenizer."""
    words = templates.TEXT.split()

    def text(start: int, length: int) -> str:
        return " ".join(words[(start + n * n) % len(words)] for n in range(length))

    for name, first in (("train", 0), ("held_out", 1000)):
        with (folder / f"{name}.jsonl").open("w") as stream:
            for index in range(first, first + count):
                turns = []
                for turn in range(1 + index % 4):
                    turns.append({"role": "user", "content": text(index + turn, 1 + index * 5 % 7)})
                    turns.append({"role": "assistant", "content": text(index * 3 + turn, 1 + index * 7 % 13)})
                stream.write(json.dumps({"messages": turns}) + "\n")
    templates.tokenizer().save_pretrained(folder / "tokenizer")


def config(folder: str, **settings: Any) -> Any:
    """A run on them."""
    import datasets

    from nemo_diffgemma.data.chat_task import ChatData

    datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"
    keys = {name.removeprefix("data__"): settings.pop(name) for name in list(settings) if name.startswith("data__")}
    made = cases.config(**({"model__objective__canvases_per_example": 0} | settings))
    made.data = ChatData(
        **{
            "train": [f"{folder}/train.jsonl"],
            "validation": [f"{folder}/held_out.jsonl"],
            "tokenizer": f"{folder}/tokenizer",
            "global_batch_size": 8,
        }
        | keys
    )
    return made


def run(folder: str, directory: str, **settings: Any) -> list[dict[str, Any]]:
    """Train -> the lines of the metrics file."""
    from nemo_diffgemma.training.run import train

    train(config(folder, **settings), directory)
    return [json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text().splitlines()]


def message(folder: str, directory: str, **settings: Any) -> str:
    """The error of a run that must not begin."""
    from nemo_diffgemma.training.run import train

    try:
        train(config(folder, **settings), directory)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def gradients(folder: str, directory: str, **settings: Any) -> tuple[float, dict[str, Any]]:
    """Loss and every whole gradient of a run of one step (gradients on rank 0; empty elsewhere)."""
    from unittest import mock

    from nemo_diffgemma.training import overlap
    from tests.distributed.cases import _whole_gradients

    finalize, found = overlap.finalize_gradients, {}

    def finalized(wrapped: Any) -> None:
        finalize(wrapped)
        found.update(_whole_gradients(wrapped.module))  # what becomes of the weights does not matter any more

    with mock.patch.object(overlap, "finalize_gradients", finalized):
        # without a distributed optimizer: with it each replica has the sum of a part of the gradients
        (line,) = run(folder, directory, steps=1, optim__distributed=False, **settings)
    return line["loss"], found
