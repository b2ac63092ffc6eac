"""Hydra for every entry point: composes `conf/`, checks the result against a schema, explains what is wrong with it.

    compose(GenerateConfig, "generate", __doc__, work)      # calls work(config) for each job, several with --multirun
    file.write_text(freeze(config)); frozen(GenerateConfig)     # as composed here, in processes that others start

Hydra writes nothing here: no output folder, no log files, no change of directory.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_diffgemma.cli.output import refuse
from nemo_diffgemma.data.tasks import KINDS, DataGroup, task_class
from nemo_diffgemma.repository import CONF
from nemo_diffgemma.schema import explain, keys_of, unknown_key, validate

FROZEN = "NEMO_DIFFGEMMA_CONFIG"  # in the environment: a file that `freeze` made, instead of a command line
_QUIET = [
    "hydra.run.dir=.",
    f"hydra.sweep.dir={tempfile.gettempdir()}",  # of --multirun; Hydra leaves a multirun.yaml there
    "hydra.sweep.subdir=.",
    "hydra.output_subdir=null",
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
    "hydra/help=entry_point",
]


def register(schema: type, name: str, documentation: str = "") -> None:
    """Make `schema` what `schema` in a defaults list of conf/ means, and `documentation` as what --help prints."""
    node = OmegaConf.structured(schema)
    if get_type_hints(schema).get("data") is DataGroup:
        _register_data(node)
    if "model" in node:
        # fields of ModelConfig that a YAML file leaves out may be overridden too; `validate` knows them
        OmegaConf.set_struct(node.model.architecture, False)
    if "cluster" in node:  # names that are not ours to list
        OmegaConf.set_struct(node.cluster.environment, False)
        OmegaConf.set_struct(node.cluster.sbatch, False)
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
    node.data = OmegaConf.structured(DataGroup)  # else those of the default kind stay beside them
    for kind in KINDS:
        keys = OmegaConf.structured(task_class(kind).keys)
        ConfigStore.instance().store(group="schema/data", name=kind, node=keys)  # where a file of conf/data starts
        if not (CONF / "data" / f"{kind}.yaml").is_file():
            ConfigStore.instance().store(group="data", name=kind, node=keys)


def compose(schema: type, config_name: str, documentation: str, work: Callable[[DictConfig], None]) -> None:
    """Compose `conf/<config_name>.yaml` with the command line and call `work` with it.

    Where Hydra cannot compose, prints one paragraph and exits.
    """
    register(schema, config_name, documentation)
    arguments, errors = sys.argv, os.environ.get("HYDRA_FULL_ERROR")

    @hydra.main(config_path=str(CONF), config_name=config_name, version_base="1.3")
    def job(config: DictConfig) -> None:
        restore()
        work(config)

    def restore() -> None:
        sys.argv = arguments
        os.environ.pop("HYDRA_FULL_ERROR", None)
        if errors is not None:
            os.environ["HYDRA_FULL_ERROR"] = errors

    try:
        multirun = [argument for argument in arguments if argument in ("-m", "--multirun")]
        others = [argument for argument in arguments[1:] if argument not in multirun]
        # Hydra's parser wants its overrides in one piece
        sys.argv = [arguments[0], *multirun, *map(_literal, others), *_QUIET]
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra is to raise; we print
        job()
    except OmegaConfBaseException as error:
        refuse(explain(error, schema))
    except HydraException as error:
        refuse(_explain(error, schema))
    finally:
        restore()


def is_multirun() -> bool:
    """Whether this job is one of a sweep."""
    return HydraConfig.get().mode == RunMode.MULTIRUN


def freeze(config: Any) -> str:
    """A validated configuration as JSON."""
    text = json.dumps(dataclasses.asdict(config), indent=2)
    return text.replace("${", "\\\\${") + "\n"  # text, no interpolations any more


def frozen[Schema](schema: type[Schema]) -> Schema | None:
    """The configuration that whoever started this process has composed, if it did."""
    file = os.environ.get(FROZEN)
    return None if file is None else validate(json.loads(Path(file).read_text()), schema)


def _literal(argument: str) -> str:
    """A prompt is text as it is: quote it, so that Hydra does not look for its grammar in it."""
    key, _, text = argument.partition("=")
    if key != "prompt" or (len(text) > 1 and text[0] == text[-1] and text[0] in "'\""):
        return argument
    escaped = re.sub(r"(\\*)(\"|$)", lambda found: found[1] * 2 + ("\\" if found[2] else "") + found[2], text)
    return f'{key}="{escaped}"'.replace("${", "\\${")


def _explain(error: HydraException, schema: type) -> str:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OmegaConfBaseException):
            return explain(cause, schema)
        cause = cause.__cause__
    text = str(error)
    named = re.search(r"Could not (?:override|append to config\. An item is already at) '([\w./@]+)'", text)
    if named and named[1] not in keys_of(schema):
        return unknown_key(named[1], keys_of(schema))
    text = text.partition("Config search path:")[0]
    return re.sub(r"\s*\n\s*", " ", text.strip())
