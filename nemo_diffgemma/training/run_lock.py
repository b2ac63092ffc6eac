"""Run lock: rank 0 holds it while the run lasts, so that one process group works in a run directory.

    lock = RunLock(run_dir / LOCK)
    lock.acquire();  ...;  lock.release()

If flock works, the kernel knows who holds the file, and releases it when that process dies. If it does not work,
or reaches no further than one machine (some network file systems), what is written in the file decides: host, process
and job of the holder, who touches the file every few seconds. A holder that no longer does so is dead, and its lock is
taken over. The file stays, empty when nobody holds it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from nemo_diffgemma.errors import ConfigurationError

LOCK = "lock"
TOUCH_SECONDS = 5.0
PATIENCE_SECONDS = 300.0  # longer than file servers keep the locks of a machine that is gone
_NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class RunLock:
    """`file` is made when it is acquired first. Not collective: rank 0 alone has one."""

    def __init__(
        self, file: Path, touch_seconds: float = TOUCH_SECONDS, patience_seconds: float = PATIENCE_SECONDS
    ) -> None:
        self.file, self.touch_seconds, self.patience_seconds = file, touch_seconds, patience_seconds
        self._descriptor: int | None = None
        self._released = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Raises `ConfigurationError` with who holds it, OSError where the file cannot be written, or TimeoutError."""
        descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            locked = self._locked_or_waited(descriptor)
            token = self._write(descriptor)
            if locked is None:  # two may have come at the same time: the later one has it
                time.sleep(min(1.0, self.touch_seconds))
                holder = self._holder()
                if holder is None or holder.get("token") != token:
                    raise ConfigurationError(self._refusal(holder))
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        self._thread = threading.Thread(target=self._touch, name="run lock", daemon=True)
        self._thread.start()

    def _locked_or_waited(self, descriptor: int) -> bool | None:
        """As `_flock`, once no living process holds the file. Raises `ConfigurationError` for one that does.

        A holder of this very Slurm job is its own start before, which is about to end, or of which a file server still
        keeps the lock: it is waited for, and no user's mistake. So is one that has flock's lock and no name in the
        file: it is just beginning or ending.
        """
        deadline = time.monotonic() + self.patience_seconds
        while True:
            locked, holder = _flock(descriptor), self._holder()
            if locked is not False and (holder is None or not self._is_alive(holder)):
                return locked
            job = os.environ.get("SLURM_JOB_ID")
            if holder is not None and (job is None or holder.get("job") != job):
                raise ConfigurationError(self._refusal(holder))
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self._refusal(holder)} (waited for {self.patience_seconds:.0f} s)")
            time.sleep(self.touch_seconds)

    def release(self) -> None:
        """Let go of it, if it is held."""
        if self._descriptor is None:
            return
        self._released.set()
        os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)  # and with it flock's
        self._descriptor = None

    def _write(self, descriptor: int) -> str:
        token = uuid.uuid4().hex
        holder = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": _start_of(os.getpid()),
            "job": os.environ.get("SLURM_JOB_ID"),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "token": token,
        }
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode() + b"\n", 0)
        os.fsync(descriptor)
        return token

    def _touch(self) -> None:
        while not self._released.wait(self.touch_seconds):
            try:
                os.utime(self.file)
            except OSError:
                continue  # a file server that is away for a while

    def _holder(self) -> dict[str, Any] | None:
        """Who is written in the file: nobody where it is empty, an unknown one where it is damaged."""
        text = self.file.read_text(errors="replace")
        if not text.strip("\0\n "):
            return None
        try:
            holder = json.loads(text)
        except ValueError:
            holder = None
        return holder if isinstance(holder, dict) else {}

    def _is_alive(self, holder: dict[str, Any]) -> bool:
        """Ask the kernel about a process of this machine; for another machine, watch the file for a touch."""
        if holder.get("host") == socket.gethostname() and holder.get("started") is not None:
            return _start_of(holder.get("pid")) == holder["started"]
        before, deadline = self._touched(), time.monotonic() + 3 * self.touch_seconds
        while time.monotonic() < deadline:
            time.sleep(self.touch_seconds / 10)
            if self._touched() != before:
                return True
        return False

    def _touched(self) -> int:
        with self.file.open() as stream:  # opening it anew makes a network file system ask its server
            return os.fstat(stream.fileno()).st_mtime_ns

    def _refusal(self, holder: dict[str, Any] | None) -> str:
        named = holder or {}
        job = f", job {named['job']}" if named.get("job") else ""
        who = f"process {named.get('pid', '?')} on {named.get('host', 'an unknown machine')}{job}"
        since = f" since {named['since']}" if named.get("since") else ""
        return (
            f"{who} works in {self.file.parent}{since}, and two would write the same files; wait for its end, stop it, "
            "or give another exp_manager.version"
        )


def _flock(descriptor: int) -> bool | None:
    """Whether this process has it now; None where the file system has no such thing."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_FLOCK:
            return None
        raise
    return True


def _start_of(pid: Any) -> str | None:
    """When a process of this machine started, in the kernel's ticks: a number may have passed to another process."""
    try:
        return Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, ValueError, TypeError, IndexError):
        return None
