"""Places of an answer whose token is given: which places and ids mean something. No torch.

A locked cell is no question any more, so at every step the network's distribution there is taken to have all its mass
on the given id: it is the arg-max and the sample, its entropy is 0 (it is accepted and uses none of the entropy bound),
and its self-conditioning signal is its own row of the token table, as it would be of a network that is sure of it. As
everywhere, a canvas has no signal at its first step.

What is locked is part of the answer: an end-of-sequence token, locked or not, ends it only behind the last locked place
or in it.
"""

from __future__ import annotations

from collections.abc import Mapping

from nemo_diffgemma.errors import UserError


def check_locked(locked: Mapping[int, int], tokens: int, vocab_size: int) -> None:
    """Raise `UserError` unless each place is one of `tokens` and each id is a token."""
    if not locked:
        return
    first, last = min(locked), max(locked)
    if first < 0 or last >= tokens:
        place = first if first < 0 else last
        raise UserError(f"locked position {place}; expected 0 to {tokens - 1}, those of max_tokens={tokens}")
    for place, id in locked.items():
        if not 0 <= id < vocab_size:
            raise UserError(f"locked position {place} has id {id}; expected an id from 0 to {vocab_size - 1}")
