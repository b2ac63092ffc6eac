"""Keys and values of contexts in blocks of fixed size, which sequences hold, share and give back.

A layer has one tensor of all blocks. A pass reads the rows of its sequences through a list of indices, which is the
same for all layers of a kind, and writes those of new context through another. Who holds which block is the host's
business (`serving.context_memory`).

Shapes: P rows of all blocks, K kept positions of the sequences of a pass, n new context tokens, G key/value heads, D
head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_diffgemma.config import ModelConfig
from nemo_diffgemma.model.cache import KeyValue
from nemo_diffgemma.model.segments import Span, Stream

BLOCK_TOKENS = 128  # as FlexAttention's blocks: the keys of a sequence lie in its blocks alike, wherever these are


@dataclass(frozen=True, eq=False)
class PassRows:
    """Where the keys of a pass are in the layers of one kind: those of new context [n], and all that is kept [K].

    `kept` are the positions of each sequence, new ones included.
    """

    new_n: Tensor
    seen_K: Tensor
    kept: tuple[Span, ...]


@dataclass(frozen=True, eq=False)
class PagedLayer:
    """Keys and values of one layer, [P, G, D], as a pass sees them."""

    keys: Tensor
    values: Tensor
    rows: PassRows

    def extended(self, keys_TGD: Tensor, values_TGD: Tensor, stream: Stream) -> KeyValue:
        """What the sequences of the pass keep, with its new context, which is written into the blocks."""
        for blocks, new in ((self.keys, keys_TGD), (self.values, values_TGD)):
            if stream.context_tokens:
                blocks.index_copy_(0, self.rows.new_n, new[: stream.context_tokens])
        seen = self.rows.seen_K
        return KeyValue(self.keys.index_select(0, seen), self.values.index_select(0, seen), self.rows.kept)


def row_bytes(model: ModelConfig, kind: str, tensor_parallel: int, dtype: torch.dtype) -> int:
    """Bytes of one position in all layers of a kind, on one rank."""
    total = 0
    for layer in range(model.num_hidden_layers):
        if model.layer_kind(layer) == kind:
            head_dim, heads = model.heads_of_rank(layer, tensor_parallel)
            total += 2 * head_dim * heads * dtype.itemsize
    return total
