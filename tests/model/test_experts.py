"""Experts by rows: whatever tokens choose, the ranks' shares add up to the dense sum; undefined rows leave no trace.

Shapes: T tokens, K chosen, E experts in all, H hidden, W expert width.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from nemo_diffgemma import ModelConfig, ParallelLayout
from nemo_diffgemma.model import experts as module
from nemo_diffgemma.model.dispatch import Counting, SortedChoices
from nemo_diffgemma.model.experts import ExpertPass, MixtureOfExperts
from nemo_diffgemma.model.network import transformer_config
from nemo_diffgemma.parallel import initialize, process_groups

EXPERTS, HIDDEN, WIDTH = 8, 16, 6  # a width that is no whole number of 16-byte words


@pytest.fixture(scope="module")
def mixture(single) -> MixtureOfExperts:
    initialize(ParallelLayout())
    config = ModelConfig(
        hidden_size=HIDDEN, num_experts=EXPERTS, top_k_experts=3, moe_intermediate_size=WIDTH, num_hidden_layers=1
    )
    made = MixtureOfExperts(transformer_config(config, ParallelLayout(), torch.float32), process_groups())
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        nn.init.normal_(parameter, generator=generator)
    return made


def dense(mixture: MixtureOfExperts, x_TH: Tensor, weights_TK: Tensor, chosen_TK: Tensor) -> Tensor:
    """Every expert of every token, in float64."""
    gate, up = torch.einsum("egwh,th->gtew", mixture.experts.gate_up_proj.double(), x_TH.double())
    out_TEH = torch.einsum("ehw,tew->teh", mixture.experts.down_proj.double(), F.gelu(gate, approximate="tanh") * up)
    shares_TE = torch.zeros(len(x_TH), EXPERTS, dtype=torch.float64).scatter(1, chosen_TK, weights_TK.double())
    return torch.einsum("teh,te->th", out_TEH, shares_TE)


class _UndefinedOutput(torch.autograd.Function):
    """NaN in rows from `end` on, where CUDA leaves what lay in memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, end: int) -> Tensor:
        return torch.cat([x[:end], torch.full_like(x[end:], torch.nan)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _UndefinedGradient(torch.autograd.Function):
    """The same of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, end: int) -> Tensor:
        ctx.end = end
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _UndefinedOutput.apply(gradient, ctx.end), None


def leaving_rows_undefined(x: Tensor, weight: Tensor, offs: Tensor, product: Any = F.grouped_mm) -> Tensor:
    """`grouped_mm` as on CUDA: it writes rows of groups alone, of the product and of its gradient."""
    end = int(offs[-1])
    return _UndefinedOutput.apply(product(_UndefinedGradient.apply(x, end), weight, offs=offs), end)


def share(mixture: MixtureOfExperts, rank: int, ranks: int) -> MixtureOfExperts:
    """The mixture as rank `rank` of `ranks` has it."""
    mine = object.__new__(MixtureOfExperts)
    nn.Module.__init__(mine)
    mine.__dict__ |= {k: v for k, v in mixture.__dict__.items() if not k.startswith("_")}
    mine.experts = object.__new__(type(mixture.experts))
    nn.Module.__init__(mine.experts)
    local = EXPERTS // ranks
    mine.first_expert = rank * local
    for name, parameter in mixture.experts.named_parameters():
        setattr(mine.experts, name, nn.Parameter(parameter.detach()[rank * local : (rank + 1) * local].clone()))
    return mine


def choices(seed: int, tokens: int, top_k: int, skew: str) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if skew == "random":
        return torch.rand(tokens, EXPERTS, generator=generator).topk(top_k).indices
    first = {"first": 0, "last": EXPERTS - top_k}[skew]  # all tokens choose the same ones
    return torch.arange(first, first + top_k).repeat(tokens, 1)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(1, 9),
    top_k=st.integers(1, 4),
    ranks=st.sampled_from([1, 2, 4, 8]),
    skew=st.sampled_from(["random", "first", "last"]),
    is_counted=st.booleans(),
)
def test_shares_add_up_to_the_dense_sum(mixture, seed, tokens, top_k, ranks, skew, is_counted):
    """Also where one expert has every token and others, or whole ranks, have none."""
    with mock.patch.object(module.F, "grouped_mm", leaving_rows_undefined):
        check_shares(mixture, seed, choices(seed, tokens, top_k, skew), ranks, is_counted)


def check_shares(mixture: MixtureOfExperts, seed: int, chosen_TK: Tensor, ranks: int, is_counted: bool) -> None:
    """Outputs, and gradients of tokens, weights and experts."""
    tokens = len(chosen_TK)
    generator = torch.Generator().manual_seed(seed)
    x_TH = torch.randn(tokens, HIDDEN, generator=generator).requires_grad_()
    weights_TK = torch.rand(chosen_TK.shape, generator=generator).requires_grad_()
    asked_TH = torch.randn(tokens, HIDDEN, generator=generator)
    truth = dense(mixture, x_TH, weights_TK, chosen_TK)
    wanted = torch.autograd.grad((truth * asked_TH).sum(), [x_TH, weights_TK, *mixture.experts.parameters()])
    total = torch.zeros_like(asked_TH)
    parts = [share(mixture, rank, ranks) for rank in range(ranks)]
    for part in parts:
        sorted_choices = SortedChoices(part._local(chosen_TK), EXPERTS // ranks, Counting(x_TH.device))
        rows = sorted_choices.counted(int(sorted_choices.count)) if is_counted else sorted_choices.uncounted()
        total = total + part._compute(x_TH, weights_TK, rows)
    torch.testing.assert_close(total.double(), truth, atol=1e-4, rtol=1e-5)
    (total * asked_TH).sum().backward()
    found = [x_TH.grad, weights_TK.grad]
    for name, _ in mixture.experts.named_parameters():
        found.append(torch.cat([part.experts.get_parameter(name).grad for part in parts]))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("missing", [-2, 2])
def test_a_count_that_is_not_true_any_more_leaves_no_row_undefined(mixture, missing):
    """As if recomputation had chosen otherwise: wrong, but finite and inside of memory."""
    chosen_TK, part = choices(0, 6, 3, "random"), share(mixture, 1, 2)
    sorted_choices = SortedChoices(part._local(chosen_TK), EXPERTS // 2, Counting(chosen_TK.device))
    rows = sorted_choices.counted(int(sorted_choices.count) + missing)
    assert int(rows.ends_L[-1]) == len(rows.tokens_R) and (rows.ends_L.diff() >= 0).all()
    with mock.patch.object(module.F, "grouped_mm", leaving_rows_undefined):
        assert part._compute(torch.ones(6, HIDDEN), torch.ones(6, 3), rows).isfinite().all()


@pytest.mark.parametrize("at_a_time", [1, 7, 1 << 16])
def test_tokens_without_gradient_go_some_at_a_time(mixture, monkeypatch, at_a_time):
    """It bounds memory and changes nothing."""
    monkeypatch.setattr(module, "UNCOUNTED", at_a_time)
    chosen_TK, part, call = choices(1, 9, 3, "random"), share(mixture, 1, 2), a_pass()
    x_TH, weights_TK = torch.randn(9, HIDDEN), torch.rand(9, 3)
    with torch.no_grad():
        found = part._uncounted(x_TH, weights_TK, part._local(chosen_TK), call)
        is_ours = (chosen_TK >= part.first_expert).float()
        truth = dense(mixture, x_TH, weights_TK * is_ours, chosen_TK)
    torch.testing.assert_close(found.double(), truth, atol=1e-4, rtol=1e-5)


def a_pass() -> ExpertPass:
    return ExpertPass(replicas_alike=True, tokens=9, recomputed=False, counting=Counting(torch.device("cpu")))
