"""How the entry points of `export/` start: Hydra composes and checks, results go to standard output, JSON last.

Engines are built and run in one process, or in as many as a launcher (torchrun, srun) has started: nothing here starts
any. A user's error is one paragraph on standard error and exit code 2, a full disk one with exit code 1. SIGTERM ends
the work as an exception does, with exit code 143, so that nothing half-written stays.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("NEMO_REDIRECT_LOGS_TO_STDERR", "1")  # read when NeMo is first imported, if it is

from omegaconf import DictConfig

from nemo_diffgemma.cli.child_process import ChildCrash
from nemo_diffgemma.cli.configuration import compose, frozen, is_multirun
from nemo_diffgemma.cli.output import USER_ERROR, Results, paragraph, refuse
from nemo_diffgemma.cli.processes import started_by_others
from nemo_diffgemma.cli.slurm_job import Submission
from nemo_diffgemma.errors import UserError
from nemo_diffgemma.parallel.agreement import OtherRankFailure
from nemo_diffgemma.schema import validate

# Python put this folder on its path when it was given the script; its file names are not for other packages to import
sys.path[:] = [entry for entry in sys.path if entry != str(Path(sys.argv[0]).resolve().parent)]
warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


def start(work: Callable[[Any, Results], Mapping[str, Any]], schema: type, config_name: str) -> None:
    """Run `work(config, results)` with `conf/<config_name>.yaml` and the command line; its result is the JSON line."""

    started_by_others()
    given = frozen(schema)
    if given is not None:
        _run(work, given)
        return
    submission = Submission(work.__name__, sys.argv)

    def job(composed: DictConfig) -> None:
        try:
            config: Any = validate(composed, schema)
            if submission.takes(config):
                submission.add(config, sweep=is_multirun())
                return
        except UserError as error:
            refuse(error)
        _run(work, config)

    compose(schema, config_name, sys.modules[work.__module__].__doc__ or "", job)
    submission.send()


def _run(work: Callable[[Any, Results], Mapping[str, Any]], config: Any) -> None:
    results = Results(int(os.environ.get("RANK", 0)))
    try:
        with _ended_by_sigterm():
            results.close(work(config, results))
    except (UserError, OSError, ChildCrash, OtherRankFailure) as error:
        if "HYDRA_FULL_ERROR" in os.environ:
            traceback.print_exc()
        paragraph(str(error))
        # a full disk may be free another day: who has started us may try again, as nobody does after a refusal
        raise SystemExit(USER_ERROR if isinstance(error, UserError) else 1) from None
    if results.exit_code:
        raise SystemExit(results.exit_code)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Slurm's pre-emption, scancel and timeout send SIGTERM, at which Python would leave without cleaning up."""

    def leave(signum: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not disturb the cleaning up
        if isinstance(sys.exception(), SystemExit):
            return  # which has begun
        # again soon: where this interrupts a callback of a weak reference, the exception goes no further
        signal.signal(signal.SIGALRM, leave)
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGALRM) is leave:
            signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGTERM, before)
