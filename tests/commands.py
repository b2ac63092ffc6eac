"""Commands of ours as a user starts them, without what every start costs: nine seconds of importing NeMo.

They run in a process of their own, with arguments, environment, working directory, standard streams, signals and exit
code of their own; it is forked from one that has imported NeMo, of which there is one for each process of the tests.

    command = Command("launch/train.py", "model=tiny", SLURM_PROCID="0")
    command.send_signal(signal.SIGTERM)
    output, errors = command.communicate(timeout=60)
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path
from typing import IO, Any

from nemo_diffgemma.repository import ROOT


def fork_context() -> Any:
    """The context of `multiprocessing` whose processes begin with NeMo imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])
    with contextlib.chdir(ROOT):  # where it looks for them
        forkserver.ensure_running()
    return context


def _work(script: str, arguments: list[str], environment: dict[str, str], directory: str, streams: list[str]) -> None:
    assert "tests.preload" in sys.modules, "the server of forks has not imported it"
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, stream in enumerate(streams, 1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_APPEND), number)
    sys.argv[:] = [script, *arguments]
    try:
        if script.endswith(".py"):
            sys.path.insert(0, str(Path(script).parent))
            runpy.run_path(script, run_name="__main__")
        else:  # as with `python -c`
            exec(compile(script, "<string>", "exec"), {"__name__": "__main__"})
    finally:
        atexit._run_exitfuncs()


class Command:
    """A started command, with what is used of `subprocess.Popen`. `script` is a path in this repository, or source."""

    def __init__(self, script: str, *arguments: str, cwd: Path = ROOT, **environment: str) -> None:
        self.arguments, self.returncode = [script, *arguments], None
        self._streams = [tempfile.TemporaryFile() for _ in ("output", "errors")]  # noqa: SIM115 - communicate() closes them
        streams = [f"/proc/{os.getpid()}/fd/{stream.fileno()}" for stream in self._streams]
        path = str(ROOT / script) if script.endswith(".py") else script
        given = (path, list(arguments), {**os.environ, **environment}, str(cwd), streams)
        self._process = fork_context().Process(target=_work, args=given)
        self._process.start()
        atexit.register(self._process.kill)  # one that a failed test has left would be waited for
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        self.returncode = self._process.exitcode
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Standard output and error of a command that ends within `timeout` seconds; it is killed otherwise."""
        self._process.join(timeout)
        late = self.poll() is None
        if late:
            self._process.kill()
            self._process.join()
        output, errors = (self._read(stream) for stream in self._streams)
        if late:
            raise subprocess.TimeoutExpired(self.arguments, timeout, output, errors)
        return output, errors

    @staticmethod
    def _read(stream: IO[bytes]) -> str:
        with stream:
            stream.seek(0)
            return stream.read().decode(errors="replace")


def run(script: str, *arguments: str, timeout: float = 300, **given: Any) -> subprocess.CompletedProcess[str]:
    """A command from its start to its end."""
    command = Command(script, *arguments, **given)
    output, errors = command.communicate(timeout)
    assert command.returncode is not None
    return subprocess.CompletedProcess(command.arguments, command.returncode, output, errors)
