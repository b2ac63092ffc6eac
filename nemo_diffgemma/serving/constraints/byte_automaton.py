"""A regular expression -> a deterministic automaton over bytes, by `outlines-core` (Rust's regex-automata).

NUL stands around the expression as a mark, which is why no text of the language may have it. Behind the expression it
keeps the crate's leftmost-first matching from cutting branches off ("a|ab" alone refuses "ab"); in front of it, it
keeps the half of the crate's automaton that searches, which nobody asked for, from growing exponentially ("b.{0,20}b").

Shapes: S states, the last of them dead.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nemo_diffgemma.serving.constraints.errors import ConstraintError


@dataclass(frozen=True)
class ByteAutomaton:
    """`following` [S, 256] int32: the state behind a byte. `accepting` [S] bool. State S - 1 is `dead`."""

    following: NDArray[np.int32]
    accepting: NDArray[np.bool_]
    start: int

    @property
    def dead(self) -> int:
        return len(self.following) - 1

    def accepts(self, text: bytes) -> bool:
        state = self.start
        for byte in text:
            state = int(self.following[state, byte])
        return bool(self.accepting[state])


def byte_automaton(expression: str, most_states: int) -> ByteAutomaton:
    """The automaton of an expression that never matches NUL. Raises `ConstraintError` beyond `most_states`."""
    from outlines_core import Index, Vocabulary

    try:
        index = Index(rf"\x00(?:{expression})\x00", Vocabulary(256, {bytes([byte]): [byte] for byte in range(256)}))
    except ValueError as error:
        raise ConstraintError(f"the expression cannot be compiled: {' '.join(str(error).split())[:300]}") from None
    edges = index.get_transitions()
    numbers = {
        state: number for number, state in enumerate(sorted({*edges, *(t for m in edges.values() for t in m.values())}))
    }
    dead = len(numbers)
    if dead > most_states:
        raise ConstraintError(
            f"the constraint has {dead} states; expected at most {most_states}. Make repetitions and lengths smaller, "
            "or leave maxLength and maxItems out: strings and arrays without them need few states"
        )
    following = np.full((dead + 1, 256), dead, np.int32)
    for state, targets in edges.items():
        for byte, target in targets.items():
            if byte < 256:  # the last is the crate's end of text
                following[numbers[state], byte] = numbers[target]
    is_final = np.zeros(dead + 1, bool)
    is_final[[numbers[state] for state in index.get_final_states() if state in numbers]] = True
    accepting, start = is_final[following[:, 0]], int(following[numbers[index.get_initial_state()], 0])
    following[:, 0] = dead
    return ByteAutomaton(following, accepting, start)
