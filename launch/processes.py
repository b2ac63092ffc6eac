"""How many processes an entry point needs, who starts them, and what becomes of their errors.

    launch(generate, GenerateConfig, "generate")        # the last line of an entry point

The layout alone says how many. Inside torchrun or an srun step of several tasks the processes are there already, and
each composes for itself. Otherwise this process composes once and, where more than one is needed, becomes torchrun: it
hands the composed configuration to its children in a file and turns what went wrong in them into one message.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("NEMO_REDIRECT_LOGS_TO_STDERR", "1")  # read when NeMo is first imported

from omegaconf import DictConfig, OmegaConf  # noqa: E402

from launch.configuration import compose  # noqa: E402
from launch.output import USER_ERROR, Results, paragraph, refuse  # noqa: E402
from nemo_diffgemma.training.schema import ConfigurationError, ParallelGroup, validate  # noqa: E402

# Python put this folder on its path when it was given the script; its file names are not for other packages to import
sys.path[:] = [entry for entry in sys.path if entry != str(Path(__file__).resolve().parent)]

_HANDOVER = "NEMO_DIFFGEMMA_HANDOVER"  # folder with config.yaml from the parent and error-<rank>.json for it

type Work = Callable[[Any, Results], Mapping[str, Any]]


def launch(work: Work, schema: type, config_name: str) -> None:
    """Run `work(config, results)` in as many processes as `config.parallel` needs; its result is the JSON line."""
    if _HANDOVER in os.environ:
        _run(work, validate(OmegaConf.load(Path(os.environ[_HANDOVER]) / "config.yaml"), schema))  # type: ignore[arg-type]
        return

    def job(composed: DictConfig) -> None:
        config = validate(composed, schema)
        _fix_run_directory(config)
        if started_by_others():
            _run(work, config)
        elif processes_of(config.parallel) == 1:
            _run(work, config)
        else:
            _become_torchrun(config, processes_of(config.parallel))

    try:
        compose(schema, config_name, sys.modules[work.__module__].__doc__ or "", job)
    except ConfigurationError as error:
        refuse(error)


# -- how many ----------------------------------------------------------------------------------------------------------


def layout_of(parallel: ParallelGroup) -> Any:
    """The `ParallelLayout` of a configuration. Raises `LayoutError`."""
    from nemo_diffgemma.parallel.layout import ParallelLayout

    return ParallelLayout(**{axis: size for axis, size in vars(parallel).items() if axis != "replicas"})


def processes_of(parallel: ParallelGroup) -> int:
    """Number of processes of a configuration."""
    if parallel.replicas < 1:
        raise ConfigurationError(f"parallel.replicas={parallel.replicas}; expected at least 1")
    return layout_of(parallel).world_size * parallel.replicas


def started_by_others() -> bool:
    """Whether torchrun, or srun with several tasks, has started this process as one of several."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return True
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        _as_torchrun_would()
        return True
    return False
