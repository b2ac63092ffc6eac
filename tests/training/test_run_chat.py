"""Conversations from files train as any data do: in every layout, packed or not, and after a stop in another layout."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from nemo_diffgemma.errors import ConfigurationError
from tests.data import runs
from tests.distributed.layouts import LAYOUTS
from tests.parity.objectives import Step, assert_same_step

JOB = "tests.data.runs:run"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("conversations")
    runs.files(made)
    return made


@pytest.fixture(scope="module")
def one_by_one(single, folder, tmp_path_factory) -> list[dict]:
    """Four steps in one process, an example a pass."""
    return runs.run(str(folder), str(tmp_path_factory.mktemp("run")), steps=4, data__micro_batch_size=1)


def assert_same(lines: list[dict], truth: list[dict], steps: int = 3) -> None:
    """Later steps are chaotic: a difference in the last bit grows, of gradients first."""
    for line, true in list(zip(lines, truth, strict=True))[:steps]:
        assert line["loss"] == pytest.approx(true["loss"], rel=1e-5)
    for line, true in list(zip(lines, truth, strict=True))[:2]:
        assert line["grad_norm"] == pytest.approx(true["grad_norm"], rel=2e-5)


@pytest.mark.parametrize("budget", [0, 340, 5000])
def test_the_loss_of_a_packed_batch_is_that_of_its_conversations(single, folder, tmp_path, one_by_one, budget):
    assert_same(runs.run(str(folder), str(tmp_path), steps=4, data__tokens_per_micro_batch=budget), one_by_one)


@pytest.mark.parametrize("layout", [{}, {"expert": 2}, {"tensor": 2}, {"tensor": 2, "expert": 2}], ids=str)
def test_in_a_layout(pool, folder, tmp_path, one_by_one, layout):
    """Two replicas, which share experts or not; or one of two processes."""
    arguments = dict(folder=str(folder), directory=str(tmp_path), steps=4, layout=layout)
    for lines in pool(2).run(JOB, **arguments, data__tokens_per_micro_batch=340):
        assert_same(lines, one_by_one)


@pytest.fixture(scope="module")
def step_one_by_one(single, folder, tmp_path_factory):
    """`step_one_by_one(canvases)` -> loss and gradients of the first step in one process, an example a pass."""

    @functools.cache
    def get(canvases: int) -> Step:
        asked = dict(model__objective__canvases_per_example=canvases, data__micro_batch_size=1)
        return Step(*runs.gradients(str(folder), str(tmp_path_factory.mktemp("run")), **asked))

    return get


@pytest.mark.parametrize("canvases", [0, 2])
@pytest.mark.parametrize("layout", ["tp2", "ep2", "tp2_ep2", "dp2_ep2"])
def test_every_gradient_of_a_packed_step_is_that_of_its_conversations(
    pool, folder, tmp_path, step_one_by_one, layout, canvases
):
    truth, (world, axes) = step_one_by_one(canvases), LAYOUTS[layout]
    asked = dict(model__objective__canvases_per_example=canvases, data__tokens_per_micro_batch=340, layout=axes)
    ranks = pool(world).run("tests.data.runs:gradients", folder=str(folder), directory=str(tmp_path), **asked)
    assert all(loss == pytest.approx(truth.loss, rel=1e-5) for loss, _ in ranks)
    assert_same_step(Step(*ranks[0]), truth, 1e-5)


def test_a_run_goes_on_in_another_layout_with_the_next_examples(pool, single, folder, tmp_path, one_by_one):
    pool(2).run(JOB, folder=str(folder), directory=str(tmp_path), steps=2, every=2)
    changed = dict(data__tokens_per_micro_batch=400, trainer__validate_every=4)
    lines = runs.run(str(folder), str(tmp_path), steps=4, every=2, **changed)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert_same(lines, one_by_one)
    report = json.loads((tmp_path / "data.json").read_text())
    assert report["examples"] == {"train": 40, "validation": 40} and not (tmp_path / "bad_rows.jsonl").exists()
    (measured,) = map(json.loads, (tmp_path / "validation.jsonl").read_text().splitlines())
    assert set(measured["canvas_loss"]) == {"0.1", "0.3", "0.5", "0.7", "0.9"}
    assets = tmp_path / "checkpoints" / "step-4" / "assets"
    assert json.loads((assets / "generation_config.json").read_text())["eos_token_id"] == [1, 6]
    assert (assets / "chat_template.jinja").is_file() and (assets / "tokenizer.json").is_file()
    # other files under the same names are other data
    kept = (folder / "train.jsonl").read_text()
    (folder / "train.jsonl").write_text(kept.partition("\n")[2])
    try:
        error = runs.message(str(folder), str(tmp_path), steps=5)
        assert "hold other examples than those that the run in" in error
    finally:
        (folder / "train.jsonl").write_text(kept)


def test_without_measures_no_held_out_examples_are_needed(single, folder, tmp_path, one_by_one):
    assert_same(runs.run(str(folder), str(tmp_path), steps=4, data__validation=[]), one_by_one)


def test_rows_that_are_left_out_are_told_at_the_beginning_and_at_the_end(single, folder, tmp_path, caplog):
    (tmp_path / "more.jsonl").write_text('{"messages": []}\n{\n')
    files = [f"{folder}/train.jsonl", f"{tmp_path}/more*"]
    with pytest.raises(ConfigurationError, match=r"data.train\[1\]=.*more\* has no row to learn from; 2 rows left out"):
        runs.run(str(folder), str(tmp_path / "run"), steps=1, data__train=files)
    files = [str(tmp_path / "both")]
    (tmp_path / "both").mkdir()
    for name, place in (("a.jsonl", folder / "train.jsonl"), ("b.jsonl", tmp_path / "more.jsonl")):
        (tmp_path / "both" / name).write_text(place.read_text())
    caplog.clear()
    runs.run(str(folder), str(tmp_path / "run"), steps=1, data__train=files)
    told = [record.message for record in caplog.records if record.message.startswith("data: ")]
    assert len(told) == 2 and all("2 rows left out: 1 unknown format, 1 broken JSON" in text for text in told)
    rows = [json.loads(line) for line in (tmp_path / "run" / "bad_rows.jsonl").read_text().splitlines()]
    assert [(Path(row["source"]).name, row["line"]) for row in rows] == [("b.jsonl", 1), ("b.jsonl", 2)]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"data__train": ["/nowhere.jsonl"]}, "data.train[0]: /nowhere.jsonl does not exist"),
        ({"data__validation": [], "trainer__validate_every": 1}, "give data.validation=[FILES]"),
        ({"data__tokens_per_micro_batch": 20}, "data.tokens_per_micro_batch=20, but the longest example has"),
        ({"data__tokens_per_micro_batch": 500, "data__micro_batch_size": 2}, "use one of them"),
        ({"data__tokenizer": "/nowhere"}, "data.tokenizer=/nowhere has no tokenizer.json"),
        ({"data__max_length": 3}, "has no row to learn from; 40 rows left out: 40 too long"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_bad_input_is_told_on_every_rank_before_a_network_is_made(pool, folder, tmp_path, settings, said):
    messages = pool(2).run("tests.data.runs:message", folder=str(folder), directory=str(tmp_path), steps=1, **settings)
    assert all(said in message and "ConfigurationError" in message for message in messages), messages
    assert not (tmp_path / "assets").exists()
