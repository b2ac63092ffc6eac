"""Turn signals that end a command into exceptions, so that nothing half-written stays."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_STUCK_SECONDS = 20.0  # in one call of a library; launchers send SIGKILL after 30

_handlers: list[Callable[[int, FrameType | None], None]] = []  # installed now


@contextmanager
def leaving_at_signals() -> Iterator[None]:
    """Raise SystemExit (143 for SIGTERM, 130 for SIGINT) where a signal interrupts the block.

    Signals that are ignored, or that the command has a handler of its own for (training saves first), stay as they are.
    """
    code = 0
    leaving = threading.Event()

    def leave(number: int, frame: FrameType | None) -> None:
        nonlocal code
        leaving.set()
        code = code or 128 + number
        for other in before:
            signal.signal(other, signal.SIG_IGN)  # a second one must not disturb the cleaning up
        if _is_leaving():
            return
        # again soon: where this interrupts a callback of a weak reference, the exception goes no further
        signal.signal(signal.SIGALRM, leave)
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        raise SystemExit(code)

    default = (signal.SIG_DFL, signal.default_int_handler)
    before = {number: handler for number in SIGNALS if (handler := signal.getsignal(number)) in default}
    for number in before:
        signal.signal(number, leave)
    _handlers.append(leave)
    try:
        with _end_where_stuck(leave, leaving):
            yield
    finally:
        _handlers.remove(leave)
        if signal.getsignal(signal.SIGALRM) is leave:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
        for number, handler in before.items():
            if signal.getsignal(number) is leave:
                signal.signal(number, handler)


def _forget_in_fork() -> None:
    """A forked process (a data loader's worker) must end as usual, and not clean up what is its parent's."""
    if _handlers:
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            if signal.getsignal(number) in _handlers:
                signal.signal(number, signal.SIG_DFL)


os.register_at_fork(after_in_child=_forget_in_fork)


def _is_leaving() -> bool:
    """Whether what is interrupted is the cleaning up after an earlier signal."""
    error = sys.exception()
    while error is not None and not isinstance(error, SystemExit):
        error = error.__context__
    return error is not None


@contextmanager
def _end_where_stuck(handler: object, leaving: threading.Event) -> Iterator[None]:
    """End the process some time after a signal that Python cannot handle: a library waits, for other ranks maybe."""
    readable, writable = os.pipe()
    os.set_blocking(writable, False)

    def watch() -> None:
        while received := os.read(readable, 1):
            number = received[0]
            if number in SIGNALS and signal.getsignal(number) is handler and not leaving.wait(_STUCK_SECONDS):
                os._exit(128 + number)
        os.close(readable)

    threading.Thread(target=watch, daemon=True).start()
    before = signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writable)
