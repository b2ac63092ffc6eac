"""Steps while a checkpoint is written against steps without, in one run, and what a save keeps the run waiting for.

    python benchmarks/save.py --steps 60 --work /tmp/save      # 0.11 B parameters: 1.3 GB each, one is kept

One process trains a random network on Sudoku and saves every `--every` steps. Prints a row of a table: size of a
checkpoint; median seconds of a step beside a save and of one without; of a save, seconds in which the run waits (for
copies in memory) and in which files are written beside it.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nemo_diffgemma.checkpoint.sharded_writer import SaveInProgress
from nemo_diffgemma.schema import TrainConfig
from nemo_diffgemma.training.run import train
from nemo_diffgemma.training.saving import Checkpoints
from nemo_diffgemma.training.strategy import MegatronStrategy

ARCHITECTURE: dict[str, Any] = dict(
    vocab_size=64, hidden_size=512, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=8,
    num_key_value_heads=4, head_dim=64, num_global_key_value_heads=2, global_head_dim=64, num_experts=32,
    top_k_experts=2, moe_intermediate_size=320, sliding_window=64, canvas_length=16,
    layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
)  # fmt: skip


class Watch:
    """Times of steps and saves, and whether a step had one beside it from its beginning to its end."""

    def __init__(self) -> None:
        self.beside: list[float] = []
        self.alone: list[float] = []
        self.waited: list[float] = []
        self.written: list[float] = []
        self._started = time.perf_counter()
        self._in_flight = False

    def step_ends(self, trainer: Any) -> None:
        saver, now = trainer.strategy.saver, time.perf_counter()
        in_flight = saver._thread is not None and saver._thread.is_alive()
        if trainer.global_step > 3 and in_flight == self._in_flight:
            (self.beside if in_flight else self.alone).append(now - self._started)

    def step_begins(self, trainer: Any) -> None:
        saver = trainer.strategy.saver
        self._in_flight = saver._thread is not None and saver._thread.is_alive()
        self._started = time.perf_counter()


def run(work: Path, steps: int, every: int, batch: int) -> tuple[Watch, int]:
    """Train -> what was seen, and the bytes of the last checkpoint."""
    config = TrainConfig()
    config.model.architecture = dict(ARCHITECTURE)
    config.data.global_batch_size = batch
    config.trainer.max_steps, config.trainer.checkpoint_every, config.trainer.keep_last = steps, every, 1
    config.trainer.threads, config.trainer.progress, config.exp_manager.tensorboard = 1, False, False
    watch, ends = Watch(), Checkpoints.on_train_batch_end
    save, write = MegatronStrategy.save_checkpoint, SaveInProgress.write

    def timed(function: Any, seconds: list[float]) -> Any:
        def call(self: Any, *arguments: Any, **keys: Any) -> None:
            started = time.perf_counter()
            function(self, *arguments, **keys)
            seconds.append(time.perf_counter() - started)

        return call

    def step_ends(self: Any, trainer: Any, *rest: Any) -> None:
        watch.step_ends(trainer)
        ends(self, trainer, *rest)
        watch.step_begins(trainer)

    with (
        mock.patch.object(Checkpoints, "on_train_batch_end", step_ends),
        mock.patch.object(MegatronStrategy, "save_checkpoint", timed(save, watch.waited)),
        mock.patch.object(SaveInProgress, "write", timed(write, watch.written)),
    ):
        last = train(config, work).checkpoint
    return watch, sum(file.stat().st_size for file in last.rglob("*") if file.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--work", type=Path, required=True, help="a directory that does not exist")
    given = parser.parse_args()
    try:
        watch, size = run(given.work, given.steps, given.every, given.batch)
    finally:
        shutil.rmtree(given.work, ignore_errors=True)
    print("| checkpoint | step beside a save | step without | a save keeps the run waiting | written in |")
    print(
        f"| {size / 1e9:.1f} GB | {median(watch.beside):.2f} s ({len(watch.beside)}) | {median(watch.alone):.2f} s "
        f"({len(watch.alone)}) | {median(watch.waited):.2f} s | {median(watch.written):.1f} s |"
    )


if __name__ == "__main__":
    main()
