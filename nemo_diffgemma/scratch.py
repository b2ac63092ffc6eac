"""Directories for a while: beside a target until it is complete, or under TMPDIR as long as this process lives.

    with scratch_directory(target.parent, target.name) as partial:      # gone afterwards, unless it was renamed
        write(partial); follow_umask(partial); partial.rename(target)

A scratch directory vanishes with its block, whatever exception ends it (commands make SIGTERM and SIGINT one). What
SIGKILL left is removed when the next one is made in the same place: names carry host and process, and the owner holds a
lock, so nothing of a living process or of another machine on a shared file system is touched.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import re
import secrets
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_NAME = re.compile(r"\.(?P<what>.+)\.(?P<host>[^.]+)\.(?P<pid>\d+)\.[0-9a-f]{8}\.partial")
_SETTLED = 60.0  # seconds after which an owner that lives has certainly taken its lock


@contextlib.contextmanager
def scratch_directory(parent: Path, what: str, private: bool = False) -> Iterator[Path]:
    """A new directory `.<what>.<host>.<pid>.<random>.partial` in `parent`. Raises OSError."""
    sweep(parent)
    owner, lock = os.getpid(), None
    place = parent / f".{what[:60]}.{_host()}.{owner}.{secrets.token_hex(4)}.partial"
    try:
        place.mkdir(mode=0o700 if private else 0o777)
        lock = _lock(place, wait=True)  # another's sweep may be looking at it
        yield place
    finally:
        if lock is not None:
            os.close(lock)
        if os.getpid() == owner:  # not in a forked child
            shutil.rmtree(place, ignore_errors=True)


def temporary_directory(what: str) -> tuple[Path, contextlib.ExitStack]:
    """A private directory under TMPDIR until the process ends, or until the second value is closed. Raises OSError."""
    stack = contextlib.ExitStack()
    place = stack.enter_context(scratch_directory(Path(tempfile.gettempdir()), what, private=True))
    atexit.register(_close_undisturbed, stack)
    return place, stack


def _close_undisturbed(stack: contextlib.ExitStack) -> None:
    """At the end of the process: what is removed may be large, and a second signal would leave the rest of it."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(number, signal.SIG_IGN)
    stack.close()


def sweep(parent: Path) -> None:
    """Remove what processes of this machine and this user that were killed have left in `parent`."""
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        for entry in entries:
            match = _NAME.fullmatch(entry.name)
            if match is None or match["host"] != _host() or not entry.is_dir(follow_symlinks=False):
                continue
            if entry.stat(follow_symlinks=False).st_uid == os.geteuid() and _is_abandoned(entry, int(match["pid"])):
                shutil.rmtree(entry.path, ignore_errors=True)


def _is_abandoned(entry: os.DirEntry[str], pid: int) -> bool:
    """Nobody holds its lock; a process number may be another's by now, or of another container."""
    dead = not Path(f"/proc/{pid}").exists()
    try:
        lock = _lock(Path(entry.path))
    except OSError:  # held
        return False
    if lock is None:  # a file system without locks
        return dead
    os.close(lock)
    return dead or time.time() - entry.stat().st_ctime > _SETTLED


def _lock(place: Path, wait: bool = False) -> int | None:
    """Open `place` and lock it; None where the file system has no locks. Raises BlockingIOError where it is held."""
    descriptor = os.open(place, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname()) or "localhost"


def follow_umask(directory: Path) -> None:
    """Give everything below the permissions that the umask gave `directory`: some writers and copies keep others.

    A file with a second name elsewhere is left as it is.
    """
    mode = directory.stat().st_mode & 0o777
    for folder, _, files in os.walk(directory):
        os.chmod(folder, mode | os.stat(folder).st_mode & 0o7000)  # setgid: what is in it belongs to the group
        for name in files:
            file = Path(folder, name)
            if not file.is_symlink() and file.stat().st_nlink == 1:
                file.chmod(mode & 0o666)


def put_on_disk(path: Path) -> None:
    """Have the kernel write a file, or the names in a directory, to the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def obstacle(target: Path, is_directory: bool) -> str | None:
    """Why `target` cannot become a new directory (or file), or None. An empty directory is a place for a directory."""
    try:
        if target.is_dir() and not is_directory:
            return f"{target} is a directory, but one file is to be written; give e.g. {target / 'model.nemo'}"
        if target.is_dir() and os.path.ismount(target):
            return f"{target} is a mount point, which cannot be replaced; give a path inside it"
        if os.path.lexists(target) and (target.is_symlink() or not target.is_dir() or any(target.iterdir())):
            return f"{target} exists already; delete it or give another path"
        ancestor = next(parent for parent in target.absolute().parents if os.path.lexists(parent))
        if not ancestor.is_dir():
            return f"cannot write {target}: {ancestor} is not a directory; give another path"
        if not os.access(ancestor, os.W_OK | os.X_OK):
            return f"cannot write {target}: {ancestor} is not yours to write; give another path"
    except OSError as error:
        return f"cannot write {target}: {error}"
    return None
