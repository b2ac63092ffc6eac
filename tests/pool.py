"""A pool of long-lived ranks: they start once a session, not once a test.

pool(2).run("tests.distributed.cases:logits", path=..., layout=dict(tensor=2))   # -> [result of rank 0, of rank 1]
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

from nemo_diffgemma.cli.child_process import end_with_parent
from tests.commands import fork_context


def free_port() -> int:
    """Nobody listens there, nor does a connection get it before a rank listens: the kernel deals out higher ones."""
    while True:
        port = random.randrange(18_100, 19_900)  # below: slurm/testcluster; above: jobs
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _work(
    rank: int, world: int, port: int, connection: Any, stacks: str, gpus: str, hidden_modules: tuple[str, ...]
) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        CUDA_VISIBLE_DEVICES=gpus,
    )
    faulthandler.register(signal.SIGUSR2, file=Path(stacks).open("w"))  # noqa: SIM115 - as long as the rank lives
    end_with_parent()  # stopped, they would not see it go
    for name in hidden_modules:
        sys.modules[name] = None  # type: ignore[assignment]  # importing it now fails as if it were not installed
    import torch

    torch.set_num_threads(1)
    from nemo_diffgemma.parallel import ParallelLayout, initialize

    initialize(ParallelLayout(), timeout=timedelta(seconds=120))
    connection.send("ready")
    while (job := connection.recv()) is not None:
        reference, arguments = job
        module, function = reference.split(":")
        try:
            connection.send(("ok", getattr(importlib.import_module(module), function)(**arguments)))
        except BaseException:
            connection.send(("error", traceback.format_exc()))
    torch.distributed.destroy_process_group()


class Pool:
    """`world` ranks; a job is a module-level function by name, run on all of them with the same arguments.

    `gpus` is their CUDA_VISIBLE_DEVICES: none makes them gloo ranks on the CPU, some makes them nccl ranks.
    """

    def __init__(self, world: int, gpus: str = "", hidden_modules: tuple[str, ...] = ()) -> None:
        port = free_port()
        # what has NeMo imported has looked for GPUs, and for modules
        context = multiprocessing.get_context("spawn") if gpus or hidden_modules else fork_context()
        self._connections, self._processes = [], []
        self._stacks = tempfile.TemporaryDirectory()
        for rank in range(world):
            ours, theirs = context.Pipe()
            stacks = f"{self._stacks.name}/{rank}"
            process = context.Process(
                target=_work, args=(rank, world, port, theirs, stacks, gpus, hidden_modules), daemon=False
            )
            process.start()
            self._connections.append(ours)
            self._processes.append(process)
        for connection in self._connections:
            if not connection.poll(180) or connection.recv() != "ready":
                self.kill()
                raise RuntimeError(f"a pool of {world} ranks did not start")

    def run(self, reference: str, /, timeout: float = 180, **arguments: Any) -> list[Any]:
        """Results of all ranks; raises with every rank's traceback, or kills the pool when a rank hangs."""
        self._send(signal.SIGCONT)
        for connection in self._connections:
            connection.send((reference, arguments))
        results = []
        for rank, connection in enumerate(self._connections):
            if not connection.poll(timeout):
                late = f"{reference}: rank {rank} gave no answer within {timeout} s"
                where = self._where_they_are()
                self.kill()
                raise TimeoutError(f"{late}\n{where}")
            try:
                results.append(connection.recv())
            except EOFError:
                self.kill()
                raise RuntimeError(f"{reference}: rank {rank} died") from None
        # idle they are stopped: the threads of gloo look for work all the time, with several pools half a core of it
        self._send(signal.SIGSTOP)
        errors = [f"rank {rank}:\n{value}" for rank, (kind, value) in enumerate(results) if kind == "error"]
        if errors:
            raise AssertionError("\n".join(errors))
        return [value for _, value in results]

    def _send(self, number: signal.Signals) -> None:
        for process in self._processes:
            if process.is_alive():
                os.kill(process.pid, number)

    def close(self) -> None:
        self._send(signal.SIGCONT)
        for connection, process in zip(self._connections, self._processes, strict=True):
            if process.is_alive():
                connection.send(None)
        for process in self._processes:
            process.join(20)
        self.kill()

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self._processes)

    def _where_they_are(self) -> str:
        """What every rank has answered, or else the stacks of its threads."""
        self._send(signal.SIGUSR2)  # training listens to the other one
        time.sleep(1)
        parts = []
        for rank, connection in enumerate(self._connections):
            answered = connection.recv()[1] if connection.poll() else None
            parts += [f"rank {rank}:", str(answered or (Path(self._stacks.name) / str(rank)).read_text())]
        return "\n".join(parts)

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()


class Pools:
    """Pools by what they were asked for; one that died is started again."""

    def __init__(self) -> None:
        self._pools: dict[tuple, Pool] = {}

    def get(self, world: int, **settings: Any) -> Pool:
        key = (world, *sorted(settings.items()))
        if key in self._pools and not self._pools[key].alive:
            self._pools.pop(key).kill()  # the others may be stopped
        if key not in self._pools:
            self._pools[key] = Pool(world, **settings)
        return self._pools[key]

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()
