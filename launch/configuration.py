"""Hydra for every entry point: composes `conf/`, checks the result against a schema, explains what is wrong with it.

    composed(GenerateConfig, "generate", __doc__, work)      # calls work(config) for each job, several with --multirun

Hydra writes nothing here: no output folder, no log files, no change of directory.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_diffgemma.training.schema import ConfigurationError, explain, keys_of, unknown_key, validate

CONF = Path(__file__).resolve().parents[1] / "conf"
_QUIET = [
    "hydra.run.dir=.",
    "hydra.sweep.dir=.",
    "hydra.sweep.subdir=.",
    "hydra.output_subdir=null",
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
    "hydra/help=entry_point",
]


def register(schema: type, name: str, documentation: str = "") -> None:
    """Make `schema` available to Hydra as `<name>_schema`, and `documentation` as what --help prints."""
    node = OmegaConf.structured(schema)
    if "model" in node:
        # fields of ModelConfig that a YAML file leaves out may be overridden too; `validate` knows them
        OmegaConf.set_struct(node.model.architecture, False)
    ConfigStore.instance().store(name=f"{name}_schema", node=node)
    groups = "Groups (group=option):\n\n$APP_CONFIG_GROUPS\n" if "model" in node else ""
    template = f"{documentation.replace('$', '$$')}\n{groups}Keys, as composed now (key=value):\n\n$CONFIG"
    ConfigStore.instance().store(
        group="hydra/help", name="entry_point", node={"app_name": name, "header": "", "footer": "", "template": template}
    )


def compose(schema: type, config_name: str, documentation: str, work: Callable[[DictConfig], None]) -> None:
    """Compose `conf/<config_name>.yaml` with the command line and call `work` with it, resolved.

    Raises `ConfigurationError` in place of Hydra's and OmegaConf's errors.
    """
    register(schema, schema_name(config_name), documentation)
    arguments = sys.argv
    shown, os.environ["HYDRA_FULL_ERROR"] = os.environ.get("HYDRA_FULL_ERROR"), "1"  # raise: we print it ourselves

    @hydra.main(config_path=str(CONF), config_name=config_name, version_base="1.3")
    def job(config: DictConfig) -> None:
        validate(config, schema)
        work(config)

    try:
        sys.argv = [*arguments, *_QUIET]
        job()
    except OmegaConfBaseException as error:
        raise ConfigurationError(explain(error, schema)) from None
    except HydraException as error:
        raise ConfigurationError(_explain(error, schema)) from None
    finally:
        sys.argv = arguments
        if shown is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = shown


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
    return re.sub(r"\s*\n\s*", "; ", text.strip())
