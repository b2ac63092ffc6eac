"""The replicas of this node: started, watched, and started again when they end. asyncio, no torch."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable

from nemo_diffgemma.cli.reporting import USER_ERROR
from nemo_diffgemma.serving.settings import FrontSettings

STARTED_BY = "NEMO_DIFFGEMMA_FRONT"  # in the environment of replicas: whose end is theirs
_LONELY_SECONDS = 60.0  # without the front end, after which its replicas end; they end with its process anyway
_BACKOFF = (1.0, 60.0)  # seconds before a replica is started again: the first time, and at most
_CALM_SECONDS = 120.0  # up for so long, a replica has no history
_FAILED_STARTS = 3  # of replicas that never served; then the server gives up
_TERM_SECONDS = 10.0  # from SIGTERM to SIGKILL
_log = logging.getLogger(__name__)


class StartError(Exception):
    """No replica could be started; `exit_code` is that of the last one. It has said why on standard error."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"no replica could be started; the last one ended with code {exit_code}")
        self.exit_code = exit_code


class Supervisor:
    """`address` is where the replicas find the front end; `on_end(name, why)` hears of each process that ends."""

    def __init__(self, settings: FrontSettings, address: str, on_end: Callable[[str, str], None]) -> None:
        self._settings, self._address, self._on_end = settings, address, on_end
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        self._served: set[str] = set()
        self._closing = False
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> asyncio.Task[None]:
        """Start all; the task ends with `StartError` if nothing comes of it."""
        self._tasks = [asyncio.create_task(self._keep(index)) for index in range(len(self._settings.replicas))]
        return asyncio.create_task(self._wait())

    async def _wait(self) -> None:
        await asyncio.gather(*self._tasks)

    def served(self, name: str) -> None:
        """This replica is ready."""
        self._served.add(name)

    def kill(self, name: str) -> None:
        """End the processes of a replica that is given up: it may be stuck."""
        if name in self._processes:
            _signal(self._processes[name], signal.SIGKILL)

    async def close(self) -> None:
        """End all: those that have been told to drain, which may need a moment, then the rest."""
        self._closing = True
        processes = list(self._processes.values())
        for number, seconds in ((signal.SIGTERM, _TERM_SECONDS), (signal.SIGKILL, 5.0)):
            for process in processes:
                _signal(process, number)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.gather(*(process.wait() for process in processes)), seconds)
                break
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _keep(self, index: int) -> None:
        """A replica, again and again."""
        pause, failed = _BACKOFF[0], 0
        for life in range(1 << 30):
            name, began = f"replica-{index}.{life}", time.monotonic()
            code = await self._live(index, name)
            if self._closing:
                return
            if name not in self._served:
                failed += 1
                if not self._served and (code == USER_ERROR or failed == _FAILED_STARTS):
                    raise StartError(code)
            else:
                failed = 0
            if time.monotonic() - began > _CALM_SECONDS:
                pause = _BACKOFF[0]
            _log.warning("%s ended with code %d; started again in %g s", name, code, pause)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _BACKOFF[1])

    async def _live(self, index: int, name: str) -> int:
        """One life of a replica -> its exit code."""
        command = [
            *self._settings.replicas[index],
            f"front={self._address}",
            f"name={name}",
            f"lonely_seconds={_LONELY_SECONDS}",
        ]
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=sys.stderr.fileno(),  # standard output is the server's
            env={**os.environ, **self._settings.environments[index], STARTED_BY: str(os.getpid())},
            start_new_session=True,  # Ctrl-C is for the front end, which lets them answer first
        )
        self._processes[name] = process
        try:
            code = await process.wait()
        finally:
            del self._processes[name]
            _signal(process, signal.SIGKILL)  # and ranks that the first one has left
        self._on_end(name, f"its process ended with code {code}")
        return code


def _signal(process: asyncio.subprocess.Process, number: int) -> None:
    """To a replica and all that it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
