"""The most probable path of a canvas through a token automaton, by dynamic programming (DINGO, arXiv 2505.23061).

Logits serve as they are: each path takes one token a position, so the positions' normalisers and the temperature are
the same for all of them. Scores are sums in float64. Batched over sequences of different automata, which are filled up
to equal sizes with edges from the dead state; nothing waits for the device and all shapes are fixed.

Shapes: n sequences, C positions, K classes, S states (the last is dead), E edges, L sets of classes, M members of sets.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from nemo_diffgemma.serving.constraints.token_automaton import TokenAutomaton
from nemo_diffgemma.transfer import to_device


@dataclass(frozen=True)
class Automata:
    """Automata of n sequences on the device, int64 but `class_of_id` int32.

    `following` [n, K, S], `class_of_id` [n, V], `source`, `target` and `label` [n, E], `member` and `member_of` [n, M],
    `end_class` and the state `ended` [n]. `labels` is L.
    """

    following: Tensor
    class_of_id: Tensor
    source: Tensor
    target: Tensor
    label: Tensor
    member: Tensor
    member_of: Tensor
    end_class: Tensor
    ended: Tensor
    labels: int

    @staticmethod
    def of(automaton: TokenAutomaton, device: torch.device) -> Automata:
        """One automaton, n = 1."""
        edges = automaton.edges
        tables = [automaton.following, automaton.class_of_id, edges.source, edges.target, edges.label]
        tables += [edges.member, edges.member_of]
        sent = [to_device(torch.from_numpy(table), device) for table in tables]
        following, class_of_id, *others = sent
        longs = [table.long()[None] for table in others]
        end = to_device(torch.tensor([[automaton.end_class], [automaton.ended]]), device)
        return Automata(following.long()[None], class_of_id[None], *longs, end[0], end[1], labels=edges.labels)

    @staticmethod
    def joined(parts: list[Automata], rounded: bool) -> Automata:
        """Automata of one sequence each as a batch; `rounded` sizes are powers of two, of which there are few."""

        def size(of: str, axis: int) -> int:
            most = max(getattr(part, of).shape[axis] for part in parts)
            return 1 << (most - 1).bit_length() if rounded else most

        classes, states = size("following", 1), size("following", 2)
        edges, members = size("source", 1), size("member", 1)
        labels = 1 << (max(part.labels for part in parts) - 1).bit_length() if rounded else max(p.labels for p in parts)
        return Automata(
            torch.cat([_with_size(part.following, classes, states) for part in parts]),
            torch.cat([part.class_of_id for part in parts]),
            torch.cat([F.pad(part.source, (0, edges - part.source.shape[1]), value=states - 1) for part in parts]),
            torch.cat([F.pad(part.target, (0, edges - part.target.shape[1]), value=states - 1) for part in parts]),
            torch.cat([F.pad(part.label, (0, edges - part.label.shape[1])) for part in parts]),
            torch.cat([F.pad(part.member, (0, members - part.member.shape[1]), value=classes - 1) for part in parts]),
            torch.cat([F.pad(part.member_of, (0, members - part.member_of.shape[1])) for part in parts]),
            torch.cat([part.end_class for part in parts]),
            torch.cat([part.ended for part in parts]),
            labels=labels,
        )

    @cached_property
    def states(self) -> int:
        return self.following.shape[2]

    def tensors(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self) if field.name != "labels"]


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
    for position in reversed(range(active_nC.shape[1])):
        along_nE = scores.pop().gather(1, automata.source).add_(best_nCL[:, position].gather(1, automata.label))
        along_nE.masked_fill_(automata.target != state_n1, -torch.inf)
        edge_n1 = along_nE.argmax(1, keepdim=True)
        chosen.append(automata.label.gather(1, edge_n1))
        state_n1 = torch.where(active_nC[:, position, None], automata.source.gather(1, edge_n1), state_n1)
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
