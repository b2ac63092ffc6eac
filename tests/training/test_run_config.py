"""A resumed run is the same run: what would make it another is refused, anything else is kept with its step."""

from __future__ import annotations

import json

import pytest
import yaml

from nemo_diffgemma.errors import ConfigurationError
from nemo_diffgemma.training.run_config import CHANGES, CONFIG, flat, keep
from tests.training.cases import config

OTHER_RUNS = {
    "seed": 7,
    "data__global_batch_size": 16,
    "data__test_puzzles": 9,
    "data__clues": (1, 2),
    "model__checkpoint": "/elsewhere",
    "model__architecture": {**config().model.architecture, "hidden_size": 64},
}
SAME_RUN = {
    "optim__lr": 0.5,
    "optim__betas": (0.5, 0.9),
    "trainer__max_steps": 9,
    "trainer__checkpoint_every": 3,
    "parallel__tensor": 2,
    "data__micro_batch_size": 2,
    "model__dtype": "bfloat16",
}
NO_PART = {"exp_manager__exp_dir": "/moved", "cluster__nodes": 4, "trainer__progress": True, "dry_run": True}


def test_everything_is_kept_as_it_was_composed(tmp_path):
    keep(config(), tmp_path, None)
    kept = yaml.safe_load((tmp_path / CONFIG).read_text())
    assert kept["data"]["clues"] == [0, 12] and kept["optim"]["lr"] == 1e-2 and kept["cluster"]["nodes"] == 1
    keep(config(**SAME_RUN), tmp_path, 3)
    assert yaml.safe_load((tmp_path / CONFIG).read_text()) == kept, "written once"


@pytest.mark.parametrize("key", OTHER_RUNS)
def test_another_run_is_refused_by_name(tmp_path, key):
    keep(config(), tmp_path, None)
    with pytest.raises(ConfigurationError, match=f"was started with {key.replace('__', '.')}.*exp_manager.version"):
        keep(config(**{key: OTHER_RUNS[key]}), tmp_path, 3)
    assert not (tmp_path / CHANGES).exists()
    keep(config(**{key: OTHER_RUNS[key]}), tmp_path, None)  # nothing to resume: it begins anew


@pytest.mark.parametrize("key", SAME_RUN)
def test_what_may_change_is_told_once_with_its_step(tmp_path, key):
    keep(config(), tmp_path, None)
    changed = config(**{key: SAME_RUN[key]})
    (told,) = keep(changed, tmp_path, 3)
    assert told.startswith(f"{key.replace('__', '.')} was ") and told.endswith("from step 4 on")
    (line,) = map(json.loads, (tmp_path / CHANGES).read_text().splitlines())
    dotted = key.replace("__", ".")
    assert line["step"] == 4 and line["changed"] == {dotted: [flat(config())[dotted], flat(changed)[dotted]]}
    assert keep(changed, tmp_path, 3) == keep(changed, tmp_path, 5) == [], "known already"


def test_changes_after_the_step_that_is_resumed_have_not_happened(tmp_path):
    keep(config(), tmp_path, None)
    keep(config(optim__lr=0.5), tmp_path, 6)
    assert keep(config(), tmp_path, 3) == [], "a damaged checkpoint was put aside: the run goes back"
    assert (tmp_path / CHANGES).read_text() == ""
    assert keep(config(optim__lr=0.5), tmp_path, 3) == ["optim.lr was 0.01 and is 0.5 from step 4 on"]


@pytest.mark.parametrize("key", NO_PART)
def test_where_and_how_a_run_is_started_is_no_part_of_it(tmp_path, key):
    keep(config(), tmp_path, None)
    assert keep(config(**{key: NO_PART[key]}), tmp_path, 3) == []


def test_a_relative_checkpoint_is_the_same_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keep(config(model__checkpoint="model"), tmp_path, None)
    assert keep(config(model__checkpoint=str(tmp_path / "model")), tmp_path, 1) == []
    monkeypatch.chdir("/")
    with pytest.raises(ConfigurationError, match=f"model.checkpoint={tmp_path}/model"):
        keep(config(model__checkpoint="model"), tmp_path, 1)


def test_a_run_of_an_older_version_has_no_configuration_and_goes_on(tmp_path):
    assert keep(config(), tmp_path, 3) == []
    with pytest.raises(ConfigurationError, match="seed=0"):
        keep(config(seed=1), tmp_path, 4)


def test_a_damaged_file_is_named(tmp_path):
    for text in ("- 1\n", "a: [", "seed: {"):
        (tmp_path / CONFIG).write_text(text)
        with pytest.raises(ConfigurationError, match=f"{tmp_path / CONFIG}.* is damaged"):
            keep(config(), tmp_path, 3)
