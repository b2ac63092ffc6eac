"""What a replica asks of an engine: the PyTorch network's (`serving.engine`), or one of a bundle (`export`)."""

from __future__ import annotations

from typing import Protocol

from nemo_diffgemma.serving.constraints.token_automaton import TokenAutomaton
from nemo_diffgemma.serving.messages import Facts
from nemo_diffgemma.serving.request import Event, Request


class Backend(Protocol):
    """Answers requests pass by pass. On every rank the same calls come in the same order, and the same is done."""

    passes: int  # so far

    def check(self, request: Request) -> None:
        """Raise `UserError` for a request that can never be answered here, or asks for what is not done here."""

    def add(self, request: Request, automaton: TokenAutomaton | None = None) -> None:
        """Queue a request; `automaton` is that of its language. Raises `UserError` for one that can never be answered.

        That no text of the language fits is such an error too.
        """

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
