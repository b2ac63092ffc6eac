"""What a replica asks of an engine: the PyTorch network's (`serving.engine`), or one of a bundle (`export`)."""

from __future__ import annotations

from typing import Protocol

from nemo_diffgemma.serving.messages import Facts
from nemo_diffgemma.serving.request import Event, Request


class Backend(Protocol):
    """Answers requests pass by pass. On every rank the same calls come in the same order, and the same is done."""

    passes: int  # so far

    def add(self, request: Request) -> None:
        """Queue a request. Raises `UserError` for one that can never be answered here, or has what is not done here."""

    def cancel(self, id: str) -> list[Event]:
        """End a request at once, wherever it is; unknown ones are over already."""

    def step(self) -> list[Event]:
        """Run one pass, if there is anything to run, and report what is known by now."""

    @property
    def has_work(self) -> bool:
        """Whether some request is not answered."""

    @property
    def requests(self) -> list[Request]:
        """Those that are not answered."""

    @property
    def counts(self) -> tuple[int, int]:
        """How many of them run, and how many wait."""

    def facts(self) -> Facts:
        """What the front end must know of it; what is known of the text is the replica's to add."""
