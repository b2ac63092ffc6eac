"""What the encoder leaves for the canvases: keys and values of the context, for each layer.

Global layers keep every column, sliding layers the last `window - 1`: all that a later canvas can see, and with the
token itself all that a later context token can see.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nemo_diffgemma.config import SLIDING, ModelConfig
from nemo_diffgemma.model.segments import KeyValue


@dataclass(frozen=True)
class Cache:
    """Context of B rows: `first` is each row's left padding, `layers` the keys and values, `length` the columns.

    `hidden_BSH` is the encoder's state of the columns of the last pass, after the final norm (autoregressive loss).
    """

    first: tuple[int, ...]
    layers: tuple[KeyValue, ...]
    length: int
    hidden_BSH: Tensor | None = None

    @property
    def rows(self) -> int:
        return len(self.first)

    @staticmethod
    def trimmed(config: ModelConfig, layer: int, kept: KeyValue) -> KeyValue:
        """Drop what no later token sees. Slices are copied: a view would keep the whole context alive."""
        if config.layer_kind(layer) != SLIDING or kept.keys.shape[2] < config.sliding_window:
            return kept
        extra = kept.keys.shape[2] - (config.sliding_window - 1)
        return KeyValue(kept.keys[:, :, extra:].clone(), kept.values[:, :, extra:].clone(), kept.offset + extra)
