"""Products of all tokens of a stream, each rank having its share of the tokens.

Several products share one gather; its backward sums the gradients of all and scatters them. What is kept for the
backward are this rank's tokens, which are gathered once more there: at TP4 a quarter of the memory (so do Megatron's
linears under sequence parallelism, with a gather for each product).

Shapes: T tokens of the stream, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional as F


def gather_tokens(x: Tensor, group: ProcessGroup) -> Tensor:
    """This rank's tokens -> all tokens; the backward sums the ranks' gradients and scatters them."""
    return x if group.size() == 1 else gather_from_sequence_parallel_region(x, group=group)


def products_of_all(x: Tensor, weights: Sequence[Tensor], group: ProcessGroup) -> Sequence[Tensor]:
    """`[T, H] @ weight.T` for each weight, from this rank's tokens [T/tp, H]."""
    if group.size() == 1:
        return tuple(F.linear(x, weight) for weight in weights)
    return _ProductsOfAll.apply(group, x, *weights)


class _ProductsOfAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: ProcessGroup, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        ctx.save_for_backward(x if any(ctx.needs_input_grad[2:]) else None, *weights)  # of frozen weights nobody asks
        x_TH = gather_tokens(x, group)
        return tuple(F.linear(x_TH, weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        _, of_x, *of_weights = ctx.needs_input_grad
        results: list[Tensor | None] = [None, None, *(None for _ in weights)]
        if of_x:
            gradient_TH = gradients[0] @ weights[0]
            for gradient, weight in zip(gradients[1:], weights[1:], strict=True):
                gradient_TH.addmm_(gradient, weight)
            results[1] = reduce_scatter_to_sequence_parallel_region(gradient_TH, group=ctx.group)
        if any(of_weights):
            x_TH = gather_tokens(x, ctx.group)
            results[2:] = [
                gradient.t() @ x_TH if wanted else None for gradient, wanted in zip(gradients, of_weights, strict=True)
            ]
        return tuple(results)
