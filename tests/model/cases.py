"""Jobs for ranks: arithmetic over a vocabulary that is cut over them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from nemo_diffgemma.model import loss, table_gradient, token_classes, vocabulary
from nemo_diffgemma.model import token_scores as scores_of
from nemo_diffgemma.model.vocabulary import VocabularyShard
from nemo_diffgemma.parallel import ParallelLayout, initialize, process_groups


def dense(hidden_NH: Tensor, table_VH: Tensor, softcap: float, temperature: float = 1.0) -> Tensor:
    """Tempered logits in float64."""
    return softcap * torch.tanh(hidden_NH.double() @ table_VH.double().T / softcap) / temperature


def problem(seed: int, positions: int, ids: int, hidden: int, scale: float = 1.0, **arguments: Any) -> dict[str, Any]:
    """Random arguments of `statistics`; hidden times table has standard deviation `scale` before the softcap."""
    generator = torch.Generator().manual_seed(seed)
    return dict(
        hidden_NH=torch.randn(positions, hidden, generator=generator) * scale * hidden**-0.5,
        table_VH=torch.randn(ids, hidden, generator=generator),
        uniforms_N=torch.rand(positions, generator=generator),
        **{"softcap": 30.0, **arguments},
    )


def cut(table_VH: Tensor, tensor: int) -> tuple[Tensor, VocabularyShard]:
    """This rank's rows of a table padded to a multiple of 128; padding is NaN, so whoever reads it is found out."""
    initialize(ParallelLayout(tensor=tensor))
    group = process_groups().tp
    vocab_size = table_VH.shape[0]
    padded = -(-vocab_size // 128) * 128
    whole = torch.full((padded, table_VH.shape[1]), torch.nan, dtype=table_VH.dtype)
    whole[:vocab_size] = table_VH
    return whole.chunk(tensor)[group.rank()].contiguous(), VocabularyShard.of(vocab_size, padded, group)


def statistics(tensor: int, problems: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
    """`vocabulary.statistics` of some (hidden_NH, table_VH, keyword arguments)."""
    return [_statistics(tensor, **problem) for problem in problems]


def _statistics(tensor: int, hidden_NH: Tensor, table_VH: Tensor, **arguments: Any) -> dict[str, Tensor]:
    found = vocabulary.statistics(hidden_NH, *cut(table_VH, tensor), **arguments)
    return {name: value for name, value in vars(found).items() if name != "allowed_nC" or value is not None}


@dataclass(frozen=True)
class Chosen:
    """A constraint that chooses the classes `chosen_nC`, whatever their logits are."""

    cells_nC: Tensor
    class_of_id_nV: Tensor
    classes: int
    chosen_nC: Tensor

    def choose(self, maxima_nCK: Tensor) -> Tensor:
        assert maxima_nCK.shape == (*self.chosen_nC.shape, self.classes)
        return self.chosen_nC


def tokens_of_classes(tensor: int, interleaved: bool, problems: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
    """`statistics` with constraints, parts of the vocabulary laid out as on a GPU or as on a CPU."""
    laid_out = functools.partial(token_classes.ClassMaxima, interleaved=interleaved)
    with mock.patch.object(vocabulary, "ClassMaxima", laid_out):
        return statistics(tensor, problems)


def logits(tensor: int, hidden_NH: Tensor, table_VH: Tensor, softcap: float) -> tuple[Tensor, Tensor]:
    """Logits, and the soft embedding of them."""
    weight, shard = cut(table_VH, tensor)
    found = vocabulary.logits(hidden_NH, weight, shard, softcap)
    return found, vocabulary.soft_embedding_of_logits(found, weight, shard)


def cross_entropy(
    tensor: int,
    hidden_NH: Tensor,
    table_VH: Tensor,
    labels_N: Tensor,
    weights_N: Tensor,
    softcap: float,
    loss_bytes: int | None = None,
    scale: float = 1.0,
) -> dict[str, Tensor]:
    """Loss, losses and gradients: this rank's share of the hidden one, this rank's rows of the table's."""
    weight, shard = cut(table_VH, tensor)
    hidden_NH, weight = hidden_NH.clone().requires_grad_(), weight.requires_grad_()
    before = loss.LOSS_BYTES
    loss.LOSS_BYTES = before if loss_bytes is None else loss_bytes
    try:
        total, losses_N = loss.linear_cross_entropy(hidden_NH, weight, labels_N, weights_N, shard, softcap)
        (total * scale).backward()
    finally:
        loss.LOSS_BYTES = before
    assert hidden_NH.grad is not None and weight.grad is not None
    return dict(loss=total.detach(), losses_N=losses_N, hidden=hidden_NH.grad, table=weight.grad)


def soft_embedding(
    tensor: int, hidden_NH: Tensor, table_VH: Tensor, softcap: float, gradient_NH: Tensor
) -> dict[str, Tensor | None]:
    """Soft embedding and the gradients for a gradient of it."""
    weight, shard = cut(table_VH, tensor)
    hidden_NH, weight = hidden_NH.clone().requires_grad_(), weight.requires_grad_()
    soft_NH = loss.soft_embedding(hidden_NH, weight, shard, softcap)
    soft_NH.backward(gradient_NH)
    return dict(soft=soft_NH.detach(), hidden=hidden_NH.grad, table=weight.grad)


def accumulated(
    tensor: int,
    hidden_NH: Tensor,
    table_VH: Tensor,
    labels_N: Tensor,
    weights_N: Tensor,
    softcap: float,
    gradient_NH: Tensor,
    main: bool,
) -> dict[str, Tensor]:
    """Loss with its gradient, soft embedding and look-up of one table; where the table's gradient went.

    `main`: the table has a float32 sum of gradients, which starts at 1, as Megatron's DDP gives it.
    """
    weight, shard = cut(table_VH, tensor)
    table = torch.nn.Parameter(weight)
    if main:
        table.main_grad = torch.ones(weight.shape)  # type: ignore[attr-defined]
    total, hidden_gradient, *_ = loss.linear_cross_entropy_gradient(
        hidden_NH, table, labels_N, weights_N, shard, softcap
    )
    soft_NH = loss.soft_embedding(hidden_NH, table, shard, softcap)
    soft_NH.backward(gradient_NH)
    local_N = labels_N - shard.first_id
    mine_N1 = ((local_N >= 0) & (local_N < len(table)))[:, None]
    rows_NH = table_gradient.look_up(local_N.clamp(0, len(table) - 1), table)
    torch.where(mine_N1, rows_NH, 0.0).backward(gradient_NH)
    gradient = table.main_grad - 1 if main else table.grad  # type: ignore[attr-defined]
    assert main == (table.grad is None)
    return dict(loss=total, hidden=hidden_gradient, table=gradient)


def token_scores(tensor: int, hidden_NH: Tensor, table_VH: Tensor, ids_N: Tensor, **arguments: Any) -> Tensor:
    """`token_scores.token_scores` over a cut table."""
    return scores_of.token_scores(hidden_NH, ids_N, *cut(table_VH, tensor), **arguments)
