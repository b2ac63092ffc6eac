"""What a caller says about the answer of one sequence."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_diffgemma.serving.constraints.token_automaton import TokenAutomaton


@dataclass(frozen=True)
class Constraint:
    """The answer must be of the automaton's language within `max_tokens`; None is as many as are generated."""

    automaton: TokenAutomaton
    max_tokens: int | None = None
