"""Paths through random automata against the plain formula, to the bit: of equal paths both choose the same.

Shapes: n automata, C positions, K classes, S states, the last of which is dead.
"""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_diffgemma.serving.constraints import paths
from nemo_diffgemma.serving.constraints.paths import Automata, best_classes, states_after
from nemo_diffgemma.serving.constraints.token_automaton import TokenAutomaton, _edges

CPU = torch.device("cpu")
BATCHES = given(seed=st.integers(0, 2**32), rows=st.integers(1, 3), positions=st.integers(1, 9), rounded=st.booleans())


def automaton(draw: np.random.Generator) -> TokenAutomaton:
    """Any token leads anywhere, many nowhere; the last class and the last state lead nowhere at all."""
    classes, states = draw.integers(2, 12), draw.integers(2, 15)
    following = draw.integers(0, states, (classes, states)).astype(np.int32)
    following[draw.random(following.shape) < draw.choice([0.0, 0.5, 0.9])] = states - 1
    following[0, 0] = 0  # one edge at least
    following[-1], following[:, -1] = states - 1, states - 1
    class_of_id = draw.integers(0, classes, 20).astype(np.int32)
    return TokenAutomaton(following, class_of_id, np.zeros(states, np.int32), 0, _edges(following))


def several(seed: int, rows: int, rounded: bool) -> tuple[np.random.Generator, list[TokenAutomaton], Automata]:
    """Some automata, alone and as a batch, and where more is drawn from."""
    draw = np.random.default_rng(seed)
    made = [automaton(draw) for _ in range(rows)]
    return draw, made, Automata.joined([Automata.of(one, CPU) for one in made], rounded)


def plain(made: TokenAutomaton, maxima_CK: np.ndarray, viable_S: np.ndarray) -> list[int] | None:
    """The best path from state 0: of equal ones that of the smallest last state, then the smallest one before, then the
    smallest class. None where there is no path."""
    states = made.following.shape[1]
    leads_KSS = made.following[..., None] == np.arange(states)
    leads_KSS[:, :, -1] = False
    scores = [np.where(np.arange(states) == 0, 0.0, -np.inf)]
    along = []
    for maxima_K in maxima_CK:
        best_SS = np.where(leads_KSS, maxima_K[:, None, None], -np.inf).max(0).astype(np.float64)
        along.append(scores[-1][:, None] + best_SS)
        scores.append(along[-1].max(0))
    last_S = np.where(viable_S, scores[-1], -np.inf)
    if last_S.max() == -np.inf:
        return None
    state, path = int(last_S.argmax()), []
    for maxima_K, along_SS in zip(maxima_CK[::-1], along[::-1], strict=True):
        before = int(along_SS[:, state].argmax())
        path.append(int(np.where(leads_KSS[:, before, state], maxima_K, -np.inf).argmax()))
        state = before
    return path[::-1]


@settings(max_examples=200)
@BATCHES
def test_paths_are_those_of_the_plain_formula(seed, rows, positions, rounded):
    draw, made, joined = several(seed, rows, rounded)
    maxima = draw.integers(0, draw.integers(1, 4), (rows, positions, joined.following.shape[1])).astype(np.float32)
    if draw.random() < 0.5:  # sums that are rounded; else equal ones
        maxima *= draw.normal(size=maxima.shape).astype(np.float32) * 10
    active = draw.integers(0, positions + 1, rows)
    viable = draw.random((rows, joined.states)) < 0.6
    for row, one in enumerate(made):  # what was joined to equal sizes leads nowhere, however probable
        maxima[row, :, one.following.shape[0] :] = 1e4
        viable[row, one.following.shape[1] - 1 :] = False
    maxima_nCK = torch.from_numpy(maxima)
    if draw.random() < 0.5:  # as a CPU's sweep has them in memory
        maxima_nCK = maxima_nCK.transpose(1, 2).contiguous().transpose(1, 2)
    active_nC = torch.arange(positions) < torch.from_numpy(active)[:, None]
    start_n = torch.zeros(rows, dtype=torch.long)
    found = best_classes(joined, maxima_nCK, start_n, torch.from_numpy(viable), active_nC)
    for row, one in enumerate(made):
        classes, states = one.following.shape
        expected = plain(one, maxima[row, : active[row], :classes], viable[row, :states])
        if expected is not None:
            assert found[row, : active[row]].tolist() == expected


@settings(max_examples=60)
@BATCHES
def test_states_are_those_of_token_after_token(seed, rows, positions, rounded):
    draw, made, joined = several(seed, rows, rounded)
    tokens, active = draw.integers(0, 20, (rows, positions)), draw.integers(0, positions + 1, rows)
    expected = []
    for one, ids, count in zip(made, tokens, active, strict=True):
        state = 0
        for id in ids[:count]:
            state = int(one.following[one.class_of_id[id], state])
        expected.append(joined.states - 1 if state == one.dead else state)
    given_n = (torch.zeros(rows, dtype=torch.long), torch.arange(positions) < torch.from_numpy(active)[:, None])
    assert states_after(joined, torch.from_numpy(tokens), *given_n).tolist() == expected
    class_nC = joined.class_of_id.gather(1, torch.from_numpy(tokens)).long()
    assert paths._compose(joined, class_nC, *given_n).tolist() == expected  # as on a GPU
