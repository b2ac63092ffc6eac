"""What a caller says about the answer of one sequence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nemo_diffgemma.serving.constraints.token_automaton import TokenAutomaton


@dataclass(frozen=True)
class Constraint:
    """The answer must be of the automaton's language within `max_tokens`, with the `locked` tokens in their places.

    `max_tokens` None is as many as are generated. `locked` maps positions of the answer, from 0, to ids.
    """

    automaton: TokenAutomaton
    max_tokens: int | None = None
    locked: Mapping[int, int] = field(default_factory=dict)
