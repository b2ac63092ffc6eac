"""The most probable path of a canvas through a token automaton, by dynamic programming (DINGO, arXiv 2505.23061).

Logits serve as they are: each path takes one token a position, so the positions' normalisers and the temperature are
the same for all of them. Scores are sums in float64. Batched over sequences of different automata, which are filled up
to equal sizes with edges from the dead state; nothing waits for the device and all shapes are fixed.

Shapes: n sequences, C positions, K classes, S states (the last is dead), E edges, L sets of classes, M members of sets.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nemo_diffgemma.serving.constraints.token_automaton import Numbers, TokenAutomaton
from nemo_diffgemma.transfer import to_device


@dataclass(frozen=True)
class Automata:
    """Automata of n sequences on the device, int64 but `class_of_id` int32.

    `following` [n, K, S], `class_of_id` [n, V]. Edges `source`, `target` and `label` [n, E] are sorted by target: those
    into a state begin at `first_edge` [n, S], `incoming` at most. Members of sets `member` [n, M] are sorted by the set
    that each is `member_of`: those of a set begin at `first_member` [n, L], `in_set` at most. `end_class` and the
    state `ended` [n].
    """

    following: Tensor
    class_of_id: Tensor
    source: Tensor
    target: Tensor
    label: Tensor
    first_edge: Tensor
    member: Tensor
    member_of: Tensor
    first_member: Tensor
    end_class: Tensor
    ended: Tensor
    incoming: int
    in_set: int

    @staticmethod
    def of(automaton: TokenAutomaton, device: torch.device) -> Automata:
        """One automaton, n = 1."""
        edges = automaton.edges
        first_edge, incoming = _groups(edges.target, automaton.following.shape[1])
        first_member, in_set = _groups(edges.member_of, edges.labels)

        def sent(table: Numbers) -> Tensor:
            return to_device(torch.from_numpy(table), device)[None]

        return Automata(
            sent(automaton.following).long(),
            sent(automaton.class_of_id),
            sent(edges.source).long(),
            sent(edges.target).long(),
            sent(edges.label).long(),
            sent(first_edge).long(),
            sent(edges.member).long(),
            sent(edges.member_of).long(),
            sent(first_member).long(),
            to_device(torch.tensor([automaton.end_class]), device),
            to_device(torch.tensor([automaton.ended]), device),
            incoming,
            in_set,
        )

    @staticmethod
    def joined(parts: list[Automata], rounded: bool) -> Automata:
        """Automata of one sequence each as a batch; `rounded` sizes are powers of two, of which there are few."""

        def size(lengths: Iterable[int]) -> int:
            return 1 << (max(lengths) - 1).bit_length() if rounded else max(lengths)

        classes, states = (size(part.following.shape[axis] for part in parts) for axis in (1, 2))
        edges, members = size(part.source.shape[1] for part in parts), size(part.member.shape[1] for part in parts)
        labels = size(part.first_member.shape[1] + 1 for part in parts)  # the last is of no edge

        def joined(name: str, length: int, value: int) -> Tensor:
            tables = [getattr(part, name) for part in parts]
            return torch.cat([F.pad(table, (0, length - table.shape[1]), value=value) for table in tables])

        return Automata(
            torch.cat([_with_size(part.following, classes, states) for part in parts]),
            torch.cat([part.class_of_id for part in parts]),
            joined("source", edges, states - 1),
            joined("target", edges, states - 1),
            joined("label", edges, 0),
            joined("first_edge", states, 0),
            joined("member", members, classes - 1),
            joined("member_of", members, labels - 1),
            joined("first_member", labels, 0),
            torch.cat([part.end_class for part in parts]),
            torch.cat([part.ended for part in parts]),
            size(part.incoming for part in parts),
            size(part.in_set for part in parts),
        )

    @property
    def states(self) -> int:
        return self.following.shape[2]


def _groups(numbers: Numbers, count: int) -> tuple[Numbers, int]:
    """Where each of `count` numbers begins among sorted ones, and how often one stands there at most."""
    often = np.bincount(numbers, minlength=count)
    return (often.cumsum() - often).astype(np.int32), int(often.max())


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
    maxima_nKC = maxima_nCK.transpose(1, 2).contiguous()
    best_nCL = _best_of_sets(automata, maxima_nKC)
    counted_nCL = best_nCL.masked_fill(~active_nC[..., None], -torch.inf)  # no edge is taken where there is no position
    positions = list(zip(counted_nCL.unbind(1), active_nC[..., None].unbind(1), strict=True))
    nowhere = torch.full((), -torch.inf, dtype=torch.float64, device=start_n.device)
    scores = [torch.full_like(viable_nS, -torch.inf, dtype=torch.float64).scatter_(1, start_n[:, None], 0.0)]
    for best_nL, active_n1 in positions:
        along_nE = scores[-1].gather(1, automata.source).add_(best_nL.gather(1, automata.label))
        after_nS = torch.where(active_n1, nowhere, scores[-1])
        scores.append(after_nS.scatter_reduce_(1, automata.target, along_nE, "amax"))
    state_n1 = torch.where(viable_nS, scores[-1], nowhere).argmax(1, keepdim=True)
    chosen = []
    some_D = torch.arange(automata.incoming, device=start_n.device)
    for best_nL, active_n1 in reversed(positions):
        after_n1 = scores.pop().gather(1, state_n1)
        edge_nD = (automata.first_edge.gather(1, state_n1) + some_D).clamp_max_(automata.source.shape[1] - 1)
        before_nD, label_nD = automata.source.gather(1, edge_nD), automata.label.gather(1, edge_nD)
        along_nD = scores[-1].gather(1, before_nD).add_(best_nL.gather(1, label_nD))
        edge_n1 = _first(along_nD == after_n1, 1)  # one into this state: they stand before those into others
        chosen.append(label_nD.gather(1, edge_n1))
        state_n1 = torch.where(active_n1, before_nD.gather(1, edge_n1), state_n1)
    return _best_members(automata, maxima_nKC, best_nCL, torch.cat(chosen[::-1], dim=1))


def _best_of_sets(automata: Automata, maxima_nKC: Tensor) -> Tensor:
    """The largest logit of each set of classes, [n, C, L] float64."""
    rows, classes, positions = maxima_nKC.shape
    labels = automata.first_member.shape[1]
    members = maxima_nKC.flatten(0, 1).index_select(0, _numbered(automata.member, classes))
    index = _numbered(automata.member_of, labels)[:, None].expand(members.shape)  # all positions of a member at once
    best = members.new_full((rows * labels, positions), -torch.inf).scatter_reduce_(0, index, members, "amax")
    best_nCL = best.unflatten(0, (rows, labels)).transpose(1, 2)
    return best_nCL.to(torch.float64, memory_format=torch.contiguous_format)


def _numbered(numbers_nM: Tensor, count: int) -> Tensor:
    """Numbers below `count`, with those of each sequence behind those of the sequence before, [n * M]."""
    return (numbers_nM + count * torch.arange(len(numbers_nM), device=numbers_nM.device)[:, None]).flatten()


def _best_members(automata: Automata, maxima_nKC: Tensor, best_nCL: Tensor, label_nC: Tensor) -> Tensor:
    """The class of the largest logit in the set of each position, [n, C]; the first of equal ones."""
    rows, positions = label_nC.shape
    top_nC1 = best_nCL.gather(2, label_nC[..., None])
    some_D = torch.arange(automata.in_set, device=label_nC.device)
    place_nCD = automata.first_member.gather(1, label_nC)[..., None] + some_D
    place_nCD.clamp_max_(automata.member.shape[1] - 1)
    class_nCD = automata.member.gather(1, place_nCD.flatten(1)).view(rows, positions, -1)
    is_top_nCD = maxima_nKC.transpose(1, 2).gather(2, class_nCD) == top_nC1
    return class_nCD.gather(2, _first(is_top_nCD, 2))[..., 0]


def _first(are: Tensor, axis: int) -> Tensor:
    """Where the first stands that is true; 0 without one."""
    return are.view(torch.uint8).argmax(axis, keepdim=True)


def states_after(automata: Automata, tokens_nC: Tensor, start_n: Tensor, active_nC: Tensor) -> Tensor:
    """The state in which the active tokens end, [n]."""
    class_nC = automata.class_of_id.gather(1, tokens_nC).long()
    follow = _walk if start_n.device.type == "cpu" else _compose
    return follow(automata, class_nC, start_n, active_nC)


def _walk(automata: Automata, class_nC: Tensor, start_n: Tensor, active_nC: Tensor) -> Tensor:
    """Token by token."""
    following_nx, state_n1 = automata.following.flatten(1), start_n[:, None]
    for row_n1, active_n1 in zip((class_nC * automata.states).split(1, 1), active_nC.split(1, 1), strict=True):
        state_n1 = torch.where(active_n1, following_nx.gather(1, row_n1 + state_n1), state_n1)
    return state_n1[:, 0]


def _compose(automata: Automata, class_nC: Tensor, start_n: Tensor, active_nC: Tensor) -> Tensor:
    """The maps of all positions are composed pair by pair: more work in fewer kernels."""
    states = torch.arange(automata.states, device=start_n.device)
    maps_nCS = automata.following.gather(1, class_nC[..., None].expand(-1, -1, automata.states))
    maps_nCS = torch.where(active_nC[..., None], maps_nCS, states)
    while maps_nCS.shape[1] > 1:
        last = maps_nCS[:, -1:] if maps_nCS.shape[1] % 2 else maps_nCS[:, :0]
        pairs = maps_nCS[:, : maps_nCS.shape[1] - last.shape[1]]
        maps_nCS = torch.cat([pairs[:, 1::2].gather(2, pairs[:, ::2]), last], dim=1)
    return maps_nCS[:, 0].gather(1, start_n[:, None])[:, 0]
