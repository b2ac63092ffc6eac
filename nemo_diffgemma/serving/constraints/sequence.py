"""A constraint on the answer of one sequence, and how far the answer has come: carried from canvas to canvas.

Shapes: C canvas positions, S states, P positions of the whole answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from nemo_diffgemma.serving.constraints.canvas import CanvasConstraint
from nemo_diffgemma.serving.constraints.constraint import Constraint
from nemo_diffgemma.serving.constraints.errors import ConstraintError
from nemo_diffgemma.serving.constraints.paths import Automata
from nemo_diffgemma.transfer import to_device

Mask = NDArray[np.bool_]


class ConstrainedSequence:
    """The constraint of one sequence while its answer is generated, canvases of `length` tokens, at most `tokens`.

    Raises `ConstraintError` where no text of the language fits, with the locked tokens in their places.
    """

    def __init__(self, constraint: Constraint, length: int, tokens: int, device: torch.device) -> None:
        self.automaton, self.length, self._device = constraint.automaton, length, device
        self._tokens = tokens if constraint.max_tokens is None else min(tokens, constraint.max_tokens)
        self._locked = {place: id for place, id in sorted(constraint.locked.items()) if place < self._tokens}
        self.position = 0  # tokens in the canvases before
        self.state = torch.tensor(self.automaton.start)
        self._check()

    @cached_property
    def tables(self) -> Automata:
        """The automaton on the device."""
        return Automata.of(self.automaton, self._device)

    @property
    def active(self) -> int:
        """Positions of the current canvas that are part of the answer."""
        return max(0, min(self.length, self._tokens - self.position))

    def locked_C(self) -> Tensor:
        """The tokens that stand in the current canvas, -1 elsewhere."""
        places = range(self.position, self.position + self.length)
        return torch.tensor([self._locked.get(place, -1) for place in places])

    def viable_S(self) -> Tensor:
        """States at the end of the current canvas from which the text can be finished in time."""
        return torch.from_numpy(self._finishing(self.position + self.active))

    def _finishing(self, position: int) -> Mask:
        """States before `position` from which the tokens behind it can finish the text."""
        later = [place for place in self._locked if place >= position]
        behind = later[-1] + 1 if later else position
        viable = self.automaton.distance <= self._tokens - behind
        edges = self.automaton.edges
        for place in reversed(range(position, behind)):
            if place in self._locked:
                id = self._locked[place]
                viable = viable[self.automaton.following[self.automaton.class_of_id[id]]]
            else:
                before = np.zeros_like(viable)
                before[edges.source[viable[edges.target]]] = True
                viable = before
        return viable

    def _check(self) -> None:
        if self.automaton.end_class not in self.automaton.class_of_id:
            raise ConstraintError("a constraint needs a token that ends an answer; give the sampler an eos_token_id")
        needed = int(self.automaton.distance[self.automaton.start])
        if needed > self._tokens:
            raise ConstraintError(
                f"the shortest text that the constraint allows has {needed} tokens; max_tokens={self._tokens}: raise it"
            )
        if not self._finishing(0)[self.automaton.start]:
            raise ConstraintError(
                f"no text of at most {self._tokens} tokens has the locked tokens in their places and is allowed by the "
                "constraint; lock fewer tokens, or raise max_tokens"
            )


def canvas_constraint(
    sequences: Sequence[ConstrainedSequence | None], eos_id: int, device: torch.device
) -> CanvasConstraint | None:
    """What the current canvas of a batch is told; None where no sequence is constrained."""
    rows = [row for row, sequence in enumerate(sequences) if sequence is not None]
    chosen = [sequence for sequence in sequences if sequence is not None]
    if not chosen:
        return None
    automata = Automata.joined([sequence.tables for sequence in chosen], rounded=device.type == "cuda")
    viable = [sequence.viable_S() for sequence in chosen]
    active = torch.arange(chosen[0].length) < torch.tensor([sequence.active for sequence in chosen])[:, None]
    return CanvasConstraint(
        rows_n=to_device(torch.tensor(rows), device),
        automata=automata,
        start_n=torch.stack([to_device(sequence.state, device) for sequence in chosen]),
        viable_nS=to_device(torch.stack([F.pad(mask, (0, automata.states - len(mask))) for mask in viable]), device),
        active_nC=to_device(active, device),
        locked_nC=to_device(torch.stack([sequence.locked_C() for sequence in chosen]), device),
        eos_id=eos_id,
    )


def advance(sequences: Sequence[ConstrainedSequence | None], given: CanvasConstraint, canvas_BC: Tensor) -> None:
    """Carry the states on behind the canvases [B, C] that were settled on under `given`, before anything is padded."""
    after_n = given.states_after(canvas_BC[given.rows_n])
    chosen = [sequence for sequence in sequences if sequence is not None]
    for sequence, state in zip(chosen, after_n.unbind(), strict=True):
        sequence.state, sequence.position = state, sequence.position + sequence.length


class ConstrainedBatch:
    """The constraints of `rows` sequences that go from canvas to canvas together: `diffusion.constraint.Constraints`.

    Raises `ConstraintError` for constraints that nothing fulfils in `canvases` canvases of `length` tokens.
    """

    def __init__(
        self,
        constraints: Sequence[Constraint | None],
        rows: int,
        length: int,
        canvases: int,
        eos_ids: Sequence[int],
        device: torch.device,
    ) -> None:
        if len(constraints) != rows:
            raise ConstraintError(f"{len(constraints)} constraints for {rows} rows; give one, or None, for each row")
        self._sequences = [
            None if constraint is None else ConstrainedSequence(constraint, length, canvases * length, device)
            for constraint in constraints
        ]
        self._eos_id, self._device = next(iter(eos_ids), 0), device
        self._current: CanvasConstraint | None = None

    def of_canvas(self) -> CanvasConstraint | None:
        """What the steps of the current canvas are told."""
        self._current = canvas_constraint(self._sequences, self._eos_id, self._device)
        return self._current

    def advance(self, canvas_BC: Tensor) -> None:
        """Go on behind the canvases that were settled on."""
        if self._current is not None:
            advance(self._sequences, self._current, canvas_BC)
