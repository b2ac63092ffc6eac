"""Stopped and resumed, a run is the run that was not stopped: bit for bit in its layout, to rounding in another one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data import runs
from tests.training import cases

# of Sudoku test_run.py has resumes in all layouts
SOURCES = ("chat", pytest.param("sudoku", marks=pytest.mark.slow))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("conversations")
    runs.files(made)
    return made


def job(source: str, folder: Path) -> tuple[str, dict[str, Any]]:
    """What trains on a kind of data, and its arguments: conversations are packed."""
    if source == "sudoku":
        return "tests.training.cases:run", {}
    return "tests.data.runs:run", {"folder": str(folder), "data__tokens_per_micro_batch": 400}


def here(function: str, **arguments: Any) -> list[dict[str, Any]]:
    return (cases.run if "training" in function else runs.run)(**arguments)


def numbers(lines: list[dict[str, Any]]) -> list[tuple[float, ...]]:
    return [tuple(line[name] for name in ("step", "loss", "grad_norm", "lr", "diffusion")) for line in lines]


@pytest.mark.parametrize("layout", [None, {"expert": 2}], ids=["one process", "expert2"])
@pytest.mark.parametrize("source", SOURCES)
def test_in_its_layout_it_goes_on_bit_for_bit(pool, single, folder, tmp_path, source, layout):
    """Which examples come, how they are packed, which canvases and noise they get: all follow from seed and step."""
    function, arguments = job(source, folder)

    def run(directory: str, **settings: Any) -> list[dict[str, Any]]:
        given = {**arguments, "directory": str(tmp_path / directory), **settings, "optim__decay": "constant"}
        return here(function, **given) if layout is None else pool(2).run(function, layout=layout, **given)[0]

    straight = run("straight", steps=5)
    for steps in (2, 3, 5):
        resumed = run("resumed", steps=steps)
    assert numbers(resumed) == numbers(straight)
    cut = [tmp_path / name / "checkpoints" / "step-5" for name in ("resumed", "straight")]
    for file in sorted(cut[0].glob("training_*.distcp")):
        assert file.read_bytes() == (cut[1] / file.name).read_bytes(), file.name
    ours, theirs = (cases.weights_of(str(place), {}) for place in cut)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("source", SOURCES)
def test_in_another_layout_the_next_three_steps_agree(pool, single, folder, tmp_path, source):
    """Begun with tensors cut in two, gone on with experts on two replicas, then in one process."""
    function, arguments = job(source, folder)
    arguments |= {"every": 1, "optim__decay": "constant"}

    def run(directory: str, steps: int, layout: dict[str, int] | None) -> list[dict[str, Any]]:
        given = {**arguments, "directory": str(tmp_path / directory), "steps": steps}
        return here(function, **given) if layout is None else pool(2).run(function, layout=layout, **given)[0]

    run("same", 2, {"tensor": 2})
    shutil.copytree(tmp_path / "same", tmp_path / "other")
    same = run("same", 5, {"tensor": 2})
    run("other", 3, {"expert": 2})
    other = run("other", 5, None)
    assert [line["step"] for line in other] == [1, 2, 3, 4, 5]
    for line, true in zip(other, same, strict=True):
        assert line["loss"] == pytest.approx(true["loss"], rel=1e-5), line["step"]
