"""The parent of several processes: becomes torchrun, and turns what went wrong in its children into one message.

It has composed once; the children run the same script and read the configuration that it leaves them in a file.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from nemo_diffgemma.cli.configuration import FROZEN, freeze
from nemo_diffgemma.cli.reporting import HANDOVER, print_error, print_report, reports
from nemo_diffgemma.cli.signals import SIGNALS
from nemo_diffgemma.parallel.threads import threads_of_process
from nemo_diffgemma.schema import ConfigurationError, ParallelGroup


def processes_of(parallel: ParallelGroup) -> int:
    """Number of processes of a configuration."""
    if parallel.replicas < 1:
        raise ConfigurationError(f"parallel.replicas={parallel.replicas}; expected at least 1")
    return parallel.layout().world_size * parallel.replicas


def run_in_processes(config: Any, processes: int) -> None:
    """Run this script again in `processes` children and leave with their exit code, unless it is 0."""
    import torch
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if 0 < torch.cuda.device_count() < processes:
        raise ConfigurationError(
            f"parallel.* needs {processes} processes, one a GPU, but this machine has {torch.cuda.device_count()}; use "
            "a smaller layout (parallel=single), or hide the GPUs to run on the CPU: CUDA_VISIBLE_DEVICES= python ..."
        )
    for name in ("torch.distributed.elastic", "torch.distributed.run"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # we tell what happened ourselves
    threads = getattr(getattr(config, "trainer", None), "threads", 0) or threads_of_process(processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    command = ["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={processes}"]
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        with tempfile.TemporaryDirectory(prefix="nemo_diffgemma.") as folder:
            file = Path(folder) / "config.json"
            file.write_text(freeze(config))
            os.environ |= {HANDOVER: folder, FROZEN: str(file)}
            try:
                torchrun.run(torchrun.parse_args([*command, f"--log-dir={folder}", *sys.argv]))  # it leaves a folder
            except ChildFailedError as failed:
                raise SystemExit(_exit_code(Path(folder), failed)) from None
            finally:
                os.environ.pop(HANDOVER), os.environ.pop(FROZEN)
    except SignalException as stopped:  # of torchrun's handlers; the children have had the signal too
        raise SystemExit(128 + stopped.sigval) from None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _exit_code(folder: Path, failed: Any) -> int:
    """Print one report of the children's: the first user error, else the first of any kind -> exit code."""
    left_behind = reports(folder)
    rank, failure = failed.get_first_failure()
    if left_behind:
        print_report(left_behind[0])
        return left_behind[0]["exit_code"]
    if failure.exitcode < 0:
        print_error(f"process {rank} was ended by {failure.signal_name()}; if it is SIGKILL, memory may have run out")
        return 128 - failure.exitcode
    return failure.exitcode
