"""Look at data before a long run, and fill the cache that the run will read.

    python launch/data.py data=chat data.train=[chat.jsonl] data.validation=[held_out.jsonl] checkpoint=CKPT
    python launch/data.py data=chat data.train=[chat.jsonl] data.tokenizer=DIRECTORY canvas_length=64
    python launch/data.py data=text data.train=[books/*.txt] data.vocabulary_size=4096 canvas_length=32

Shows counts, histograms of lengths and canvases, rows that are left out and why, and one example, in the colours of
roles and canvases; in the folder `out` it leaves lengths.png and bad_rows.jsonl. The last line is JSON: examples,
bad_rows (by reason), notes, tokens_mean, tokens_max, answer_tokens_mean, canvases_mean, canvases_max, fill, seconds,
plot.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nemo_diffgemma.cli.output import Results
from nemo_diffgemma.cli.start import start
from nemo_diffgemma.data.tasks import DataGroup, default_data, task_of
from nemo_diffgemma.schema import ConfigurationError


@dataclass
class DataConfig:
    """Configuration of `launch/data.py`."""

    data: DataGroup = field(default_factory=default_data)
    checkpoint: str | None = None  # whose tokenizer and sizes count; null: a network from scratch
    canvas_length: int = 256  # of a network from scratch
    max_position_embeddings: int = 262_144  # of a network from scratch
    examples: int = 10_000  # looked at, of the stream of training examples, or of the held-out ones
    show: int = 0  # which of them is shown
    out: str = "runs/data"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.examples < 1 or not 0 <= self.show < self.examples or self.canvas_length < 1:
            raise ConfigurationError(
                f"examples={self.examples}, show={self.show}, canvas_length={self.canvas_length}; expected at least "
                "one example, one of these to show, and a canvas of a token or more"
            )


def data(config: DataConfig, results: Results) -> dict[str, Any]:
    """Read the data of a run and show them."""
    from nemo_diffgemma.checkpoint.open import assets_of
    from nemo_diffgemma.cli import data_view
    from nemo_diffgemma.config import ModelConfig
    from nemo_diffgemma.data import bad_rows
    from nemo_diffgemma.repository import user_path

    began = time.perf_counter()
    task = task_of(config.data)
    assets = None if config.checkpoint is None else assets_of(config.checkpoint)
    task.open(assets)
    sizes: dict[str, Any] = {
        "canvas_length": config.canvas_length,
        "max_position_embeddings": config.max_position_embeddings,
    }
    model = ModelConfig(**(sizes | task.architecture())) if assets is None else ModelConfig.from_pretrained(assets)
    task.prepare(model)
    report = task.report()
    examples: Any = task.training_examples(config.seed)
    wanted, held_out = config.examples, report is not None and not report.examples["train"]
    if held_out:
        examples = task.held_out_examples(config.examples)
        wanted = len(examples)
    elif report is not None:
        wanted = min(wanted, report.examples["train"])
    looked_at = [examples[index] for index in range(wanted)]
    statistics = data_view.Statistics.of(looked_at, model.canvas_length)
    data_view.show(task, statistics, results)
    shown = looked_at[min(config.show, wanted - 1)]
    messages = task.messages(config.seed, shown.sample, held_out)
    data_view.show_example(shown, messages, task.tokenizer(), model.canvas_length, results)
    out = user_path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    data_view.plot(statistics, out / "lengths.png")
    found: dict[str, Any] = {}
    if report is not None:
        bad_rows.write(report.bad_rows, out / bad_rows.BAD_ROWS)
        counts = Counter(row.reason for row in report.bad_rows)
        found = {"examples": report.examples, "bad_rows": dict(counts), "notes": report.notes}
    seconds = round(time.perf_counter() - began, 1)
    return {**found, **statistics.json(model.canvas_length), "seconds": seconds, "plot": str(out / "lengths.png")}


if __name__ == "__main__":
    start(data, DataConfig, "data")
