"""A stand-in for torch's FlexAttention, whose kernel Triton would compile for a GPU that is there.

Shapes, strides and saved tensors as the compiled call has them; FLOPs of the blocks that the mask does not leave out;
one launch forward, two backward (the sums of output times gradient, then all three gradients).

Shapes: B batch, N query heads, G key/value heads, T queries, K keys, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nemo_diffgemma.dry_run import products, shadows
from nemo_diffgemma.dry_run.ledger import Ledger

_LIBRARY = torch.library.Library("nemo_diffgemma_dry_run", "DEF")
_LIBRARY.define("flex_attention(Tensor q, Tensor k, Tensor v, int scores) -> (Tensor, Tensor)")
_LIBRARY.define(
    "flex_attention_backward(Tensor gradient, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, int scores) "
    "-> (Tensor, Tensor, Tensor)"
)


def _forward(q: Tensor, k: Tensor, v: Tensor, scores: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _backward(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scores: int) -> Any:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


_LIBRARY.impl("flex_attention", _forward, "Meta")
_LIBRARY.impl("flex_attention_backward", _backward, "Meta")
FORWARD = torch.ops.nemo_diffgemma_dry_run.flex_attention.default
BACKWARD = torch.ops.nemo_diffgemma_dry_run.flex_attention_backward.default


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scores: int) -> tuple[Tensor, Tensor]:
        out, lse = FORWARD(q, k, v, scores)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scores = scores
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Any) -> Any:
        return *BACKWARD(gradient, *ctx.saved_tensors, ctx.scores), None


def flex_attention(
    query: Tensor, key: Tensor, value: Tensor, *, block_mask: Any = None, return_lse: bool = False, **_: Any
) -> Any:
    """`torch.nn.attention.flex_attention.flex_attention`, without a score_mod."""
    out, lse = _Attention.apply(query, key, value, _scores(query, key, block_mask))
    return (out, lse) if return_lse else out


def _scores(query: Tensor, key: Tensor, block_mask: Any) -> int:
    """Pairs of query and key that are computed, over all heads and rows of the batch."""
    rows, heads, queries = query.shape[:3]
    if block_mask is None:
        return rows * heads * queries * key.shape[2]
    pairs = block_mask.BLOCK_SIZE[0] * block_mask.BLOCK_SIZE[1]
    counts = [block_mask.kv_num_blocks, block_mask.full_kv_num_blocks]
    blocks = sum(
        int(shadows.read(x).sum()) * rows * heads // (x.shape[0] * x.shape[1]) for x in counts if x is not None
    )
    return blocks * pairs


def record(ledger: Ledger, func: Any, args: Any) -> None:
    """Count launches, FLOPs (two products forward, five backward) and the kernel."""
    forward = func is FORWARD
    q, scores = (args[0], args[3]) if forward else (args[1], args[6])
    ledger.add("launches", number=1 if forward else 2)
    ledger.add("tflop", "flex_attention", number=(2 if forward else 5) * 2e-12 * scores * q.shape[-1])
    if forward:
        products.attention(ledger, "flex", q)
