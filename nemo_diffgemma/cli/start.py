"""How every command starts and ends.

    start(generate, GenerateConfig, "generate", distributed=True)        # the last line of an entry point

Hydra composes and checks; results go to standard output, JSON last. With a cluster (cluster=dgx_h100) runs become a
Slurm job: slurm_job.py. What a `distributed` command does is done in as many processes as `config.parallel` needs, in
process groups: those that torchrun or srun started, else processes started here: torchrun.py. Other commands run in
one process, or in as many as a launcher started. Errors: reporting.py. SIGTERM, SIGINT and SIGHUP end a command as an
exception does, with exit code 128 + signal: signals.py.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ.setdefault("NEMO_REDIRECT_LOGS_TO_STDERR", "1")  # read when NeMo is first imported, if it is

from nemo_diffgemma.cli.child_process import end_with_parent
from nemo_diffgemma.cli.configuration import compose, frozen, is_multirun
from nemo_diffgemma.cli.output import Results
from nemo_diffgemma.cli.reporting import exit_after
from nemo_diffgemma.cli.run_directory import agree_on_run_directory, fix_run_directory
from nemo_diffgemma.cli.signals import leaving_at_signals
from nemo_diffgemma.cli.slurm_job import Submission
from nemo_diffgemma.cli.torchrun import processes_of, run_in_processes
from nemo_diffgemma.parallel import launcher
from nemo_diffgemma.parallel.agreement import known_to_all
from nemo_diffgemma.parallel.layout import LayoutError
from nemo_diffgemma.scratch import sweep

# Python put this folder on its path when it was given the script; its file names are not for other packages to import
sys.path[:] = [entry for entry in sys.path if entry != str(Path(sys.argv[0]).resolve().parent)]

# Imports make a million objects that stay: Python's collector would look through them again and again.
gc.set_threshold(50_000, 20, 100)

# Every process would warn that there is no CUDA, TransformerEngine or apex: no news.
warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.distributed\.checkpoint")  # Megatron's to heed
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)

type Work = Callable[[Any, Results], Mapping[str, Any]]


def start(work: Work, schema: type, config_name: str, *, distributed: bool = False) -> None:
    """Run `work(config, results)` with `conf/<config_name>.yaml` and the command line; its result is the JSON line.

    Leaves with SystemExit where the exit code is not 0.
    """
    try:
        with leaving_at_signals():
            _start(work, schema, config_name, distributed)
    except Exception as error:
        exit_after(error)


def _start(work: Work, schema: type, config_name: str, distributed: bool) -> None:
    sweep(Path(tempfile.gettempdir()))  # an archive that a killed command has unpacked, 52 GB of the released model
    launched = launcher.started_by_launcher()
    config = frozen(schema)
    if config is not None:  # started by torchrun.py, each in a session of its own
        end_with_parent()
        _run(work, config, distributed)
        return
    submission = Submission(work.__name__, sys.argv)

    def job(config: Any) -> None:
        if submission.takes(config):
            submission.add(config, sweep=is_multirun())
            return
        processes = processes_of(config.parallel) if distributed else 1
        if hasattr(config, "read_prompt"):
            config.read_prompt(launched)
        fix_run_directory(config)
        if launched or not distributed or (processes == 1 and not is_multirun()):
            _run(work, config, distributed)
        else:
            run_in_processes(config, processes)

    compose(schema, config_name, sys.modules[work.__module__].__doc__ or "", job)
    submission.send()


def _run(work: Work, config: Any, distributed: bool) -> None:
    """The work of one of the processes."""
    if distributed:
        try:
            config.parallel.layout().check_world(int(os.environ.get("WORLD_SIZE", 1)))
        except LayoutError as error:  # every rank has it, and none has started anything
            raise known_to_all(error) from None
    results = Results(launcher.rank())
    if not distributed:
        results.close(work(config, results))
    else:
        from nemo_diffgemma.parallel import initialize, shutdown

        _set_threads(config)
        initialize(config.parallel.layout(), timeout=_patience(config))
        agree_on_run_directory(config)
        results.close(work(config, results))
        shutdown()
    if results.exit_code:
        raise SystemExit(results.exit_code)


def _patience(config: Any) -> timedelta:
    """How long a rank waits for the others: longer than the watchdog, which reports a hang with all stacks."""
    hang_minutes = getattr(getattr(config, "trainer", None), "hang_minutes", 0.0)
    return timedelta(minutes=max(30.0, hang_minutes + 10.0))


def _set_threads(config: Any) -> None:
    threads = getattr(getattr(config, "trainer", None), "threads", 0)
    if threads:
        import torch

        torch.set_num_threads(threads)
