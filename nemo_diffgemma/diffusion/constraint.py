"""What a denoising step is told about texts that some of its sequences must be, and what it answers.

Tokens that mean the same to a constraint are of one class. So the sweep over the vocabulary keeps the largest logit of
each class, the constraint chooses a class for each position, and the sweep finds the token. Everything is a tensor on
the device, equal on every rank; nobody waits for it. `serving.constraints` has the constraints there are.

`Constraints` is what generation asks for from canvas to canvas, `StepConstraint` what the steps of one canvas are told.

Shapes: B sequences, n of them constrained, C canvas positions (of the longest canvas that is constrained), N positions
of all canvases of the step, one behind the other, K classes, V ids.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple, Protocol

from torch import Tensor


class Allowed(NamedTuple):
    """The most probable canvases that are allowed, [B, C] or [N]; `is_argmax` [B]: the arg-max canvas was allowed."""

    tokens: Tensor
    is_argmax: Tensor


class StepConstraint(Protocol):
    """Constraints of some sequences of a batch, each on one canvas, the same for all its steps.

    `cells_nC` int64 are the positions of their canvases among all those of a step; behind the end of a canvas that is
    shorter than the longest stands any. `class_of_id_nV` int32 has values below `classes`.
    """

    @property
    def cells_nC(self) -> Tensor: ...

    @property
    def class_of_id_nV(self) -> Tensor: ...

    @property
    def classes(self) -> int: ...

    def choose(self, maxima_nCK: Tensor) -> Tensor:
        """The class of each position, [n, C] int64, from the largest logit of each class."""

    def allowed(self, argmax: Tensor, tokens_nC: Tensor) -> Allowed:
        """The canvases from the arg-max ones, [B, C] or [N], and the tokens of the chosen classes."""

    @property
    def geometry(self) -> Hashable:
        """All shapes: constraints of equal geometry may be copied into each other."""

    def buffer(self) -> StepConstraint:
        """Memory of its own for constraints of this geometry."""

    def copy_(self, other: Any) -> None:
        """Take over what `other`, of this geometry, says."""


class Constraints(Protocol):
    """The constraints of a generation, and how far its answers have come."""

    def of_canvas(self) -> StepConstraint | None:
        """What the steps of the current canvas are told."""

    def advance(self, canvas_BC: Tensor) -> None:
        """Go on behind the canvases that were settled on, before anything is padded."""
