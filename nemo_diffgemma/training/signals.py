"""Signals that ask a run to stop, kept until the run looks for them. Imports nothing that takes time."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Whether a signal has asked this process to stop."""

    SIGNALS = (signal.SIGUSR1, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def listen(self) -> None:
        """Keep these signals for later instead of dying of them."""
        for number in self.SIGNALS:
            signal.signal(number, self._keep)

    def _keep(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """`listen`, with the old handlers back at the end; what was received before counts."""
        before = {number: signal.getsignal(number) for number in self.SIGNALS}
        try:
            self.listen()
            yield self
        finally:
            self.received = None
            for number, handler in before.items():
                signal.signal(number, handler)


REQUEST = StopRequest()  # of this process
