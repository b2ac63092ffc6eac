"""An automaton over bytes, lifted to tokens: classes of tokens that lead from each state to the same one.

A token is a map of states to states. A walk over the vocabulary's trie computes one map a distinct pair of (class of
the parent, class of the byte), so a vocabulary of 262,144 tokens ends in some hundred classes within a tenth of a
second. DINGO (arXiv 2505.23061) runs on the automaton over tokens; classes and shared sets of them make it small.

Two states and two classes are added: from an accepting state an end-of-sequence token leads to `ended`, where any
number of them may follow; nothing leaves `dead`. Tokens without text (special ones) are of the last class.

Shapes: S live states and behind them ended and dead, K classes of text and behind them end and none, V ids, E edges.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nemo_diffgemma.serving.constraints.byte_automaton import ByteAutomaton
from nemo_diffgemma.serving.constraints.errors import ConstraintError
from nemo_diffgemma.serving.constraints.trie import Trie

UNREACHABLE = 1 << 30
Numbers = NDArray[np.int32]


@dataclass(frozen=True)
class Edges:
    """Edges between states, [E] each: `source`, `target`, and the set of classes (`label`) any of which leads along it.

    Sets are shared: class `member[m]` is one of the set `member_of[m]`.
    """

    source: Numbers
    target: Numbers
    label: Numbers
    member: Numbers
    member_of: Numbers

    @property
    def labels(self) -> int:
        return int(self.label.max()) + 1


@dataclass(frozen=True, eq=False)
class TokenAutomaton:
    """`following` [K + 2, S + 2]: the state behind a token of a class. `class_of_id` [V].

    `distance` [S + 2] is the fewest tokens from a state to an accepting one; an ended text has arrived.
    """

    following: Numbers
    class_of_id: Numbers
    distance: Numbers
    start: int
    edges: Edges

    @property
    def ended(self) -> int:
        return self.following.shape[1] - 2

    @property
    def dead(self) -> int:
        return self.following.shape[1] - 1

    @property
    def end_class(self) -> int:
        return len(self.following) - 2

    @property
    def accepting(self) -> NDArray[np.bool_]:
        return self.distance == 0


def token_automaton(automaton: ByteAutomaton, trie: Trie, vocab_size: int, eos_ids: tuple[int, ...]) -> TokenAutomaton:
    """Lift `automaton` to tokens. Raises `ConstraintError` where the vocabulary cannot spell a string of it."""
    maps, of_token = _classes(automaton, trie)
    live, distance = _live_states(automaton, maps)
    number = np.full(len(live), -1, np.int32)
    number[live] = np.arange(live.sum())
    maps, renamed = np.unique(number[maps][:, live], axis=0, return_inverse=True)  # fewer states: classes may coincide
    of_token = renamed.ravel()[of_token]
    leads = (maps >= 0).any(1)
    of_token = np.where(leads, np.cumsum(leads) - 1, leads.sum() + 1)[of_token]  # of no use: like tokens without text
    following = _with_end(maps[leads], distance[live] == 0)
    class_of_id = np.full(vocab_size, len(following) - 1, np.int32)
    inside = trie.ids < vocab_size
    class_of_id[trie.ids[inside]] = of_token[inside]
    class_of_id[[id for id in eos_ids if id < vocab_size]] = len(following) - 2
    distances = np.r_[distance[live], 0, UNREACHABLE].astype(np.int32)
    return TokenAutomaton(following, class_of_id, distances, int(number[automaton.start]), _edges(following))


def _classes(automaton: ByteAutomaton, trie: Trie) -> tuple[Numbers, NDArray[np.int64]]:
    """The distinct maps of states [classes, S] that tokens are, and the one of each token of the trie."""
    by_byte, byte_class = np.unique(automaton.following, axis=1, return_inverse=True)
    byte_class, kinds = byte_class.ravel(), by_byte.shape[1]
    maps = [np.arange(len(automaton.following), dtype=np.int32)]  # of the empty string
    known = {maps[0].tobytes(): 0}
    continued: dict[int, int] = {}
    of_token = np.zeros(len(trie.ids), np.int64)
    of_node = np.zeros(1, np.int64)
    for depth, level in enumerate(trie.levels, 1):
        keys, own = np.unique(of_node[level.parent] * kinds + byte_class[level.byte], return_inverse=True)
        for key in keys.tolist():
            if key not in continued:
                after = by_byte[maps[key // kinds], key % kinds].astype(np.int32)
                continued[key] = known.setdefault(after.tobytes(), len(maps))
                if continued[key] == len(maps):
                    maps.append(after)
        of_node = np.array([continued[key] for key in keys.tolist()])[own]
        ending = trie.depth == depth
        of_token[ending] = of_node[trie.node[ending]]
    used, of_token = np.unique(of_token, return_inverse=True)
    return np.array([maps[index] for index in used], np.int32), of_token.ravel()


def _live_states(automaton: ByteAutomaton, maps: Numbers) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """States that tokens reach from the start and that reach acceptance, [S] bool; fewest tokens to there, [S]."""
    source, target = np.broadcast_to(np.arange(maps.shape[1]), maps.shape), maps
    pairs = np.unique(
        source[target != automaton.dead].astype(np.int64) * maps.shape[1] + target[target != automaton.dead]
    )
    source, target = pairs // maps.shape[1], pairs % maps.shape[1]
    reached = np.zeros(maps.shape[1], bool)
    front = np.array([automaton.start])
    while len(front):
        reached[front] = True
        new = target[np.isin(source, front)]
        front = np.unique(new[~reached[new]])
    distance = np.where(automaton.accepting, 0, UNREACHABLE).astype(np.int64)
    steps, front = 0, np.flatnonzero(automaton.accepting)
    while len(front):
        steps += 1
        new = source[np.isin(target, front)]
        front = np.unique(new[distance[new] > steps])
        distance[front] = steps
    live = reached & (distance < UNREACHABLE)
    if not live[automaton.start]:
        raise ConstraintError("no text of the constraint can be written with the tokens of this vocabulary")
    return live, distance


def _with_end(maps: Numbers, accepting: NDArray[np.bool_]) -> Numbers:
    """Maps of live states (-1: none follows) with the states ended and dead, and the classes end and none."""
    classes, states = maps.shape
    following = np.full((classes + 2, states + 2), states + 1, np.int32)
    following[:classes, :states] = np.where(maps < 0, states + 1, maps)
    following[classes, :states][accepting] = states
    following[classes, states] = states
    return following


def _edges(following: Numbers) -> Edges:
    dead = following.shape[1] - 1
    label, source = np.nonzero(following[:-1, :-1] != dead)
    target = following[label, source]
    order = np.lexsort((label, source, target))
    label, source, target = label[order].astype(np.int32), source[order], target[order]
    first = np.flatnonzero(np.r_[True, (source[1:] != source[:-1]) | (target[1:] != target[:-1])])
    sets: dict[bytes, int] = {}
    ends = np.r_[first[1:], len(label)]
    of_edge = [
        sets.setdefault(label[a:b].tobytes(), len(sets)) for a, b in zip(first.tolist(), ends.tolist(), strict=True)
    ]
    members = [np.frombuffer(content, np.int32) for content in sets]
    return Edges(
        source[first].astype(np.int32),
        target[first].astype(np.int32),
        np.array(of_edge, np.int32),
        np.concatenate(members),
        np.repeat(np.arange(len(members), dtype=np.int32), [len(part) for part in members]),
    )
