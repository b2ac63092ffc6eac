"""Constraints of some sequences of a batch on one canvas, as a denoising step takes them (`StepConstraint`).

Shapes: B sequences, n of them constrained, C positions of the longest canvas of these, N positions of the canvases of
all sequences, one behind the other, K classes, S states.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nemo_diffgemma.diffusion.constraint import Allowed
from nemo_diffgemma.serving.constraints.paths import Automata, best_classes, states_after


@dataclass(frozen=True)
class CanvasConstraint:
    """Sequences `rows_n` of `rows` are constrained. `cells_nC` are their positions among the N, and `place_N` is where
    each of the N stands in these, -1 for those of others.

    `start_n` are the states in which a canvas begins, `viable_nS` those in which it may end. `locked_nC` holds tokens
    that stand already, as they do in the arg-max canvas, and -1 elsewhere. Positions that are not `active_nC` lie
    behind the end of the canvas, or behind the last token that may be generated: these get `eos_n`.
    """

    rows_n: Tensor
    cells_nC: Tensor
    place_N: Tensor
    automata: Automata
    start_n: Tensor
    viable_nS: Tensor
    active_nC: Tensor
    locked_nC: Tensor
    eos_n: Tensor
    rows: int

    @property
    def class_of_id_nV(self) -> Tensor:
        return self.automata.class_of_id

    @property
    def classes(self) -> int:
        return self.automata.following.shape[1]

    def choose(self, maxima_nCK: Tensor) -> Tensor:
        """The class of each position on the most probable path."""
        is_free_nC1 = (self.locked_nC < 0)[..., None]
        locked_nC = self.class_of_id_nV.gather(1, self.locked_nC.clamp_min(0)).long()
        is_class_nCK = torch.arange(self.classes, device=maxima_nCK.device) == locked_nC[..., None]
        maxima_nCK = torch.where(is_free_nC1, maxima_nCK, torch.where(is_class_nCK, 0.0, -torch.inf))
        return best_classes(self.automata, maxima_nCK, self.start_n, self.viable_nS, self.active_nC)

    def allowed(self, argmax: Tensor, tokens_nC: Tensor) -> Allowed:
        """The arg-max canvas where it is allowed, else the tokens of the most probable path."""
        argmax_N = argmax.flatten()
        argmax_nC = self._locked(self._filled(argmax_N.index_select(0, self.cells_nC.flatten()).view_as(tokens_nC)))
        tokens_nC = self._locked(tokens_nC)
        ends_n = self.states_after(argmax_nC)
        is_argmax_n = self.viable_nS.gather(1, ends_n[:, None])[:, 0]
        tokens_nC = torch.where(is_argmax_n[:, None], argmax_nC, tokens_nC)
        tokens_nC = torch.where(self.active_nC, tokens_nC, self.eos_n[:, None])
        own_N = tokens_nC.flatten().index_select(0, self.place_N.clamp_min(0))
        is_argmax_B = torch.ones(self.rows, dtype=torch.bool, device=argmax.device)
        return Allowed(
            torch.where(self.place_N < 0, argmax_N, own_N).view_as(argmax),
            is_argmax_B.index_copy(0, self.rows_n, is_argmax_n),
        )

    def _locked(self, tokens_nC: Tensor) -> Tensor:
        return torch.where(self.locked_nC < 0, tokens_nC, self.locked_nC)

    def _filled(self, tokens_nC: Tensor) -> Tensor:
        """What stands behind the end of a text is no part of it: end-of-sequence tokens fill the canvas."""
        is_end_nC = self.class_of_id_nV.gather(1, tokens_nC) == self.automata.end_class[:, None]
        was_ended_n = self.start_n == self.automata.ended
        is_behind_nC = (is_end_nC.cumsum(1) - is_end_nC.long() > 0) | was_ended_n[:, None]
        return torch.where(is_behind_nC, self.eos_n[:, None], tokens_nC)

    def states_after(self, tokens_nC: Tensor) -> Tensor:
        """The states in which canvases of the constrained sequences end, [n]."""
        return states_after(self.automata, tokens_nC, self.start_n, self.active_nC)

    # -- memory of its own, for steps that are recorded --------------------------------------------------------------

    @property
    def geometry(self) -> Hashable:
        """All shapes, and the numbers that are no tensors."""
        numbers = (self.automata.incoming, self.automata.in_set, self.rows)
        return (*(tuple(tensor.shape) for tensor in self._tensors()), numbers)

    def buffer(self) -> CanvasConstraint:
        """A copy in memory of its own."""

        def cloned(whole: CanvasConstraint | Automata) -> dict[str, Any]:
            return {name: tensor.clone() for name, tensor in _tensors_of(whole).items()}

        return replace(self, automata=replace(self.automata, **cloned(self.automata)), **cloned(self))

    def copy_(self, other: CanvasConstraint) -> None:
        """Take over what `other` says, which has the same geometry."""
        for mine, theirs in zip(self._tensors(), other._tensors(), strict=True):
            mine.copy_(theirs)

    def _tensors(self) -> list[Tensor]:
        return [*_tensors_of(self.automata).values(), *_tensors_of(self).values()]


def _tensors_of(whole: CanvasConstraint | Automata) -> dict[str, Tensor]:
    """Its fields that are tensors."""
    return {name: value for name, value in vars(whole).items() if isinstance(value, Tensor)}
