"""A kind of data is one file and one line: a second one trains, evaluates and generates, and nothing else knows it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra

from nemo_diffgemma.cli.arguments import Texts
from nemo_diffgemma.cli.configuration import CONF, register
from nemo_diffgemma.data import tasks
from nemo_diffgemma.data.sudoku_task import SudokuData
from nemo_diffgemma.repository import ROOT
from nemo_diffgemma.schema import ConfigurationError, TrainConfig, validate
from tests.data.copying import CopyData
from tests.launch import verbs
from tests.training import cases


@pytest.fixture(autouse=True)
def a_second_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tasks.KINDS, "copy", "tests.data.copying:Copy")


def composed(name: str, schema: type, *overrides: str) -> Any:
    GlobalHydra.instance().clear()
    store = ConfigStore.instance().repo.copy()
    try:
        register(schema, name)
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return validate(compose(name, list(overrides)), schema)
    finally:
        ConfigStore.instance().repo = store


class Shown:
    """Stands in for `Results`."""

    exit_code, first, colours = 0, True, False

    def show(self, text: str) -> None:
        pass


def test_a_second_kind_trains_evaluates_and_generates(single, tmp_path):
    from nemo_diffgemma.training.run import train

    config = composed("config", TrainConfig, "data=copy", "data.length=3", "data.global_batch_size=8")
    assert config.data == CopyData(length=3, global_batch_size=8)
    tiny = cases.config(steps=2, trainer__validate_every=1, trainer__validation_examples=4)
    tiny.data = config.data
    done = train(tiny, tmp_path)
    line = json.loads((tmp_path / "validation.jsonl").read_text().splitlines()[-1])
    assert set(line) == {"step", "canvas_loss", "bits_per_token"}

    evaluate = verbs.load("evaluate")
    asked = composed("evaluate", evaluate.EvaluateConfig, f"checkpoint={done.checkpoint}", "data=copy", "levels=[0.5]")
    measured = evaluate.evaluate(asked, Shown())
    assert set(measured) == {"canvas_loss", "bits_per_token"} and set(measured["canvas_loss"]) == {"0.5"}

    generate = verbs.load("generate")
    asked = composed("generate", generate.GenerateConfig, f"checkpoint={done.checkpoint}", "prompt_ids=[5,6]")
    answer = generate.generate(asked, Shown())
    assert len(answer["sequences"][0]) == 2 + 16 and answer["text"] is None


def test_a_checkpoint_from_scratch_has_the_sampler_settings_of_its_task_whole(single, tmp_path):
    """vLLM and transformers ask for every one of them."""
    from transformers.models.diffusion_gemma.generation_diffusion_gemma import DiffusionGemmaGenerationConfig

    from nemo_diffgemma.training.run import train

    assets = Path(train(cases.config(steps=1), tmp_path).checkpoint) / "assets"
    written = DiffusionGemmaGenerationConfig.from_pretrained(assets)
    assert (written.eos_token_id, written.pad_token_id) == (1, 0)
    assert written.sampler_config.entropy_bound == 0.1
    for name, value in {"max_denoising_steps": 48, "t_min": 0.4, "t_max": 0.8, "stability_threshold": 1,
                        "confidence_threshold": 0.005}.items():  # fmt: skip
        assert json.loads((assets / "generation_config.json").read_text())[name] == value == getattr(written, name)


def test_keys_belong_to_their_kind():
    with pytest.raises(ConfigurationError, match="data.held_out is no key of data.kind='copy'.*data=copy"):
        validate({"data": {"kind": "copy", "held_out": 3}}, TrainConfig)
    with pytest.raises(ConfigurationError, match="unknown key data.lenght; did you mean data.length"):
        validate({"data": {"kind": "copy", "lenght": 3}}, TrainConfig)
    with pytest.raises(ConfigurationError, match="data.kind='chess'; use one of sudoku, chat, text, copy"):
        validate({"data": {"kind": "chess"}}, TrainConfig)
    assert validate({"data": {"held_out": 3}}, TrainConfig).data == SudokuData(held_out=3)
    with pytest.raises(ConfigurationError, match="keys of SudokuData"):
        tasks.task_of(SudokuData(kind="copy"))


def test_what_a_task_cannot_be_made_of_is_the_users_error():
    for data in (SudokuData(held_out=0), SudokuData(clues=(3, 99))):
        with pytest.raises(ConfigurationError, match=r"^data\.(held_out|clues)="):
            tasks.task_of(data)
    with pytest.raises(ConfigurationError, match=r"^data\.test_puzzles=40 "):
        tasks.task_of(SudokuData(test_puzzles=40, test_clues=(16, 16))).held_out_examples(1)


@dataclass
class FileData(tasks.DataGroup):
    kind: str = "file"
    path: str = ""


class FromFile(tasks.Task):
    keys = FileData


def test_texts_of_any_kind_are_taken_literally(monkeypatch):
    monkeypatch.setitem(tasks.KINDS, "file", "tests.data.test_tasks:FromFile")
    texts = Texts(TrainConfig, ["data=file", "data.path=runs/step=1,[a]", "data.length=3"])
    assert texts.arguments[0] == "data=file" and texts.arguments[2] == "data.length=3"
    assert texts.restore({"path": texts.arguments[1].removeprefix("data.path=")}) == {"path": "runs/step=1,[a]"}


def test_the_page_shows_the_smallest_kind_as_it_is():
    block = re.search(r"^```python\n(@dataclass.*?)^```", (ROOT / "docs/add_a_data_kind.md").read_text(), re.M | re.S)
    assert block is not None and block[1] in (ROOT / "tests/data/copying.py").read_text()
