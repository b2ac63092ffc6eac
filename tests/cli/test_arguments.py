"""Texts and paths of a command line arrive as they were typed, in every command and in the processes it starts."""

from __future__ import annotations

import dataclasses
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.core.config_store import ConfigStore
from hypothesis import example, given, settings
from hypothesis import strategies as st

from export.build import BuildConfig
from export.check import CheckConfig
from export.demo import DemoConfig
from export.roofline import RooflineConfig
from export.run import RunConfig
from export.show import ShowConfig
from nemo_diffgemma.cli import configuration, prompt
from nemo_diffgemma.cli.arguments import Texts
from nemo_diffgemma.fields import is_text_list, text_kind
from nemo_diffgemma.schema import ConfigurationError, TrainConfig, keys_of, validate
from tests.cli.test_configuration import kind_with
from tests.launch import verbs

COMMANDS: dict[str, tuple[type, list[str]]] = {
    "config": (TrainConfig, []),
    "generate": (verbs.load("generate").GenerateConfig, ["checkpoint=x", "prompt=y"]),
    "evaluate": (verbs.load("evaluate").EvaluateConfig, ["checkpoint=x"]),
    "convert": (verbs.load("convert").ConvertConfig, ["source=x", "target=y"]),
    "verify": (verbs.load("verify").VerifyConfig, ["checkpoint=x"]),
    "export_build": (BuildConfig, ["checkpoint=x", "out=y"]),
    "export_check": (CheckConfig, ["bundle=x"]),
    "export_run": (RunConfig, ["bundle=x", "prompt=y"]),
    "export_show": (ShowConfig, ["bundle=x"]),
    "export_roofline": (RooflineConfig, ["bundle=x"]),
    "export_demo": (DemoConfig, []),
    "serve_demo": (verbs.load("serve_demo").ServeDemoConfig, []),
}
CHECKED = {"prompt_file", "model.objective.reduction"}  # other values, or other keys beside them, are refused
TEXT_KEYS = [
    (command, key)
    for command, (schema, _) in COMMANDS.items()
    for key in keys_of(schema)
    if text_kind(schema, key) and key not in CHECKED and not key.startswith("gpu.")
]
NASTY = [
    '"Hi," he said. "Bye."', '"quoted"', "'quoted'", "???", "cost is ${5} today", "\\${5}", "ends in \\",
    "ends in \\\n",
    "[a,b]", "{a: b}", "runs/step=100", "a,b", " spaced ", "~", "~/x", "012345", "12:00:00", "off", "1.10", "", "é↵🙂",
    "choice(1,2)", "a=b=c", "NEMO_DIFFGEMMA_TEXT_0_", "line\nline", "${oc.env:HOME}", "#x", "a: b", "- x", "true",
]  # fmt: skip
texts = st.one_of(st.sampled_from(NASTY), st.text(max_size=30)).filter(lambda text: "\0" not in text)


@pytest.fixture(autouse=True, scope="module")
def schemas_of_others_stay() -> Iterator[None]:
    store = ConfigStore.instance().repo.copy()
    yield
    ConfigStore.instance().repo = store


def composed(command: str, *arguments: str) -> list[Any]:
    """The configurations of a command line; several with --multirun."""
    schema, needed = COMMANDS[command]
    found: list[Any] = []
    before, sys.argv = sys.argv, ["command", *needed, *arguments]
    try:
        configuration.compose(schema, command, "", found.append)
        assert sys.argv == ["command", *needed, *arguments]
    finally:
        sys.argv = before
    return found


def value(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = config[name] if isinstance(config, dict) else getattr(config, name)
    return config


def nested(key: str, value: Any) -> dict[str, Any]:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def frozen_again(config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    file = tmp_path / "config.json"
    file.write_text(configuration.freeze(config))
    monkeypatch.setenv(configuration.FROZEN, str(file))
    return configuration.frozen(type(config))


@pytest.mark.parametrize(("command", "key"), TEXT_KEYS, ids=[f"{command}-{key}" for command, key in TEXT_KEYS])
@settings(deadline=None, max_examples=8)
@given(text=texts)
def test_text_of_every_key_is_hidden_from_hydra_and_comes_back(command, key, text):
    schema, needed = COMMANDS[command]
    hidden = Texts(schema, [*needed, f"{key}={text}", f"+{key}={text}"])
    may_be_null = text_kind(schema, key).may_be_null and text == "null"
    for argument in hidden.arguments[len(needed) :]:
        name, _, given_to_hydra = argument.partition("=")
        assert name.lstrip("+") == key
        if not may_be_null:
            assert given_to_hydra.isidentifier()
            assert hidden.restore({"a": [given_to_hydra]}) == {"a": [text]}


@settings(deadline=None, max_examples=30)
@given(
    texts,
    texts,
    st.sampled_from(sorted({key for command, key in TEXT_KEYS if command == "config" and key != "data.kind"})),
)
def test_what_was_typed_is_what_other_processes_read(tmp_path_factory, text, other, key):
    with pytest.MonkeyPatch.context() as monkeypatch:
        values = nested(key, "PLACE")
        values = {group: part | kind_with(key) for group, part in values.items()} if "." in key else values
        config = validate(values, TrainConfig, lambda values: _replaced(values, text))
        config.cluster.environment["NAME"] = other
        again = frozen_again(config, tmp_path_factory.mktemp("frozen"), monkeypatch)
        assert value(again, key) == text and again.cluster.environment["NAME"] == other
        assert dataclasses.asdict(again) == dataclasses.asdict(config)


LISTS = [key for key in keys_of(TrainConfig) if is_text_list(TrainConfig, key)]
plain = texts.filter(lambda text: text.strip() and not set(text) & set("\"'\n,") and text != "null")


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(LISTS), st.lists(plain, min_size=1, max_size=3))
def test_texts_of_a_list_are_hidden_from_hydra_and_come_back(key, typed):
    """Commas part them; a single one needs no brackets. With quotes it is Hydra's own list."""
    wanted = [text.strip() for text in typed]
    argument = f"[{','.join(typed)}]"
    if not argument.strip("[] "):
        return
    hidden = Texts(TrainConfig, [f"{key}={argument}", f"+{key}=['a,b']"])
    assert hidden.arguments[1] == f"+{key}=['a,b']"
    name, _, given_to_hydra = hidden.arguments[0].partition("=")
    parts = given_to_hydra.removeprefix("[").removesuffix("]").split(",")
    assert name == key and all(part.isidentifier() for part in parts) and hidden.restore(parts) == wanted


def test_a_list_of_files_arrives_through_hydra():
    for argument in ("data.train=[runs/step=1.jsonl, b.jsonl]", "data.train=['runs/step=1.jsonl','b.jsonl']"):
        config = composed("config", "data=chat", argument)[0]
        assert config.data.train == ["runs/step=1.jsonl", "b.jsonl"]
    assert composed("config", "data=chat", "data.train=a=b.jsonl")[0].data.train == ["a=b.jsonl"]
    assert composed("config", "data=chat", "data.train=[]")[0].data.train == []


def _replaced(values: Any, text: str) -> Any:
    if isinstance(values, dict):
        return {key: _replaced(part, text) for key, part in values.items()}
    return text if values == "PLACE" else values


@settings(deadline=None, max_examples=10)
@given(st.lists(texts, min_size=3, max_size=3))
@example(NASTY[:3])
@example(NASTY[3:6])
@example(NASTY[6:9])
@example(["null", "a,b", "x"])
def test_a_command_line_arrives_through_hydra(found):
    prompt_text, path, time = found
    (config,) = composed("generate", f"prompt={prompt_text}", f"checkpoint={path}")
    assert (config.prompt, config.checkpoint) == (prompt_text, path)
    (config,) = composed(
        "config", f"exp_manager.name={path}", f"cluster.time={time}", f"cluster.environment.NAME={prompt_text}",
        f"cluster.sbatch.comment={path}",
    )  # fmt: skip
    assert (config.exp_manager.name, config.cluster.time) == (path, time)
    assert (config.cluster.environment["NAME"], config.cluster.sbatch["comment"]) == (prompt_text, path)


def test_null_is_null_where_a_key_may_be_it_and_text_elsewhere():
    (config,) = composed("config", "exp_manager.version=null", "cluster.time=null")
    assert (config.exp_manager.version, config.cluster.time) == (None, "null")
    assert composed("generate", "prompt=null")[0].prompt == "null"


def test_a_sweep_goes_over_texts_with_commas_and_takes_others_literally():
    configs = composed("generate", "--multirun", "prompt=a,'b, c'", "checkpoint=runs/step=100", "seed=1,2")
    assert [(c.prompt, c.checkpoint, c.seed) for c in configs] == [
        (text, "runs/step=100", seed) for text in ("a", "b, c") for seed in (1, 2)
    ]


def test_a_sweep_needs_no_folder_that_others_may_own(tmp_path, monkeypatch):
    """Hydra writes a multirun.yaml; that of another user lies in TMPDIR."""
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "multirun.yaml").mkdir()  # not even root can overwrite it
    assert len(composed("generate", "--multirun", "seed=1,2")) == 2
    assert [file.name for file in tmp_path.iterdir()] == ["multirun.yaml"]


def test_what_work_raises_leaves_as_it_is():
    class Defect(Exception):
        pass

    def fail(config: Any) -> None:
        raise Defect("of the work")

    before, sys.argv = sys.argv, ["command", "checkpoint=x", "prompt=y"]
    try:
        with pytest.raises(Defect, match="of the work"):
            configuration.compose(COMMANDS["generate"][0], "generate", "", fail)
    finally:
        sys.argv = before


# -- prompts -----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(text=st.text(max_size=40), end=st.sampled_from(["", "\n"]), from_file=st.booleans())
def test_a_prompt_of_a_file_or_of_standard_input_arrives_without_its_last_line_end(
    tmp_path_factory, text, end, from_file
):
    content = (text + end).encode()
    expected = text if end or not text.endswith("\n") else text[:-1]
    expected = expected.removesuffix("\r") if (text + end).endswith("\n") else expected
    if from_file:
        file = tmp_path_factory.mktemp("prompt") / "a = [b].txt"
        file.write_bytes(content)
        options = RunConfig("bundle", prompt_file=str(file))
        options.read_prompt()
    else:
        options = RunConfig("bundle", prompt="-")
        prompt._standard_input.cache_clear()
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
            options.read_prompt()
    assert (options.prompt, options.prompt_file) == (expected, None)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "not none"),
        ({"prompt": "a", "prompt_ids": [1]}, "not prompt and prompt_ids"),
        ({"prompt_file": "a", "prompt": ""}, "not prompt and prompt_file"),
    ],
)
def test_there_is_one_prompt(given, told):
    for schema in (RunConfig, COMMANDS["generate"][0]):
        with pytest.raises(ConfigurationError, match=told):
            schema("x", **given)


def test_what_is_no_text_is_refused_by_name(tmp_path):
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    for name, told in (("latin", "latin is not UTF-8 text"), ("nowhere", "cannot be read: No such file")):
        with pytest.raises(ConfigurationError, match=told):
            RunConfig("bundle", prompt_file=str(tmp_path / name)).read_prompt()
    with pytest.raises(ConfigurationError, match="give prompt_file=FILE"):
        RunConfig("bundle", prompt="-").read_prompt(launched=True)
