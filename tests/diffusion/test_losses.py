"""Losses by their formulas: the leave-one-out posterior, weights by noise level, sums by level, per example."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, one_hot

from nemo_diffgemma.diffusion.levels import BINS, leave_one_out_shift, reciprocal_weights, sums_by_level
from nemo_diffgemma.diffusion.objective import (
    Counts,
    ObjectiveConfig,
    Scored,
    choose_canvases,
    corrupt,
    count,
    objective,
)
from nemo_diffgemma.errors import UserError
from tests.evaluation.cases import network_and_rows

LOSSES: dict[str, dict[str, Any]] = {
    "as published": {},
    "leave one out": dict(prediction="leave_one_out"),
    "reweighted": dict(level_weighting="reciprocal", largest_level_weight=5.0),
    "both, by token": dict(prediction="leave_one_out", level_weighting="reciprocal", reduction="token"),
}


def step(network: Any, rows: Any, config: ObjectiveConfig, totals: Counts | None = None) -> tuple[Any, Any, Any]:
    """A scored micro-batch after its backward passes, its canvases and their noise."""
    canvases = choose_canvases(rows, 16, config.canvases_per_example, 0)
    corrupted = corrupt(rows, canvases, 16, 64, 0)
    scored = Scored(network, rows, canvases, corrupted, config, 0, totals or count(rows, canvases, 16))
    scored.backward_canvases()
    scored.backward_context()
    return scored, canvases, corrupted


def gradients(network: Any) -> dict[str, torch.Tensor]:
    parameters = network.named_parameters()
    found = {name: parameter.grad.clone() for name, parameter in parameters if parameter.grad is not None}
    network.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_its_formula_and_that_of_its_examples_one_by_one(single, name):
    """From dense logits of one canvas after the other; and gradients of a batch are those of its rows, added up."""
    network, rows = network_and_rows({}, puzzles=4)
    config = ObjectiveConfig(self_conditioning_probability=0.0, **LOSSES[name])
    whole, canvases, corrupted = step(network, rows, config)
    of_batch = gradients(network)

    logits = network.denoise(corrupted.noised_MC, network.encode(rows.tokens_T.view(4, -1)[:, :18])).double()
    total, weights = 0.0, []
    for z_CV, noised_C, clean_C, level in zip(
        logits, corrupted.noised_MC, corrupted.clean_MC, corrupted.levels_M.double().tolist(), strict=True
    ):
        if config.prediction == "leave_one_out":
            z_CV = z_CV + math.log(1 + 64 * (1 - level) / level) * one_hot(noised_C, 64)
        weight = min(1 / (1 - level), config.largest_level_weight) if config.level_weighting == "reciprocal" else 1.0
        total += weight * float(cross_entropy(z_CV, clean_C)) / len(canvases)
        weights.append(weight)
    assert float(whole.loss.diffusion) == pytest.approx(total, rel=1e-5)
    if config.level_weighting == "reciprocal":
        assert max(weights) > 1.2 * min(weights)

    totals = count(rows, canvases, 16)
    shares = [step(network, row, config, totals)[0].loss for row in rows.split(1)]  # gradients add up meanwhile
    assert sum(float(share.total) for share in shares) == pytest.approx(float(whole.loss.total), rel=1e-5)
    for weight, gradient in gradients(network).items():
        torch.testing.assert_close(gradient, of_batch[weight], rtol=1e-5, atol=1e-5, msg=weight)


@pytest.mark.parametrize("name", LOSSES)
def test_the_graph_of_autograd_gives_what_training_adds_up(single, name):
    network, rows = network_and_rows({}, puzzles=3)
    config = ObjectiveConfig(**LOSSES[name])
    scored, canvases, corrupted = step(network, rows, config)
    added = gradients(network)
    loss = objective(network, rows, canvases, corrupted, config, 0, count(rows, canvases, 16))
    loss.total.backward()
    assert float(loss.total.detach()) == pytest.approx(float(scored.loss.total), rel=1e-6)
    for weight, gradient in gradients(network).items():
        torch.testing.assert_close(gradient, added[weight], rtol=1e-5, atol=1e-6, msg=weight)


def test_the_shift_turns_the_posterior_without_an_observation_into_the_one_with_it():
    """Bayes' rule, by hand: times the probability of the observation, normalised."""
    vocabulary, level = 7, 0.3
    r_V = torch.rand(vocabulary, generator=torch.Generator().manual_seed(0)).double()
    r_V /= r_V.sum()
    noised = torch.tensor([[4]])
    likelihood_V = (1 - level) * one_hot(noised[0, 0], vocabulary) + level / vocabulary
    shift = leave_one_out_shift(noised, torch.tensor([level], dtype=torch.double), vocabulary)
    z_V = r_V.log()
    z_V[shift.ids_N[0]] += shift.amounts_N[0]
    torch.testing.assert_close(z_V.softmax(0), r_V * likelihood_V / (r_V * likelihood_V).sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("level", [0.0, 1e-3, 1.0])
def test_the_ends_of_the_noise_are_finite(level):
    levels = torch.tensor([level])
    assert leave_one_out_shift(torch.tensor([[1]]), levels, 262_144).amounts_N.isfinite().all()
    assert float(reciprocal_weights(levels, 10.0)) == pytest.approx(min(10.0, 1 / max(1e-9, 1 - level)), rel=1e-5)


def test_sums_by_level_are_those_of_the_canvases_in_each_interval():
    levels_M = torch.tensor([0.05, 0.19, 0.2, 0.75, 0.9999])
    losses_N, correct_N = torch.arange(10.0), torch.tensor([True, False] * 5)
    found = sums_by_level(levels_M, losses_N, correct_N)
    expected = torch.zeros(3, len(BINS), dtype=torch.double)
    for canvas, level in enumerate([0, 0, 1, 3, 4]):
        for place in (2 * canvas, 2 * canvas + 1):
            expected[:, level] += torch.tensor([losses_N[place], correct_N[place], 1.0])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(prediction="loo"), "objective.prediction='loo'; use one of denoiser, leave_one_out"),
        (dict(level_weighting="1/t"), "objective.level_weighting='1/t'; use one of none, reciprocal"),
        (dict(largest_level_weight=0.5), "objective.largest_level_weight=0.5; expected 1 or more"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_losses_that_there_are_not_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(ObjectiveConfig(), **wrong)
