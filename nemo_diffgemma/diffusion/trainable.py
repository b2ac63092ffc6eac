"""What the objective needs of a network.

Shapes: T tokens of all rows, M canvases of C tokens, N positions, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from nemo_diffgemma.diffusion.levels import Shift


class Encoded(Protocol):
    """Result of encoding clean rows: states [T, H] of all tokens, and what canvases need of them."""

    @property
    def context_hidden(self) -> Tensor | None: ...

    @property
    def cache(self) -> Any: ...  # keys and values: `tensors`, and `cut_off()` for leaves in their place


class TrainableNetwork(Protocol):
    """What the objective needs of a network."""

    def encode_clean(self, tokens_T: Tensor, lengths: Sequence[int]) -> Encoded:
        """Causal pass with gradient over rows of these lengths."""

    def canvas_hidden(
        self, canvas_MC: Tensor, canvases: Sequence[tuple[int, int]], cache: Any, soft_MCH: Tensor | None
    ) -> Tensor:
        """Final hidden states [M*C, H] of canvases (row, start)."""

    def soft_embedding(self, hidden_NH: Tensor) -> Tensor:
        """Self-conditioning signal, differentiable in the token table only."""

    def cross_entropy(
        self, hidden_NH: Tensor, labels_N: Tensor, weights_N: Tensor, shift: Shift | None = None
    ) -> tuple[Tensor, Tensor]:
        """Weighted sum of cross-entropies, and the cross-entropies."""

    def cross_entropy_gradient(
        self, hidden_NH: Tensor, labels_N: Tensor, weights_N: Tensor, shift: Shift | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weighted sum of cross-entropies, its gradient, the cross-entropies, and where the label is the arg-max.

        The gradient of the token table is added to the table's.
        """
