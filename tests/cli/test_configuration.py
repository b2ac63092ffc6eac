"""What conf/ and a command line say is checked against the schema; a wrong key is told with the right one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from export.build import BuildConfig
from nemo_diffgemma.cli import configuration, run_directory
from nemo_diffgemma.cli.torchrun import processes_of
from nemo_diffgemma.config import ModelConfig
from nemo_diffgemma.data.tasks import KINDS, task_class
from nemo_diffgemma.gpus import load_gpu
from nemo_diffgemma.parallel.threads import threads_of_process
from nemo_diffgemma.schema import ConfigurationError, TrainConfig, keys_of, unknown_key, validate
from tests.launch import verbs

CONF = configuration.CONF
ENTRY_POINTS: list[tuple[str, type, list[str]]] = [
    ("config", TrainConfig, []),
    ("generate", verbs.load("generate").GenerateConfig, ["checkpoint=x", "prompt=y"]),
    ("evaluate", verbs.load("evaluate").EvaluateConfig, ["checkpoint=x"]),
    ("convert", verbs.load("convert").ConvertConfig, ["source=x", "target=y"]),
    ("verify", verbs.load("verify").VerifyConfig, ["checkpoint=x"]),
]


def kind_with(key: str) -> dict[str, str]:
    """The first kind of data that has this key of `data`, as values of that group; of other groups nothing."""
    group, _, name = key.partition(".")
    kinds = (kind for kind in KINDS if name in task_class(kind).keys.__dataclass_fields__)
    return {"kind": next(kinds)} if group == "data" else {}


KEYS = [key for key in keys_of(TrainConfig) if key.count(".") == 1]


@pytest.fixture(autouse=True)
def hydra_conf() -> Iterator[None]:
    GlobalHydra.instance().clear()
    store = ConfigStore.instance().repo.copy()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield
    ConfigStore.instance().repo = store


def composed(name: str, schema: type, overrides: list[str]) -> Any:
    configuration.register(schema, name)
    return validate(compose(name, overrides), schema)


@pytest.mark.parametrize(("name", "schema", "overrides"), ENTRY_POINTS, ids=[name for name, *_ in ENTRY_POINTS])
def test_every_entry_point_composes_with_every_parallel_layout(name, schema, overrides):
    for layout in sorted((CONF / "parallel").glob("*.yaml")):
        found = composed(name, schema, [*overrides, f"parallel={layout.stem}"])
        assert processes_of(found.parallel) in (1, 2, 8)


@pytest.mark.parametrize("path", sorted(CONF.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}={path.stem}")
def test_every_option_of_every_group_composes_into_a_valid_run(path):
    option = f"{path.parent.name}={path.stem}"
    if path.parent.name == "sampler":
        composed("generate", verbs.load("generate").GenerateConfig, ["checkpoint=x", "prompt=y", option])
    elif path.parent.name == "gpu":
        gpu = composed("export_build", BuildConfig, ["checkpoint=x", "out=y", option]).gpu
        assert gpu == load_gpu(path.stem)
    else:
        ModelConfig(**composed("config", TrainConfig, [option]).model.architecture)


def test_without_an_entry_point_the_files_compose_too():
    assert compose("config", ["experiment=sudoku_cpu"]).parallel == {"tensor": 2, "expert": 2}


def test_the_released_sizes_are_the_defaults_of_the_model_configuration():
    found = composed("config", TrainConfig, ["model=diffusiongemma_26b_a4b"])
    assert ModelConfig(**found.model.architecture) == ModelConfig()


def test_the_sudoku_model_attends_beyond_its_window_and_is_small():
    model = ModelConfig(**composed("config", TrainConfig, ["experiment=sudoku_cpu"]).model.architecture)
    assert model.sliding_window < 18 < model.sliding_window + model.canvas_length


@pytest.mark.parametrize("key", KEYS)
def test_a_misspelt_key_is_told_with_the_right_one(key):
    group, _, name = key.rpartition(".")
    wrong = f"{group}.{name[:-2]}{name[-1]}" if len(name) > 3 else f"{group}.{name}{name[-1]}"
    with pytest.raises(ConfigurationError, match=f"unknown key {wrong}; did you mean {key}\\?"):
        validate({group: {wrong.rpartition(".")[2]: 1} | kind_with(key)}, TrainConfig)


@settings(deadline=None)
@given(st.sampled_from(KEYS), st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=12))
def test_any_unknown_key_names_itself_its_group_and_a_valid_key(key, name):
    group = key.partition(".")[0]
    assume(f"{group}.{name}" not in keys_of(TrainConfig))
    message = unknown_key(f"{group}.{name}", keys_of(TrainConfig))
    assert f"{group}.{name}" in message
    assert message.partition("did you mean ")[2].partition("?")[0] in keys_of(TrainConfig)
    assert f"Group {group} has" in message


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"lr": 1.0}, "unknown key lr; did you mean optim.lr?"),
        ({"data": {"global_batch_size": "many"}}, "data.global_batch_size: .*expected a whole number"),
        ({"data": {"clues": [1, 2, 3]}}, "data.clues=\\[1, 2, 3\\] has 3 values; expected 2"),
        ({"optim": {"lr": None}}, "optim.lr: .*expected a number"),
        ({"model": {"architecture": {"hiden_size": 8}}}, "did you mean model.architecture.hidden_size"),
        ({"model": {"objective": {"reduction": "mean"}}}, "objective.reduction='mean'; use 'example' or 'token'"),
        ({"optim": 3}, "optim"),
    ],
)
def test_what_is_ill_typed_or_out_of_place_is_refused(given, told):
    with pytest.raises(ConfigurationError, match=told):
        validate(given, TrainConfig)


def test_a_missing_key_and_a_missing_choice_say_what_to_write():
    with pytest.raises(ConfigurationError, match="checkpoint is not given and has no default; write checkpoint="):
        validate({"prompt": "x"}, verbs.load("generate").GenerateConfig)
    with pytest.raises(ConfigurationError, match="give one of prompt='some text', prompt=- .*prompt_ids=.*, not none"):
        validate({"checkpoint": "x"}, verbs.load("generate").GenerateConfig)


def test_two_runs_that_start_in_the_same_second_have_two_directories(tmp_path, monkeypatch):
    monkeypatch.setattr(run_directory, "is_multirun", lambda: False)
    monkeypatch.delenv("RANK", raising=False)
    directories = set()
    for _ in range(3):
        config = TrainConfig()
        config.exp_manager.exp_dir = str(tmp_path)
        run_directory.fix_run_directory(config)
        directories.add(config.exp_manager.run_dir)
    assert len(directories) == 3 and all(directory.is_dir() for directory in directories)


@pytest.mark.parametrize(
    ("started", "environment", "threads"),
    [
        (8, {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, 4),
        (8, {"WORLD_SIZE": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_CPUS_ON_NODE": "8"}, 4),
        (4, {"WORLD_SIZE": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_CPUS_ON_NODE": "8"}, 4),  # bound by srun
        (8, {"WORLD_SIZE": "4"}, 2),
        (8, {"SLURM_NTASKS_PER_NODE": "4"}, 8),  # one process inside an allocation
    ],
)
def test_processes_of_a_machine_share_its_cores(monkeypatch, started, environment, threads):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_STEP_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("SLURM_CPUS_ON_NODE", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(started)))
    assert threads_of_process() == threads


def test_no_file_of_launch_hides_an_installed_module():
    import importlib.util
    import sys

    elsewhere = [entry for entry in sys.path if Path(entry).resolve() != CONF.parent / "launch"]
    for file in (CONF.parent / "launch").glob("*.py"):
        assert file.stem not in sys.stdlib_module_names
        assert importlib.machinery.PathFinder.find_spec(file.stem, elsewhere) is None, file.name


@pytest.mark.parametrize("nothing", ["steps=[]", "levels=[]"])
def test_an_evaluation_of_nothing_is_refused(nothing):
    with pytest.raises(ConfigurationError, match="expected at least one of each"):
        composed("evaluate", verbs.load("evaluate").EvaluateConfig, ["checkpoint=x", nothing])
