"""Cross-entropy and self-conditioning signal of training, with gradients, over a vocabulary that is cut.

Logits are made some positions at a time (`LOSS_BYTES`), and gradients where the logits are: none is kept for later.
The gradient of the table is added where it belongs (Megatron's float32 `main_grad`) as it is made, a part of the
vocabulary at a time: on a GPU all that is held at once is 2.5 times `LOSS_BYTES` of logits and a few parts.

Shapes: N positions, n of a part, H hidden, v ids of this rank (the real ones), c ids of a part. Weight tables are
`[v + padding, H]`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_diffgemma.diffusion.levels import Shift
from nemo_diffgemma.model.table_gradient import add_product, input_of, main_gradient
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
    """Soft embedding of a gradient-free hidden state; the table gets its gradient by recomputing the probabilities.

    `sum_vH` takes the gradient where it is given, and `anchor` then stands for the table in the graph.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight: Tensor,
        anchor: Tensor | None,
        sum_vH: Tensor | None,
        shard: VocabularyShard,
        softcap: float,
    ) -> Tensor:
        with reused_scratch():
            parts = [
                statistics(part, weight, shard, softcap=softcap) for part in hidden_NH.split(positions_at_once(weight))
            ]
        ctx.save_for_backward(hidden_NH, weight, torch.cat([part.log_sum_exp_N for part in parts]))
        ctx.sum_vH, ctx.shard, ctx.softcap = sum_vH, shard, softcap
        return torch.cat([part.soft_embedding_NH for part in parts if part.soft_embedding_NH is not None])

    @staticmethod
    def backward(ctx: Any, gradient_NH: Tensor) -> tuple[None, Tensor | None, None, None, None, None]:
        hidden_NH, weight, log_sum_exp_N = ctx.saved_tensors
        sum_vH = torch.zeros_like(weight) if ctx.sum_vH is None else ctx.sum_vH
        ids = CHUNK if weight.device.type == "cpu" else max(CHUNK, LOSS_BYTES // (4 * hidden_NH.shape[0]))
        for start in range(0, ctx.shard.size, ids):
            cut = slice(start, min(start + ids, ctx.shard.size))
            z_Nc = capped_logits(hidden_NH, weight[cut], ctx.softcap, ctx.softcap)
            p_Nc = z_Nc.sub_(log_sum_exp_N[:, None]).exp_()
            add_product(sum_vH[cut], p_Nc.to(weight.dtype), gradient_NH)
        return None, sum_vH if ctx.sum_vH is None else None, None, None, None, None


def soft_embedding(hidden_NH: Tensor, weight: Tensor, shard: VocabularyShard, softcap: float) -> Tensor:
    """Expected table row under the untempered distribution of `hidden_NH`, [N, H], differentiable in the table only."""
    table, anchor = input_of(weight)
    sum_vH = None if anchor is None else main_gradient(weight)
    return _SoftEmbedding.apply(hidden_NH.detach(), table, anchor, sum_vH, shard, softcap)


# -- cross-entropy ---------------------------------------------------------------------------------------------------


class LossGradient(NamedTuple):
    """A loss whose gradient is known: of the table it is where it belongs already, of the hidden states it is here.

    `losses_N` are the cross-entropies, and `correct_N` says where no id has a larger logit than the label.
    """

    loss: Tensor
    hidden_gradient_NH: Tensor
    losses_N: Tensor
    correct_N: Tensor


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
        shift: Shift | None,
    ) -> tuple[Tensor, Tensor]:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        hidden_gradient = torch.zeros_like(hidden_NH) if need_hidden else None
        weight_gradient = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if need_weight else None
        losses_N, _ = _losses(
            hidden_NH, weight, labels_N, weights_N, shard, softcap, hidden_gradient, weight_gradient, shift
        )
        ctx.save_for_backward(hidden_gradient, None if weight_gradient is None else weight_gradient.to(weight.dtype))
        ctx.mark_non_differentiable(losses_N)
        return (losses_N * weights_N).sum(), losses_N

    @staticmethod
    def backward(ctx: Any, scale: Tensor, _: Any) -> tuple:
        return *(None if g is None else g * scale.to(g.dtype) for g in ctx.saved_tensors), *[None] * 5


def linear_cross_entropy(
    hidden_NH: Tensor,
    weight: Tensor,
    labels_N: Tensor,
    weights_N: Tensor,
    shard: VocabularyShard,
    softcap: float,
    shift: Shift | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum over positions of `weights_N` times the cross-entropy of softcapped logits, and the cross-entropies [N].

    Differentiable in `hidden_NH` (this rank's share of its gradient, to be summed over tensor parallelism) and in
    `weight`, through the first result only. The gradient of the table is held from the forward to the backward pass.
    """
    return _LinearCrossEntropy.apply(hidden_NH, weight, labels_N, weights_N.float(), shard, softcap, shift)


@torch.no_grad()
def linear_cross_entropy_gradient(
    hidden_NH: Tensor,
    weight: Tensor,
    labels_N: Tensor,
    weights_N: Tensor,
    shard: VocabularyShard,
    softcap: float,
    shift: Shift | None = None,
) -> LossGradient:
    """`linear_cross_entropy` and its gradients at once: what training runs.

    That of `weight` is added to its `main_grad`, or to `grad` where Megatron holds no gradient; a frozen one gets none.
    """
    weights_N = weights_N.float()
    hidden_gradient = torch.zeros_like(hidden_NH)
    sum_vH = main_gradient(weight)
    if sum_vH is None and weight.requires_grad:
        weight.grad = sum_vH = torch.zeros_like(weight) if weight.grad is None else weight.grad
    losses_N, correct_N = _losses(
        hidden_NH, weight, labels_N, weights_N, shard, softcap, hidden_gradient, sum_vH, shift
    )
    return LossGradient((losses_N * weights_N).sum(), hidden_gradient, losses_N, correct_N)


def _losses(
    hidden_NH: Tensor,
    weight: Tensor,
    labels_N: Tensor,
    weights_N: Tensor,
    shard: VocabularyShard,
    softcap: float,
    hidden_gradient: Tensor | None,
    weight_gradient: Tensor | None,
    shift: Shift | None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropies [N] float32 and where the label has the largest logit, [N] bool.

    Gradients of their weighted sum are added to what is given for them.
    """
    rows, step = weight[: shard.size], positions_at_once(weight)
    losses_N = torch.empty(hidden_NH.shape[0], dtype=torch.float32, device=hidden_NH.device)
    correct_N = torch.empty_like(losses_N, dtype=torch.bool)
    for start in range(0, hidden_NH.shape[0], step):
        cut = slice(start, start + step)
        z_nv = capped_logits(hidden_NH[cut], rows, softcap, softcap)
        shifted = None if shift is None else _Shifted(z_nv, shift.part(cut), shard)
        p_nv, losses_N[cut], correct_N[cut] = probabilities_and_losses(z_nv, labels_N[cut], shard)
        if shifted is not None:
            shifted.undo()
        if hidden_gradient is None and weight_gradient is None:
            continue
        gradient_nv = _logit_gradient(p_nv, z_nv, labels_N[cut], weights_N[cut], shard, softcap).to(weight.dtype)
        del z_nv, p_nv
        if hidden_gradient is not None:
            hidden_gradient[cut] = gradient_nv @ rows
        if weight_gradient is not None:
            add_product(weight_gradient[: shard.size], gradient_nv, hidden_NH[cut])
    return losses_N, correct_N


class _Shifted:
    """Logits with a shift in them, until `undo`: the softcap's derivative is that of the logits before."""

    def __init__(self, z_nv: Tensor, shift: Shift, shard: VocabularyShard) -> None:
        self._z_nv, (self._local_n, mine_n) = z_nv, _local(shift.ids_N, shard)
        if shard.size:
            self._before_n1 = z_nv.gather(1, self._local_n[:, None])
            z_nv.scatter_(1, self._local_n[:, None], self._before_n1 + (shift.amounts_N * mine_n)[:, None])

    def undo(self) -> None:
        if self._z_nv.shape[1]:
            self._z_nv.scatter_(1, self._local_n[:, None], self._before_n1)


def positions_at_once(weight: Tensor) -> int:
    """How many positions have their logits made at a time."""
    return max(1, LOSS_BYTES // (4 * max(1, weight.shape[0])))


def probabilities_and_losses(z_nv: Tensor, labels_n: Tensor, shard: VocabularyShard) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities [n, v], cross-entropies [n], and where no logit is larger than the label's [n]."""
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
    maximum_n, mass_n, label_n = maximum_n1[:, 0], *sums_2n
    return e_nv.div_(mass_n[:, None]), mass_n.log() + maximum_n - label_n, label_n >= maximum_n


def shifted_logits(
    hidden_nH: Tensor, rows: Tensor, softcap: float, shift: Shift | None, shard: VocabularyShard
) -> Tensor:
    """Softcapped logits of this rank's ids with the shift in them, [n, v] float32."""
    z_nv = capped_logits(hidden_nH, rows, softcap, softcap)
    if shift is not None:
        _Shifted(z_nv, shift, shard)
    return z_nv


def probability_of(p_nv: Tensor, ids_n: Tensor, shard: VocabularyShard) -> Tensor:
    """The probabilities of one id a position, [n]; 0 where another rank has the id."""
    if not shard.size:
        return torch.zeros_like(ids_n, dtype=torch.float32)
    local_n, mine_n = _local(ids_n, shard)
    return torch.where(mine_n, p_nv.gather(1, local_n[:, None])[:, 0], 0.0)


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
