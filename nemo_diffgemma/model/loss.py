"""Cross-entropy and self-conditioning signal of training, with gradients, over a vocabulary that is cut.

Logits are made some positions at a time (`LOSS_BYTES`), and gradients where the logits are: none is kept for later.

Shapes: N positions, n of a part, H hidden, v ids of this rank (the real ones), c ids of a chunk. Weight tables are
`[v + padding, H]`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_diffgemma.model.vocabulary import (
    CHUNK,
    MASKED_LOGIT,
    VocabularyShard,
    capped_logits,
    reused_scratch,
    statistics,
)

LOSS_BYTES = 256 << 20  # of float32 logits that the loss holds at a time


# -- soft embedding --------------------------------------------------------------------------------------------------


class _SoftEmbedding(torch.autograd.Function):
    """Soft embedding of a gradient-free hidden state; the table gets its gradient by recomputing the probabilities."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight: Tensor, shard: VocabularyShard, softcap: float) -> Tensor:
        step = max(1, LOSS_BYTES // (4 * weight.shape[0]))
        with reused_scratch():
            parts = [statistics(part, weight, shard, softcap=softcap) for part in hidden_NH.split(step)]
        ctx.save_for_backward(hidden_NH, weight, torch.cat([part.log_sum_exp_N for part in parts]))
        ctx.shard, ctx.softcap = shard, softcap
        return torch.cat([part.soft_embedding_NH for part in parts if part.soft_embedding_NH is not None])

    @staticmethod
    def backward(ctx: Any, gradient_NH: Tensor) -> tuple[None, Tensor, None, None]:
        hidden_NH, weight, log_sum_exp_N = ctx.saved_tensors
        gradient = torch.zeros_like(weight)
        for start in range(0, ctx.shard.size, CHUNK):
            cut = slice(start, min(start + CHUNK, ctx.shard.size))
            z_Nc = capped_logits(hidden_NH, weight[cut], ctx.softcap, ctx.softcap)
            p_Nc = z_Nc.sub_(log_sum_exp_N[:, None]).exp_()
            gradient[cut] = p_Nc.to(weight.dtype).t() @ gradient_NH
        return None, gradient, None, None


def soft_embedding(hidden_NH: Tensor, weight: Tensor, shard: VocabularyShard, softcap: float) -> Tensor:
    """Expected table row under the untempered distribution of `hidden_NH`, [N, H], differentiable in the table only."""
    return _SoftEmbedding.apply(hidden_NH.detach(), weight, shard, softcap)


# -- cross-entropy -----------------------------------------------------------------------------------------------------


class _LinearCrossEntropy(torch.autograd.Function):
    """Weighted sum of cross-entropies, with gradients computed where the logits are, some positions at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight: Tensor,
        labels_N: Tensor,
        weights_N: Tensor,
        shard: VocabularyShard,
        softcap: float,
    ) -> tuple[Tensor, Tensor]:
        rows = weight[: shard.size]
        losses_N = torch.empty(hidden_NH.shape[0], dtype=torch.float32, device=hidden_NH.device)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        hidden_gradient = torch.zeros_like(hidden_NH) if need_hidden else None
        weight_gradient = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if need_weight else None
        step = max(1, LOSS_BYTES // (4 * max(1, weight.shape[0])))
        for start in range(0, hidden_NH.shape[0], step):
            cut = slice(start, start + step)
            z_nv = capped_logits(hidden_NH[cut], rows, softcap, softcap)
            p_nv, losses_N[cut] = _probabilities_and_losses(z_nv, labels_N[cut], shard)
            if not (need_hidden or need_weight):
                continue
            gradient = _logit_gradient(p_nv, z_nv, labels_N[cut], weights_N[cut], shard, softcap).to(weight.dtype)
            if hidden_gradient is not None:
                hidden_gradient[cut] = gradient @ rows
            if weight_gradient is not None:
                weight_gradient[: shard.size] += gradient.t() @ hidden_NH[cut]
        ctx.save_for_backward(hidden_gradient, None if weight_gradient is None else weight_gradient.to(weight.dtype))
        ctx.mark_non_differentiable(losses_N)
        return (losses_N * weights_N).sum(), losses_N

    @staticmethod
    def backward(ctx: Any, scale: Tensor, _: Any) -> tuple:
        return *(None if g is None else g * scale.to(g.dtype) for g in ctx.saved_tensors), None, None, None, None


def _probabilities_and_losses(z_nv: Tensor, labels_n: Tensor, shard: VocabularyShard) -> tuple[Tensor, Tensor]:
    maximum_n1 = z_nv.amax(1, keepdim=True) if shard.size else z_nv.new_full((z_nv.shape[0], 1), MASKED_LOGIT)
    if shard.parallel:
        dist.all_reduce(maximum_n1, op=dist.ReduceOp.MAX, group=shard.group)
    e_nv = (z_nv - maximum_n1).exp_()
    local_n, mine_n = _local(labels_n, shard)
    picked_n = (
        torch.where(mine_n, z_nv.gather(1, local_n[:, None])[:, 0], 0.0)
        if shard.size
        else torch.zeros_like(labels_n, dtype=torch.float32)
    )
    sums_2n = torch.stack([e_nv.sum(1), picked_n])
    if shard.parallel:
        dist.all_reduce(sums_2n, group=shard.group)
    return e_nv.div_(sums_2n[0][:, None]), sums_2n[0].log() + maximum_n1[:, 0] - sums_2n[1]


def _logit_gradient(
    p_nv: Tensor, z_nv: Tensor, labels_n: Tensor, weights_n: Tensor, shard: VocabularyShard, softcap: float
) -> Tensor:
    """Gradient with respect to the logits before the softcap: weight * (p - onehot) * (1 - (z / cap)^2)."""
    if shard.size:
        local_n, mine_n = _local(labels_n, shard)
        p_nv.scatter_add_(1, local_n[:, None], -mine_n.to(p_nv.dtype)[:, None])
    return p_nv.mul_(weights_n[:, None]).mul_(z_nv.div_(softcap).square_().neg_().add_(1.0))


def _local(labels_n: Tensor, shard: VocabularyShard) -> tuple[Tensor, Tensor]:
    local_n = labels_n - shard.first_id
    mine_n = (local_n >= 0) & (local_n < shard.size)
    return local_n.clamp(0, max(shard.size - 1, 0)), mine_n


def linear_cross_entropy(
    hidden_NH: Tensor, weight: Tensor, labels_N: Tensor, weights_N: Tensor, shard: VocabularyShard, softcap: float
) -> tuple[Tensor, Tensor]:
    """Sum over positions of `weights_N` times the cross-entropy of softcapped logits, and the cross-entropies [N].

    Differentiable in `hidden_NH` (this rank's share of its gradient, to be summed over tensor parallelism) and in
    `weight`, through the first result only. Peak memory is `LOSS_BYTES` of logits and as much of probabilities,
    whatever N is.
    """
    return _LinearCrossEntropy.apply(hidden_NH, weight, labels_N, weights_N.float(), shard, softcap)
