"""The most probable path of a canvas through a token automaton, by dynamic programming (DINGO, arXiv 2505.23061).

Logits serve as they are: each path takes one token a position, so the positions' normalisers and the temperature are
the same for all of them. Scores are sums in float64. Batched over sequences of different automata, which are filled up
to equal sizes with edges from the dead state; nothing waits for the device and all shapes are fixed.

Shapes: n sequences, C positions, K classes, S states (the last is dead), E edges, L sets of classes, M members of sets.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nemo_diffgemma.serving.constraints.token_automaton import TokenAutomaton
from nemo_diffgemma.transfer import to_device


@dataclass(frozen=True)
class Automata:
    """Automata of n sequences on the device, int64 but `class_of_id` int32.

    `following` [n, K, S], `class_of_id` [n, V], `source`, `target` and `label` [n, E], `member` and `member_of` [n, M],
    `first_edge` [n, S + 1]: edges are sorted by target, and those into state s begin there, `incoming` at most;
    `end_class` and the state `ended` [n]. `labels` is L.
    """

    following: Tensor
    class_of_id: Tensor
    source: Tensor
    target: Tensor
    label: Tensor
    member: Tensor
    member_of: Tensor
    first_edge: Tensor
    end_class: Tensor
    ended: Tensor
    labels: int
    incoming: int

    @staticmethod
    def of(automaton: TokenAutomaton, device: torch.device) -> Automata:
        """One automaton, n = 1."""
        edges = automaton.edges
        tables = [automaton.following, automaton.class_of_id, edges.source, edges.target, edges.label]
        first_edge = np.searchsorted(edges.target, np.arange(automaton.following.shape[1] + 1)).astype(np.int32)
        tables += [edges.member, edges.member_of, first_edge]
        sent = [to_device(torch.from_numpy(table), device) for table in tables]
        following, class_of_id, *others = (table[None] for table in sent)
        ends = to_device(torch.tensor([[automaton.end_class], [automaton.ended]]), device)
        tensors = [following.long(), class_of_id, *(table.long() for table in others), *ends]
        names = [field.name for field in fields(Automata)][: len(tensors)]
        return Automata(
            **dict(zip(names, tensors, strict=True)), labels=edges.labels, incoming=int(np.diff(first_edge).max())
        )

    @staticmethod
    def joined(parts: list[Automata], rounded: bool) -> Automata:
        """Automata of one sequence each as a batch; `rounded` sizes are powers of two, of which there are few."""

        def size(lengths: Iterable[int]) -> int:
            return 1 << (max(lengths) - 1).bit_length() if rounded else max(lengths)

        classes, states = (size(part.following.shape[axis] for part in parts) for axis in (1, 2))
        edges, members = size(part.source.shape[1] for part in parts), size(part.member.shape[1] for part in parts)

        labels = size(part.labels + 1 for part in parts)  # the last is of no edge

        def joined(name: str, length: int, value: int) -> Tensor:
            tables = [getattr(part, name) for part in parts]
            return torch.cat([F.pad(table, (0, length - table.shape[1]), value=value) for table in tables])

        return Automata(
            torch.cat([_with_size(part.following, classes, states) for part in parts]),
            torch.cat([part.class_of_id for part in parts]),
            joined("source", edges, states - 1),
            joined("target", edges, states - 1),
            joined("label", edges, 0),
            joined("member", members, classes - 1),
            joined("member_of", members, labels - 1),
            joined("first_edge", states + 1, edges),
            torch.cat([part.end_class for part in parts]),
            torch.cat([part.ended for part in parts]),
            labels,
            size(part.incoming for part in parts),
        )

    @property
    def states(self) -> int:
        return self.following.shape[2]


def _with_size(following_1KS: Tensor, classes: int, states: int) -> Tensor:
    """More classes and states: from and to all of them leads nothing, into the last state, which is dead."""
    _, own_classes, own_states = following_1KS.shape
    dead = torch.where(following_1KS == own_states - 1, states - 1, following_1KS)
    return F.pad(dead, (0, states - own_states, 0, classes - own_classes), value=states - 1)


def best_classes(
    automata: Automata, maxima_nCK: Tensor, start_n: Tensor, viable_nS: Tensor, active_nC: Tensor
) -> Tensor:
    """The class of each position on the most probable path, [n, C] int64.

    A path begins in `start_n` and ends in one of `viable_nS` bool; positions that are not active are none of it.
    """
    best_nCL = _best_of_sets(automata, maxima_nCK)
    scores = [torch.full(viable_nS.shape, -torch.inf, dtype=torch.float64, device=start_n.device)]
    scores[0].scatter_(1, start_n[:, None], 0.0)
    nowhere_nS = scores[0].new_full(viable_nS.shape, -torch.inf)
    for position in range(active_nC.shape[1]):
        along_nE = scores[-1].gather(1, automata.source).add_(best_nCL[:, position].gather(1, automata.label))
        after_nS = nowhere_nS.scatter_reduce(1, automata.target, along_nE, "amax")
        scores.append(torch.where(active_nC[:, position, None], after_nS, scores[-1]))
    state_n1 = torch.where(viable_nS, scores.pop(), -torch.inf).argmax(1, keepdim=True)
    chosen = []
    some_D = torch.arange(automata.incoming, device=start_n.device)
    for position in reversed(range(active_nC.shape[1])):
        edge_nD = automata.first_edge.gather(1, state_n1) + some_D
        is_one_nD = edge_nD < automata.first_edge.gather(1, state_n1 + 1)
        edge_nD = torch.where(is_one_nD, edge_nD, 0)
        before_nD, label_nD = automata.source.gather(1, edge_nD), automata.label.gather(1, edge_nD)
        along_nD = scores.pop().gather(1, before_nD) + best_nCL[:, position].gather(1, label_nD)
        best_n1 = torch.where(is_one_nD, along_nD, -torch.inf).argmax(1, keepdim=True)
        chosen.append(label_nD.gather(1, best_n1))
        state_n1 = torch.where(active_nC[:, position, None], before_nD.gather(1, best_n1), state_n1)
    return _best_members(automata, maxima_nCK, torch.cat(chosen[::-1], dim=1))


def _best_of_sets(automata: Automata, maxima_nCK: Tensor) -> Tensor:
    """The largest logit of each set of classes, [n, C, L] float64."""
    shape = (*maxima_nCK.shape[:2], -1)
    members_nCM = maxima_nCK.gather(2, automata.member[:, None].expand(shape))
    best_nCL = maxima_nCK.new_full((*maxima_nCK.shape[:2], automata.labels), -torch.inf)
    return best_nCL.scatter_reduce_(2, automata.member_of[:, None].expand(shape), members_nCM, "amax").double()


def _best_members(automata: Automata, maxima_nCK: Tensor, label_nC: Tensor) -> Tensor:
    """The class of the largest logit in the set of each position, [n, C]."""
    shape = (*maxima_nCK.shape[:2], -1)
    members_nCM = maxima_nCK.gather(2, automata.member[:, None].expand(shape))
    members_nCM = members_nCM.masked_fill(automata.member_of[:, None] != label_nC[..., None], -torch.inf)
    return automata.member.gather(1, members_nCM.argmax(2))


def states_after(automata: Automata, tokens_nC: Tensor, start_n: Tensor, active_nC: Tensor) -> Tensor:
    """The state in which the active tokens end, [n]: the maps of all positions are composed pair by pair."""
    class_nC = automata.class_of_id.gather(1, tokens_nC).long()
    states = torch.arange(automata.states, device=start_n.device)
    maps_nCS = automata.following.gather(1, class_nC[..., None].expand(-1, -1, automata.states))
    maps_nCS = torch.where(active_nC[..., None], maps_nCS, states)
    while maps_nCS.shape[1] > 1:
        last = maps_nCS[:, -1:] if maps_nCS.shape[1] % 2 else maps_nCS[:, :0]
        pairs = maps_nCS[:, : maps_nCS.shape[1] - last.shape[1]]
        maps_nCS = torch.cat([pairs[:, 1::2].gather(2, pairs[:, ::2]), last], dim=1)
    return maps_nCS[:, 0].gather(1, start_n[:, None])[:, 0]
