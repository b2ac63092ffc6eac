"""Checkpoints are written while steps go on, from copies, and those are kept that were asked for."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_diffgemma.checkpoint import huggingface, manifest, sharded, sharded_writer
from nemo_diffgemma.checkpoint.sharded_writer import SaveInProgress
from nemo_diffgemma.checkpoint.tensor_files import CheckpointError
from nemo_diffgemma.schema import TrainerGroup
from nemo_diffgemma.training import saving
from nemo_diffgemma.training.run_directory import complete_checkpoints, step_of
from tests.training import cases


def assert_equal(one: Path, other: Path) -> None:
    """Weights, and the files of optimizer state: equal values make equal files."""
    ours, theirs = cases.weights_of(str(one), {}), cases.weights_of(str(other), {})
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)
    (state,), (their_state,) = one.glob("training_*.distcp"), other.glob("training_*.distcp")
    assert state.read_bytes() == their_state.read_bytes()


@pytest.mark.parametrize("distributed", [True, False], ids=["distributed", "replicated"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_go_on_while_a_checkpoint_of_before_is_written(tmp_path, monkeypatch, dtype, distributed):
    """The files of step 2 are not begun before step 4 is done, and are those of a run that had ended at step 2."""
    keys = {"model__dtype": dtype, "optim__distributed": distributed, "optim__decay": "constant"}
    cases.run(str(tmp_path / "short"), steps=2, **keys)
    write, metrics, waited = SaveInProgress.write, tmp_path / "run" / "metrics.jsonl", []

    def late(self: SaveInProgress) -> None:
        if self.directory.name == "step-2":
            while len(metrics.read_text().splitlines()) < 4:
                waited.append(threading.current_thread() is threading.main_thread())
                threading.Event().wait(0.01)
        write(self)

    monkeypatch.setattr(SaveInProgress, "write", late)
    cases.run(str(tmp_path / "run"), steps=5, every=2, **keys)
    assert waited and not any(waited)
    steps = [step_of(checkpoint) for checkpoint in complete_checkpoints(tmp_path / "run")]
    assert steps == [5, 4, 2]
    assert_equal(tmp_path / "run" / "checkpoints" / "step-2", tmp_path / "short" / "checkpoints" / "step-2")
    assert all(sharded.verify(checkpoint) is None for checkpoint in complete_checkpoints(tmp_path / "run"))


@pytest.mark.parametrize("rank", [0, 1])
def test_what_befalls_the_writer_of_one_rank_is_told_on_all_and_leaves_nothing(pool, tmp_path, rank):
    """At the next step; a full disk is no refusal, and another start goes on from the checkpoint before."""
    job = {"directory": str(tmp_path), "rank": rank, "step": 6}
    told = pool(2).run("tests.training.cases:messages_of_a_writer_that_fails", **job)
    assert all(line.startswith("TrainingError: ") and "No space left on device" in line for line in told), told
    assert all("\n" not in line for line in told)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-3"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) in (7, 8), "not at the save after it, of step 9"
    losses = [
        pool(2).run("tests.training.cases:losses", directory=str(directory), steps=10, every=3)[0]
        for directory in (tmp_path, tmp_path / "straight")
    ]
    assert losses[0] == losses[1]


@contextlib.contextmanager
def no_room(bytes: int = 20_000) -> Iterator[None]:
    """The kernel refuses the rest of every file that gets longer: an error in the middle of one, as of a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def failing(place: Any, name: str, error: int) -> Any:
    return mock.patch.object(place, name, side_effect=OSError(error, os.strerror(error)))


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (no_room, "File too large"),
        (lambda: failing(os, "fsync", errno.EIO), "Input/output error"),
        (lambda: failing(huggingface, "follow_umask", errno.EPERM), "Operation not permitted"),
        (lambda: failing(Path, "rename", errno.ESTALE), "Stale file handle"),
        (lambda: failing(sharded_writer, "save_config", errno.EDQUOT), "Disk quota exceeded"),
        (lambda: failing(sharded, "write_assets", errno.EACCES), "Permission denied"),
    ],
    ids=["no room", "fsync", "chmod", "rename", "metadata", "assets"],
)
def test_wherever_a_save_fails_the_last_complete_one_stays(tmp_path, monkeypatch, fault, said):
    write = SaveInProgress.write

    def fails(self: SaveInProgress) -> None:
        with fault() if self.directory.name == "step-2" else contextlib.nullcontext():
            write(self)

    monkeypatch.setattr(SaveInProgress, "write", fails)
    message = cases.message(str(tmp_path), steps=2, every=1)
    assert message.startswith("TrainingError: ") and said in message and "\n" not in message
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-1"]
    monkeypatch.setattr(SaveInProgress, "write", write)
    assert [line["step"] for line in cases.run(str(tmp_path), steps=2)] == [1, 2]
    sharded.verify(tmp_path / "checkpoints" / "step-2")


def test_a_run_that_fails_leaves_the_checkpoint_that_was_being_written(tmp_path, monkeypatch):
    from nemo_diffgemma.training.callbacks import MetricsFile

    write, failed = SaveInProgress.write, threading.Event()
    before = MetricsFile.on_train_batch_end

    def late(self: SaveInProgress) -> None:
        failed.wait(30)
        write(self)

    def fail(self: Any, trainer: Any, *rest: Any) -> None:
        before(self, trainer, *rest)
        if trainer.global_step == 3:
            failed.set()
            raise KeyError("a defect")

    monkeypatch.setattr(SaveInProgress, "write", late)
    monkeypatch.setattr(MetricsFile, "on_train_batch_end", fail)
    assert cases.message(str(tmp_path), steps=6, every=2) == "KeyError: 'a defect'"
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-2"]


def test_a_failing_disk_is_never_taken_for_damage(tmp_path, monkeypatch):
    cases.run(str(tmp_path), steps=2, every=1)

    def fails(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    there = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    for place, name in ((manifest, "_digest"), (sharded, "read_metadata"), (sharded.dist_checkpointing, "load")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, fails)
            assert cases.message(str(tmp_path), steps=3).startswith("OSError: ")
        assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == there
    assert cases.message(str(tmp_path), steps=3) == "no error"


def test_damaged_ones_are_put_aside_however_often(tmp_path):
    for _ in range(3):
        cases.run(str(tmp_path), steps=2)
        (file,) = (tmp_path / "checkpoints" / "step-2").glob("weights_*.distcp")
        file.write_bytes(bytes(file.stat().st_size))
    lines = cases.run(str(tmp_path), steps=2)
    assert [line["step"] for line in lines] == [1, 2]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        *("step-2", "step-2.damaged", "step-2.damaged-2", "step-2.damaged-3"),
    ]


# -- what more is saved ------------------------------------------------------------------------------------------------


def test_what_a_run_keeps_beside_its_weights_is_saved_and_resumed_in_any_layout(pool, single, tmp_path):
    """In files of its own, which who wants the weights does not read; frozen parameters have no optimizer state."""
    job, settings = "tests.training.cases:kept_beside", dict(frozen="experts", every=2)
    straight = cases.kept_beside(str(tmp_path / "a"), steps=4, **settings)
    run = {"directory": str(tmp_path / "b"), **settings}
    first = pool(2).run(job, steps=2, layout={"tensor": 2, "expert": 2}, **run)[0]
    resumed = pool(2).run(job, steps=4, layout={"expert": 2}, **run)[0]
    assert first["keys"] == resumed["keys"] == straight["keys"]
    trained = {name.removeprefix("optimizer.exp_avg.") for name in straight["keys"] if "exp_avg." in name}
    assert trained and not any("experts" in name for name in trained)
    assert resumed["losses"] == pytest.approx(straight["losses"], abs=1e-5)
    for name, values in straight["sums"].items():
        assert np.allclose(resumed["sums"][name], values, atol=1e-3), name
        assert "experts" not in name or np.allclose(
            values, 4 * cases.weights_of(str(tmp_path / "a" / "checkpoints" / "step-2"), {})[name]
        )
    checkpoint = tmp_path / "b" / "checkpoints" / "step-4"
    assert {file.name for file in checkpoint.glob("*.distcp")} == {
        f"{kind}_{rank}.distcp" for kind in ("weights", "training", "sum") for rank in (0, 1)
    }
    (checkpoint / "sum_1.distcp").write_bytes(bytes((checkpoint / "sum_1.distcp").stat().st_size))
    assert cases.weights_of(str(checkpoint), {}).keys() == straight["sums"].keys()
    with pytest.raises(CheckpointError, match="is damaged: sum_1.distcp"):
        sharded.verify(checkpoint)
    # without what was kept it goes on, with something that was not kept it is refused
    cases.run(str(tmp_path / "c"), steps=1)
    with pytest.raises(CheckpointError, match="lacks .* of .* tensors of this run, first sum.embed_tokens.weight"):
        cases.kept_beside(str(tmp_path / "c"), frozen="none", steps=2)


# -- which are kept ----------------------------------------------------------------------------------------------------


def make(run_dir: Path, steps: set[int], measured: dict[int, float]) -> None:
    shutil.rmtree(run_dir, ignore_errors=True)
    for step in steps:
        for name in sharded._FILES:
            file = run_dir / "checkpoints" / f"step-{step}" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("")
    run_dir.mkdir(exist_ok=True)
    lines = [
        {"step": step, "canvas_loss": {"0.1": value, "0.9": value}, "rate": value} for step, value in measured.items()
    ]
    (run_dir / "validation.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


@settings(max_examples=40)
@given(
    steps=st.sets(st.integers(1, 60), min_size=1, max_size=12),
    values=st.lists(st.integers(0, 9).map(float), min_size=60, max_size=60),
    keep=st.tuples(*[st.integers(0, 4)] * 3),
    by=st.sampled_from(["canvas_loss", "rate"]),
)
def test_those_are_kept_that_were_asked_for(tmp_path_factory, steps, values, keep, by):
    run_dir = tmp_path_factory.getbasetemp() / "kept"
    measured = {step: values[step - 1] for step in range(1, 60, 2)}  # not every one
    make(run_dir, steps, measured)
    last, best, every = keep
    saving.remove_others(run_dir, TrainerGroup(keep_last=last, keep_best=best, keep_every=every, keep_by=by))
    kept = {step_of(checkpoint) for checkpoint in complete_checkpoints(run_dir)}
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {f"step-{step}" for step in kept}
    if not any(keep) or (best and not steps & measured.keys()):
        assert kept == steps  # also where the best cannot be told
        return
    assert set(sorted(steps)[-max(last, 1) :]) <= kept
    if every:
        assert {step for step in steps if step % every == 0} <= kept
    better = min if by == "canvas_loss" else max
    candidates = [measured[step] for step in steps if step in measured]
    if best and candidates:
        assert better(candidates) in [measured[step] for step in kept if step in measured]
    of_best = kept - set(sorted(steps)[-max(last, 1) :]) - {step for step in steps if every and step % every == 0}
    assert len(of_best) <= best
    for step in of_best:  # nobody that is gone is better
        gone = [measured[one] for one in steps - kept if one in measured]
        assert all(better(measured[step], value) == measured[step] for value in gone)


def test_a_checkpoint_that_somebody_reads_is_left_until_the_next_time(tmp_path):
    make(tmp_path, {1, 2, 3}, {})
    with sharded.in_use(tmp_path / "checkpoints" / "step-1"):
        saving.remove_others(tmp_path, TrainerGroup(keep_last=1))
        assert [step_of(one) for one in complete_checkpoints(tmp_path)] == [3, 1]
    saving.remove_others(tmp_path, TrainerGroup(keep_last=1))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-3"]


def test_who_loads_a_checkpoint_holds_it(tmp_path, monkeypatch):
    """Of a network and of a conversion, while they read."""
    from nemo_diffgemma.checkpoint import streaming
    from nemo_diffgemma.checkpoint.stored import StoredTensor

    cases.run(str(tmp_path / "run"), steps=2, every=1)
    seen, rows, load = [], StoredTensor.rows, sharded.dist_checkpointing.load
    first = tmp_path / "run" / "checkpoints" / "step-1"

    def watched(read: Any) -> Any:
        def reading(*arguments: Any, **keys: Any) -> Any:
            with sharded.unused(first) as is_unused:
                seen.append(is_unused)
            saving.remove_others(tmp_path / "run", TrainerGroup(keep_last=1))
            return read(*arguments, **keys)

        return reading

    monkeypatch.setattr(sharded.dist_checkpointing, "load", watched(load))
    cases.weights_of(str(first), {})
    monkeypatch.setattr(StoredTensor, "rows", watched(rows))
    streaming.convert(first, tmp_path / "out", "huggingface")
    assert len(seen) > 3 and not any(seen)
    saving.remove_others(tmp_path / "run", TrainerGroup(keep_last=1))
    assert not first.exists()


def test_values_that_are_no_numbers_and_torn_lines_choose_nothing(tmp_path):
    file = tmp_path / "validation.jsonl"
    file.write_text('{"step": 1, "rate": NaN}\n{"step": 2, "rate": 0.5}\n{"step": 3, "rate": [1]}\n{"step": 4, "ra')
    assert saving.measures(file, "rate") == {2: 0.5}


def test_a_run_keeps_its_last_its_best_and_every_nth(tmp_path):
    cases.run(
        str(tmp_path), steps=7, every=1, trainer__keep_last=2, trainer__keep_every=3, trainer__keep_best=1,
        trainer__validate_every=1, trainer__validation_examples=4,
    )  # fmt: skip
    losses = saving.measures(tmp_path / "validation.jsonl", "canvas_loss")
    assert sorted(losses) == [1, 2, 3, 4, 5, 6, 7]
    expected = {7, 6, 3, min(losses, key=lambda step: (losses[step], -step))}
    assert {step_of(checkpoint) for checkpoint in complete_checkpoints(tmp_path)} == expected
    assert len(list((tmp_path / "checkpoints").iterdir())) == len(expected)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"trainer__keep_last": -1}, "trainer.keep_last=-1"),
        ({"trainer__keep_best": 1}, "trainer.validate_every=0"),
        ({"trainer__keep_best": 1, "trainer__validate_every": 3, "every": 4}, "trainer.checkpoint_every=4"),
    ],
)
def test_what_cannot_be_kept_is_said_before_the_first_step(tmp_path, keys, said):
    message = cases.message(str(tmp_path), steps=6, **keys)
    assert message.startswith("ConfigurationError") and said in message and "\n" not in message
