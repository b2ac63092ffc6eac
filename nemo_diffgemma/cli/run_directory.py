"""One run directory for a run: named once, by one process, and nobody else's."""

from __future__ import annotations

from datetime import datetime
from itertools import count
from typing import Any

from hydra.core.hydra_config import HydraConfig

from nemo_diffgemma.cli.configuration import is_multirun
from nemo_diffgemma.parallel import launcher


def fix_run_directory(config: Any) -> None:
    """Name the run after this moment, once, where it has no name, and make its directory, which no other run gets."""
    if not hasattr(config, "exp_manager") or config.exp_manager.version is not None:
        return
    job = f"-{HydraConfig.get().job.num}" if is_multirun() else ""
    moment = f"{datetime.now():%Y-%m-%d_%H-%M-%S}{job}"
    config.exp_manager.version = moment
    for again in count(2):
        if launcher.rank() != 0:
            return  # rank 0 names it
        try:
            config.exp_manager.run_dir.mkdir(parents=True)
            return
        except FileExistsError:  # another run started in this second
            config.exp_manager.version = f"{moment}_{again}"
        except OSError:
            return  # told by the run itself, on every rank


def agree_on_run_directory(config: Any) -> None:
    """Name the run by rank 0's clock if each process has composed its own configuration."""
    from nemo_diffgemma.parallel.agreement import from_rank_zero

    if hasattr(config, "exp_manager"):
        config.exp_manager.version = from_rank_zero(config.exp_manager.version)
