"""Hydra for every entry point: composes `conf/`, checks the result against a schema, explains what is wrong with it.

    compose(GenerateConfig, "generate", __doc__, work)      # calls work(config) for each job, several with --multirun
    file.write_text(freeze(config)); frozen(GenerateConfig)     # as composed here, in processes that others start

Texts and paths of the command line are taken literally: arguments.py. Hydra writes nothing here: no output folder, no
log files, no change of directory.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_type_hints

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_diffgemma.cli.arguments import Texts
from nemo_diffgemma.data.tasks import KINDS, DataGroup, task_class
from nemo_diffgemma.fields import relaxed
from nemo_diffgemma.parallel.agreement import known_to_all
from nemo_diffgemma.repository import CONF
from nemo_diffgemma.schema import ConfigurationError, check_values, explain, instance, keys_of, unknown_key, validate

FROZEN = "NEMO_DIFFGEMMA_CONFIG"  # in the environment: a file that `freeze` made, instead of a command line
_QUIET = [
    "hydra.run.dir=.",
    "hydra.sweep.subdir=.",
    "hydra.output_subdir=null",
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
    "hydra/help=entry_point",
]


class _Raised(BaseException):
    """Carries an error of the work through Hydra, which would print it in its own way."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def register(schema: type, name: str, documentation: str = "") -> None:
    """Make `schema` what `schema` in a defaults list of conf/ means, and `documentation` as what --help prints."""
    node = OmegaConf.structured(relaxed(schema))  # `validate` sees what YAML made of a value, not a conversion of it
    if get_type_hints(schema).get("data") is DataGroup:
        _register_data(node)
    if "model" in node:
        # fields of ModelConfig that a YAML file leaves out may be overridden too; `validate` knows them
        OmegaConf.set_struct(node.model.architecture, False)
    if "cluster" in node:  # names that are not ours to list
        OmegaConf.set_struct(node.cluster.environment, False)
        OmegaConf.set_struct(node.cluster.sbatch, False)
    if "adapters" in node:
        OmegaConf.set_struct(node.adapters, False)
    ConfigStore.instance().store(group="schema", name="entry_point", node=node)
    groups = "Groups (group=option):\n\n$APP_CONFIG_GROUPS\n" if "model" in node else ""
    template = f"{documentation}\n{groups}Keys, as composed now (key=value):\n\n$CONFIG"
    ConfigStore.instance().store(
        group="hydra/help",
        name="entry_point",
        node={"app_name": name, "header": "", "footer": "", "template": template},
    )


def _register_data(node: DictConfig) -> None:
    """Make `data=<kind>` bring the keys of its kind, also where conf/data has no file of that name."""
    node.data = OmegaConf.structured(relaxed(DataGroup))  # else those of the default kind stay beside them
    for kind in KINDS:
        keys = OmegaConf.structured(relaxed(task_class(kind).keys))
        ConfigStore.instance().store(group="schema/data", name=kind, node=keys)  # where a file of conf/data starts
        if not (CONF / "data" / f"{kind}.yaml").is_file():
            ConfigStore.instance().store(group="data", name=kind, node=keys)


def compose[Schema](schema: type[Schema], config_name: str, documentation: str, work: Callable[[Schema], None]) -> None:
    """Compose `conf/<config_name>.yaml` with the command line, check it and call `work` with it.

    Raises what `work` raises, and `ConfigurationError` for what cannot be composed or is not what `schema` says.
    """
    register(schema, config_name, documentation)
    texts = Texts(schema, sys.argv[1:])

    def job(composed: DictConfig) -> None:
        try:
            with _hydra_environment(before):
                work(_checked(composed, schema, texts))
        except Exception as error:
            raise _Raised(error) from None

    main = hydra.main(config_path=str(CONF), config_name=config_name, version_base="1.3")(job)
    before = (sys.argv, os.environ.get("HYDRA_FULL_ERROR"))
    # Hydra leaves a multirun.yaml in the folder of a sweep, which nobody else may have
    with tempfile.TemporaryDirectory(prefix="nemo_diffgemma.") if texts.sweeps else _nothing() as folder:
        # Hydra's parser wants its overrides in one piece
        flags = [argument for argument in texts.arguments if argument in ("-m", "--multirun")]
        others = [argument for argument in texts.arguments if argument not in flags]
        sweep = [f"hydra.sweep.dir={folder}"] if folder else []
        try:
            with _hydra_environment(([sys.argv[0], *flags, *others, *_QUIET, *sweep], "1")):  # it is to raise; we print
                main()
        except _Raised as raised:
            raise raised.error from None
        except Exception as error:
            explanation = _explain(error, schema, others)
            if explanation is None:
                raise
            raise known_to_all(ConfigurationError(explanation)) from None
        finally:
            GlobalHydra.instance().clear()


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _hydra_environment(values: tuple[list[str], str | None]) -> Iterator[None]:
    """sys.argv and HYDRA_FULL_ERROR with these values."""
    before = (sys.argv, os.environ.get("HYDRA_FULL_ERROR"))

    def take(arguments: list[str], full_error: str | None) -> None:
        sys.argv = arguments
        os.environ.pop("HYDRA_FULL_ERROR", None)
        if full_error is not None:
            os.environ["HYDRA_FULL_ERROR"] = full_error

    take(*values)
    try:
        yield
    finally:
        take(*before)


def _checked[Schema](composed: DictConfig, schema: type[Schema], texts: Texts) -> Schema:
    """Raises `ConfigurationError`, for keys of a group with the file that was chosen for it. Every rank composes."""
    try:
        return validate(composed, schema, texts.restore)
    except ConfigurationError as error:
        key = re.match(r"[\w.]+", str(error))
        group = key[0].partition(".")[0] if key and "in quotes" in str(error) else ""
        choice = HydraConfig.get().runtime.choices.get(group)
        text = f"{error} (in {group}/{choice}.yaml?)" if choice else str(error)
        raise known_to_all(ConfigurationError(text)) from None


def is_multirun() -> bool:
    """Whether this job is one of a sweep."""
    return HydraConfig.get().mode == RunMode.MULTIRUN


def freeze(config: Any) -> str:
    """A validated configuration as JSON."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def frozen[Schema](schema: type[Schema]) -> Schema | None:
    """The configuration that whoever started this process has composed, if it did; texts in it are as they are."""
    file = os.environ.get(FROZEN)
    if file is None:
        return None
    try:
        values = json.loads(Path(file).read_bytes())
    except ValueError as error:
        raise ConfigurationError(f"{FROZEN}={file} is no JSON ({error}); unset it, or submit the job again") from None
    if not isinstance(values, dict):
        raise ConfigurationError(f"{FROZEN}={file} holds no configuration; unset it, or submit the job again")
    return instance(schema, values)


def _explain(error: Exception, schema: type, arguments: list[str]) -> str | None:
    """Why Hydra could not compose; None where that is a defect."""
    cause: BaseException | None = error
    broken = _broken_file(arguments)
    while cause is not None:
        if isinstance(cause, OmegaConfBaseException):
            return broken or explain(cause, schema)
        cause = cause.__cause__
    if broken or not isinstance(error, HydraException):
        return broken or _no_option(arguments)
    text = str(error)
    if chosen := re.match(r"In '([\w./-]+)/([\w.-]+)'", text):
        broken = _misused_file(arguments, schema, chosen[1], chosen[2])
        if broken:
            return broken
    named = re.search(r"Could not (?:override|append to config\. An item is already at) '([\w./@]+)'", text)
    if named and named[1] not in keys_of(schema):
        return unknown_key(named[1], keys_of(schema))
    text = text.partition("Config search path:")[0]
    return re.sub(r"\s*\n\s*", " ", text.strip())


def _broken_file(arguments: list[str]) -> str | None:
    """What is wrong with a file of conf/, or of the folders given with --config-dir; None if nothing is."""
    for file in (file for folder in _folders(arguments) for file in sorted(folder.rglob("*.yaml"))):
        try:
            content = OmegaConf.load(file)
        except UnicodeDecodeError:
            return f"{file} is not UTF-8 text; save it as UTF-8"
        except (yaml.YAMLError, OmegaConfBaseException, ValueError, OSError) as problem:
            return f"{file} is no YAML that can be read: {' '.join(str(problem).split())}"
        if not isinstance(content, DictConfig):
            return f"{file} holds a list; expected keys and values"
    return None


def _no_option(arguments: list[str]) -> str | None:
    """Which argument gives a group something that is no name, as gpu=null does; None if none does."""
    for argument in arguments:
        group, _, value = argument.partition("=")
        options = sorted({file.stem for folder in _folders(arguments) for file in (folder / group).glob("*.yaml")})
        if group and options and value not in options:
            return f"{argument}: {group} is a group of files; use one of {', '.join(options)}"
    return None


def _misused_file(arguments: list[str], schema: type, group: str, option: str) -> str | None:
    """What is wrong with the keys of `group/option.yaml`; None if nothing is."""
    for folder in _folders(arguments):
        file = folder / group / f"{option}.yaml"
        if file.is_file():
            values = OmegaConf.to_container(OmegaConf.load(file))
            assert isinstance(values, dict)
            values.pop("defaults", None)
            try:
                check_values({group: values} if group in get_type_hints(schema) else values, schema)
            except ConfigurationError as error:
                return f"{error} (in {file})"
    return None


def _folders(arguments: list[str]) -> list[Path]:
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    given = [value.partition("=")[2] or after for value, after in pairs if re.match(r"(--config-dir|-cd)(=|$)", value)]
    return [*map(Path, given), CONF]
