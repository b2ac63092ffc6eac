"""How many processes an entry point needs, who starts them, and what becomes of their errors.

    launch(generate, GenerateConfig, "generate")        # the last line of an entry point

The layout alone says how many. With a cluster (cluster=dgx_h100) they become a Slurm job: cluster.py. Inside torchrun
or an srun step of several tasks the processes are there already, and each composes for itself, or reads what whoever
started them has composed. Otherwise this process composes once and, where more than one is needed, becomes torchrun: it
hands the composed configuration to its children in a file and turns what went wrong in them into one message.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

os.environ.setdefault("NEMO_REDIRECT_LOGS_TO_STDERR", "1")  # read when NeMo is first imported

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from nemo_diffgemma.cli.configuration import FROZEN, compose, freeze, frozen, is_multirun
from nemo_diffgemma.cli.output import USER_ERROR, Results, paragraph, refuse
from nemo_diffgemma.cli.slurm_job import Submission
from nemo_diffgemma.parallel.threads import threads_of_process
from nemo_diffgemma.schema import ConfigurationError, ParallelGroup, validate

# Python put this folder on its path when it was given the script; its file names are not for other packages to import
sys.path[:] = [entry for entry in sys.path if entry != str(Path(sys.argv[0]).resolve().parent)]

# Imports make a million objects that stay: Python's collector would look through them again and again.
gc.set_threshold(50_000, 20, 100)

# That there is no CUDA, TransformerEngine or apex is no news, and every process would tell it.
warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)

_HANDOVER = "NEMO_DIFFGEMMA_HANDOVER"  # folder in which a torchrun parent looks for error-<rank>.json

type Work = Callable[[Any, Results], Mapping[str, Any]]


def launch(work: Work, schema: type, config_name: str) -> None:
    """Run `work(config, results)` in as many processes as `config.parallel` needs; its result is the JSON line."""
    given = frozen(schema)
    if given is not None:
        started_by_others()
        _run(work, given)
        return
    submission = Submission(work.__name__, sys.argv)

    def job(composed: DictConfig) -> None:
        config: Any
        try:
            config = validate(composed, schema)
            if submission.takes(config):
                submission.add(config, sweep=is_multirun())
                return
            processes = processes_of(config.parallel)
        except ValueError as error:
            refuse(error)
        others = started_by_others()
        _fix_run_directory(config)
        if others or (processes == 1 and not is_multirun()):
            _run(work, config)
        else:
            _become_torchrun(config, processes)

    compose(schema, config_name, sys.modules[work.__module__].__doc__ or "", job)
    submission.send()


# -- how many ----------------------------------------------------------------------------------------------------------


def processes_of(parallel: ParallelGroup) -> int:
    """Number of processes of a configuration."""
    if parallel.replicas < 1:
        raise ConfigurationError(f"parallel.replicas={parallel.replicas}; expected at least 1")
    return parallel.layout().world_size * parallel.replicas


def started_by_others() -> bool:
    """Whether torchrun, or srun with several tasks, has started this process as one of several."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return True
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        _as_torchrun_would()
        return True
    return False


def _as_torchrun_would() -> None:
    """Slurm's variables in torchrun's names."""
    step = os.environ
    for name, value in (
        ("RANK", step["SLURM_PROCID"]),
        ("WORLD_SIZE", step["SLURM_STEP_NUM_TASKS"]),
        ("LOCAL_RANK", step["SLURM_LOCALID"]),
        ("MASTER_PORT", str(20_000 + int(step["SLURM_JOB_ID"]) % 20_000)),
    ):
        os.environ.setdefault(name, value)
    if "MASTER_ADDR" not in os.environ:
        nodes = step.get("SLURM_STEP_NODELIST") or step["SLURM_JOB_NODELIST"]
        hosts = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        os.environ["MASTER_ADDR"] = hosts.stdout.split()[0]


# -- one of the processes ----------------------------------------------------------------------------------------------


def _run(work: Work, config: Any) -> None:
    rank = int(os.environ.get("RANK", 0))
    results = Results(rank)
    layout = config.parallel.layout()
    try:
        layout.check_world(int(os.environ.get("WORLD_SIZE", 1)))
    except ValueError as error:  # every rank has it, and none has started anything
        if rank == 0:
            refuse(error)
        raise SystemExit(USER_ERROR) from None
    try:
        from nemo_diffgemma.parallel import initialize, shutdown

        _set_threads(config)
        initialize(layout, timeout=_patience(config))
        _agree_on_run_directory(config)
        results.close(work(config, results))
        shutdown()
    except Exception as error:
        _leave(error, rank)
    if results.exit_code:
        raise SystemExit(results.exit_code)


def _patience(config: Any) -> timedelta:
    """How long a rank waits for the others: longer than until a hang is told, with the stacks of all."""
    hang_minutes = getattr(getattr(config, "trainer", None), "hang_minutes", 0.0)
    return timedelta(minutes=max(30.0, hang_minutes + 10.0))


def _set_threads(config: Any) -> None:
    threads = getattr(getattr(config, "trainer", None), "threads", 0)
    if threads:
        import torch

        torch.set_num_threads(threads)


def _fix_run_directory(config: Any) -> None:
    """Name the run after this moment, once, where it has no name, and make its directory, which no other run gets."""
    if not hasattr(config, "exp_manager") or config.exp_manager.version is not None:
        return
    job = f"-{HydraConfig.get().job.num}" if is_multirun() else ""
    moment = f"{datetime.now():%Y-%m-%d_%H-%M-%S}{job}"
    config.exp_manager.version = moment
    for again in count(2):
        if int(os.environ.get("RANK", 0)) != 0:
            return  # rank 0 names it
        try:
            config.exp_manager.run_dir.mkdir(parents=True)
            return
        except FileExistsError:  # another run started in this second
            config.exp_manager.version = f"{moment}_{again}"
        except OSError:
            return  # told by the run itself, on every rank


def _agree_on_run_directory(config: Any) -> None:
    """Where each process has composed for itself, rank 0's clock names the run."""
    import torch.distributed as dist

    if hasattr(config, "exp_manager") and dist.get_world_size() > 1:
        version = [config.exp_manager.version]
        dist.broadcast_object_list(version, src=0)
        config.exp_manager.version = version[0]


def _leave(error: Exception, rank: int) -> None:
    """Exit with this error told once, by whoever is to tell it."""
    is_users = isinstance(error, ValueError) and "HYDRA_FULL_ERROR" not in os.environ
    text = str(error) if is_users else "".join(traceback.format_exception(error))
    if _HANDOVER in os.environ:
        file = Path(os.environ[_HANDOVER]) / f"error-{rank}.json"
        file.write_text(json.dumps({"is_users": is_users, "text": text, "rank": rank, "time": time.time()}))
    else:
        if rank:
            time.sleep(10)  # rank 0 mostly has the same to say, and its launcher ends us meanwhile
        _tell(text, is_users)
    raise SystemExit(USER_ERROR if is_users else 1)


def _tell(text: str, is_users: bool) -> None:
    if is_users:
        paragraph(text)
    else:
        print(text, file=sys.stderr)


# -- the parent of several ---------------------------------------------------------------------------------------------


def _become_torchrun(config: Any, processes: int) -> None:
    """Run this script again in `processes` children and leave with their exit code, unless it is 0."""
    import torch
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if 0 < torch.cuda.device_count() < processes:
        refuse(
            f"parallel.* needs {processes} processes, one a GPU, but this machine has {torch.cuda.device_count()}; use "
            "a smaller layout (parallel=single), or hide the GPUs to run on the CPU: CUDA_VISIBLE_DEVICES= python ..."
        )
    for name in ("torch.distributed.elastic", "torch.distributed.run"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # we tell what happened ourselves
    threads = getattr(getattr(config, "trainer", None), "threads", 0) or threads_of_process(processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    command = ["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={processes}", *sys.argv]
    with tempfile.TemporaryDirectory(prefix="nemo_diffgemma.") as folder:
        file = Path(folder) / "config.json"
        file.write_text(freeze(config))
        os.environ |= {_HANDOVER: folder, FROZEN: str(file)}
        try:
            torchrun.run(torchrun.parse_args(command))
        except ChildFailedError as failed:
            raise SystemExit(_account(Path(folder), failed)) from None
        except SignalException as stopped:
            raise SystemExit(128 + stopped.sigval) from None
        finally:
            del os.environ[_HANDOVER], os.environ[FROZEN]


def _account(folder: Path, failed: Any) -> int:
    """Tell what the children left behind, in one message: a user's error before the others, the first of them."""
    told = sorted(
        (json.loads(file.read_text()) for file in folder.glob("error-*.json")),
        key=lambda error: (not error["is_users"], error["time"]),
    )
    rank, failure = failed.get_first_failure()
    if told:
        _tell(told[0]["text"], told[0]["is_users"])
        return USER_ERROR if told[0]["is_users"] else 1
    if failure.exitcode < 0:
        paragraph(f"process {rank} was ended by {failure.signal_name()}; if it is SIGKILL, memory may have run out")
        return 128 - failure.exitcode
    return failure.exitcode
