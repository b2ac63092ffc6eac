"""A constraint on the answer of one sequence, and how far the answer has come: carried from canvas to canvas.

Shapes: C canvas positions, S states, P positions of the whole answer.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from nemo_diffgemma.diffusion.locked_places import cells_of
from nemo_diffgemma.serving.constraints.canvas import CanvasConstraint
from nemo_diffgemma.serving.constraints.constraint import Constraint
from nemo_diffgemma.serving.constraints.errors import ConstraintError
from nemo_diffgemma.serving.constraints.paths import Automata
from nemo_diffgemma.serving.constraints.token_automaton import TokenAutomaton
from nemo_diffgemma.transfer import to_device

MOST_LOOKED_THROUGH = 500_000_000  # edges, from locked place to locked place
Mask = NDArray[np.bool_]
_tables: WeakKeyDictionary[TokenAutomaton, Automata] = WeakKeyDictionary()  # of this process's device


class ConstrainedSequence:
    """The constraint of one sequence while its answer is generated, canvases of `length` tokens, at most `tokens`.

    `locked` maps positions of the answer, from 0, to ids that stand there. Raises `ConstraintError` where no text of
    the language fits, and for an automaton whose texts do not end with `eos_ids`.
    """

    def __init__(
        self,
        automaton: TokenAutomaton,
        length: int,
        tokens: int,
        eos_ids: Sequence[int],
        locked: Mapping[int, int],
        device: torch.device,
    ) -> None:
        self.automaton, self.length, self._device = automaton, length, device
        self._tokens, self._locked = tokens, locked
        self.eos_id = next(iter(eos_ids), 0)
        self.position = 0  # tokens in the canvases before
        self.state = torch.tensor(automaton.start)
        self._check(eos_ids)
        self._viable = self._canvas_ends()

    @property
    def tables(self) -> Automata:
        """The automaton on the device."""
        if self.automaton not in _tables:
            _tables[self.automaton] = Automata.of(self.automaton, self._device)
        return _tables[self.automaton]

    @property
    def active(self) -> int:
        """Positions of the current canvas that are part of the answer."""
        return max(0, min(self.length, self._tokens - self.position))

    def locked_C(self) -> Tensor:
        """The tokens that stand in the current canvas, -1 elsewhere."""
        cells = cells_of(self._locked, self.position // self.length, self.length)
        return torch.tensor(cells or [-1] * self.length)

    def viable_S(self) -> Tensor:
        """States at the end of the current canvas from which the text can be finished in time."""
        end = self.position + self.active
        return torch.from_numpy(self._viable.get(end, self.automaton.distance <= self._tokens - end))

    def settle(self, tokens: Sequence[int]) -> None:
        """Go on behind a canvas that was settled on, before anything is padded."""
        state, following, class_of_id = int(self.state), self.automaton.following, self.automaton.class_of_id
        for id in tokens[: self.active]:
            state = int(following[class_of_id[id], state])
        self.state, self.position = torch.tensor(state), self.position + self.length

    def _canvas_ends(self) -> dict[int, Mask]:
        """States from which a text can be finished in time with what is locked, at the ends of the canvases before it.

        Raises `ConstraintError` where the start is none of them.
        """
        last = max(self._locked, default=-1)
        edges, viable, ends = self.automaton.edges, self.automaton.distance <= self._tokens - last - 1, {}
        if (last + 1) * len(edges.source) > MOST_LOOKED_THROUGH:
            raise ConstraintError(
                f"the constraint is too large to be held with a token locked at position {last}; make it simpler"
            )
        for place in reversed(range(last + 1)):
            if (place + 1) % self.length == 0:
                ends[place + 1] = viable
            if place in self._locked:
                viable = viable[self.automaton.following[self.automaton.class_of_id[self._locked[place]]]]
            else:
                before = np.zeros_like(viable)
                before[edges.source[viable[edges.target]]] = True
                viable = before
        if not viable[self.automaton.start]:
            raise ConstraintError(
                f"no text of at most {self._tokens} tokens has the locked tokens in their places and is allowed by the "
                "constraint; lock fewer tokens, or raise max_tokens"
            )
        return ends

    def _check(self, eos_ids: Sequence[int]) -> None:
        ending = np.flatnonzero(self.automaton.class_of_id == self.automaton.end_class)
        if not len(ending):
            raise ConstraintError("a constraint needs a token that ends an answer; give the sampler an eos_token_id")
        if {id for id in eos_ids if id < len(self.automaton.class_of_id)} != set(ending.tolist()):
            raise ConstraintError(
                f"the constraint was compiled for texts that end with one of {ending.tolist()}; "
                f"sampler.eos_token_id={list(eos_ids)} are others"
            )
        late = [place for place in self._locked if place >= self._tokens]
        if late:
            raise ConstraintError(f"locked position {late[0]}; expected 0 to {self._tokens - 1}")
        needed = int(self.automaton.distance[self.automaton.start])
        if needed > self._tokens:
            raise ConstraintError(
                f"the shortest text that the constraint allows has {needed} tokens; max_tokens={self._tokens}: raise it"
            )


class CanvasConstraints:
    """Makes what steps are told: anew for other canvases only, its tables only for other automata."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._joined: tuple[list[TokenAutomaton], Automata] | None = None
        self._made: tuple[Hashable, CanvasConstraint] | None = None

    def of(self, sequences: Sequence[ConstrainedSequence | None], lengths: Sequence[int]) -> CanvasConstraint | None:
        """What a step over the canvases of some sequences is told, `lengths` tokens each; None without a constraint."""
        held = [sequence for sequence in sequences if sequence is not None]
        if not held:
            return None
        canvases = (tuple(sequences), tuple(lengths), tuple(sequence.position for sequence in held))
        if self._made is None or self._made[0] != canvases:
            self._made = (canvases, self._of(sequences, lengths))
        return self._made[1]

    def _of(self, sequences: Sequence[ConstrainedSequence | None], lengths: Sequence[int]) -> CanvasConstraint:
        chosen = [(row, sequence) for row, sequence in enumerate(sequences) if sequence is not None]
        device, held = self._device, [sequence for _, sequence in chosen]
        automata = self._automata(held)
        own_n = torch.tensor([lengths[row] for row, _ in chosen])
        offset_n = torch.tensor(lengths).cumsum(0)[[row for row, _ in chosen]] - own_n
        position_C = torch.arange(int(own_n.max()))
        cells_nC = offset_n[:, None] + position_C.minimum(own_n[:, None] - 1)
        is_own_nC = position_C < own_n[:, None]
        place_N = torch.full((sum(lengths),), -1)
        place_N[cells_nC[is_own_nC]] = torch.arange(cells_nC.numel()).view_as(cells_nC)[is_own_nC]
        active_nC = position_C < torch.tensor([sequence.active for sequence in held])[:, None]
        locked_nC = torch.full(cells_nC.shape, -1)
        locked_nC[is_own_nC] = torch.cat([sequence.locked_C() for sequence in held])
        viable = [F.pad(mask, (0, automata.states - len(mask))) for mask in (sequence.viable_S() for sequence in held)]
        return CanvasConstraint(
            rows_n=to_device(torch.tensor([row for row, _ in chosen]), device),
            cells_nC=to_device(cells_nC, device),
            place_N=to_device(place_N, device),
            automata=automata,
            start_n=to_device(torch.stack([sequence.state for sequence in held]), device),
            viable_nS=to_device(torch.stack(viable), device),
            active_nC=to_device(active_nC, device),
            locked_nC=to_device(locked_nC, device),
            eos_n=to_device(torch.tensor([sequence.eos_id for sequence in held]), device),
            rows=len(sequences),
        )

    def _automata(self, held: Sequence[ConstrainedSequence]) -> Automata:
        wanted = [sequence.automaton for sequence in held]
        if self._joined is None or self._joined[0] != wanted:
            parts = [sequence.tables for sequence in held]
            self._joined = (wanted, Automata.joined(parts, rounded=self._device.type == "cuda"))
        return self._joined[1]


class ConstrainedBatch:
    """The constraints of `rows` sequences that go from canvas to canvas together: `diffusion.constraint.Constraints`.

    `locked` has for each row what stands in its answer. Raises `ConstraintError` for constraints that nothing fulfils
    in `canvases` canvases of `length` tokens.
    """

    def __init__(
        self,
        constraints: Sequence[Constraint | None],
        rows: int,
        length: int,
        canvases: int,
        eos_ids: Sequence[int],
        device: torch.device,
        locked: Sequence[Mapping[int, int]] = (),
    ) -> None:
        if len(constraints) != rows:
            raise ConstraintError(f"{len(constraints)} constraints for {rows} rows; give one, or None, for each row")
        most = canvases * length
        self._sequences = [
            None
            if constraint is None
            else ConstrainedSequence(
                constraint.automaton,
                length,
                most if constraint.max_tokens is None else min(most, constraint.max_tokens),
                eos_ids,
                held,
                device,
            )
            for constraint, held in zip(constraints, locked or [{}] * rows, strict=True)
        ]
        self._lengths = [length] * rows
        self._canvases = CanvasConstraints(device)
        self._current: CanvasConstraint | None = None

    def of_canvas(self) -> CanvasConstraint | None:
        """What the steps of the current canvas are told."""
        self._current = self._canvases.of(self._sequences, self._lengths)
        return self._current

    def advance(self, canvas_BC: Tensor) -> None:
        """Carry the states on behind the canvases that were settled on, before anything is padded."""
        given = self._current
        if given is None:
            return
        after_n = given.states_after(canvas_BC.index_select(0, given.rows_n))
        chosen = [sequence for sequence in self._sequences if sequence is not None]
        for sequence, state in zip(chosen, after_n.unbind(), strict=True):
            sequence.state, sequence.position = state, sequence.position + sequence.length
