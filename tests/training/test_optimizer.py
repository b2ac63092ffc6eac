"""The learning-rate schedule, where weight decay falls, and updates of AdamW."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from nemo_diffgemma.schema import ConfigurationError, OptimGroup
from nemo_diffgemma.training import optimizer
from nemo_diffgemma.training.nemo_model import build_network
from nemo_diffgemma.training.optimizer import check, learning_rate
from tests.training import cases, weight_cases


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_rate_rises_stays_and_falls(decay):
    optim = OptimGroup(lr=1.0, min_lr=0.1, warmup_steps=10, decay=decay, decay_start=0.5)
    rates = [learning_rate(optim, step, 100) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert set(rates[9:51]) == {1.0}
    assert all(later < earlier for earlier, later in pairwise(rates[50:]))
    assert 0.1 < rates[-1] < 0.15
    assert learning_rate(optim, 500, 100) == pytest.approx(0.1)


def test_constant_rate_never_falls():
    optim = OptimGroup(lr=0.5, decay="constant")
    assert {learning_rate(optim, step, 10) for step in range(1, 11)} == {0.5}


def test_a_run_of_one_step_has_the_full_rate():
    assert learning_rate(OptimGroup(lr=0.5), 1, 1) == 0.5


@pytest.mark.parametrize(
    "optim",
    [OptimGroup(decay="steps"), OptimGroup(lr=0.0), OptimGroup(min_lr=1.0), OptimGroup(decay_start=2.0),
     OptimGroup(warmup_steps=-1)],
    ids=["decay", "lr", "min_lr", "decay_start", "warmup_steps"],
)  # fmt: skip
def test_impossible_schedules_are_refused(optim):
    with pytest.raises(ConfigurationError, match="optim."):
        check(optim)


def test_weight_decay_falls_on_matrices_only(single):
    settings = cases.config()
    network = build_network(settings.model, seed=0)
    optim = OptimGroup(lr=0.1, weight_decay=0.5, distributed=False)
    wrapped = optimizer.data_parallel(network, optim)
    adapter = optimizer.MegatronAdapter(optimizer.build(wrapped, optim, torch.float32))
    adapter.lr = optim.lr
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    wrapped.zero_grad_buffer()
    adapter.step()  # no gradient: what moves is decay
    for name, parameter in network.named_parameters():
        expected = before[name] * (1 - 0.1 * 0.5) if parameter.ndim > 1 else before[name]
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=0.0, msg=name)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("distributed", [True, False])
def test_updates_are_those_of_torchs_adamw(single, pool, ranks, distributed):
    """Fused, clipped by a norm that stays on the device, cut over replicas or not."""
    if ranks == 1:
        results = [weight_cases.adamw(distributed)]
    else:
        results = pool(ranks).run("tests.training.weight_cases:adamw", distributed=distributed)
    for steps in results:
        assert any(step["plain"] > 1.0 for step in steps), "nothing was clipped"
        for step in steps:
            assert step["ours"] == pytest.approx(step["plain"], rel=1e-6)
            assert step["apart"] < 1e-6
            assert step["late"] == 0


def test_a_norm_that_is_no_number_leaves_the_gradients_as_they_were(single):
    """Who looks for the weight whose gradient began it must find the others finite."""
    settings = cases.config()
    network = build_network(settings.model, seed=0)
    optim = OptimGroup(lr=0.1, clip_grad=1.0, distributed=False)
    wrapped = optimizer.data_parallel(network, optim)
    adapter = optimizer.MegatronAdapter(optimizer.build(wrapped, optim, torch.float32))
    wrapped.zero_grad_buffer()
    first, second = list(network.parameters())[:2]
    first.main_grad.view(-1)[0], second.main_grad.view(-1)[0] = torch.nan, 5.0
    adapter.step()
    assert math.isnan(adapter.grad_norm)
    assert float(second.main_grad.view(-1)[0]) == 5.0 and int(first.main_grad.isnan().sum()) == 1


@pytest.mark.parametrize(
    ("layout", "distributed"),
    [({}, True), ({}, False), ({"tensor": 2, "expert": 2}, True)],
    ids=["dp2-distributed", "dp2-replicated", "tensor2,expert2-distributed"],
)
def test_sums_and_gathers_behind_computation_change_no_loss(pool, one_process, tmp_path, layout, distributed):
    """Many buckets, each summed as soon as its last gradient is there; whoever reads a weight waits for its bucket."""
    results = pool(2).run(
        "tests.training.weight_cases:losses_in_small_buckets",
        directory=str(tmp_path), steps=4, layout=layout, optim__distributed=distributed,
    )  # fmt: skip
    losses, counts = results[0]
    for (loss, norm), (expected, expected_norm) in zip(losses, one_process, strict=True):
        assert loss == pytest.approx(expected, abs=1e-5)
        assert norm == pytest.approx(expected_norm, abs=5e-5)
    assert counts["buckets"] >= 8
    assert counts["early"] == counts["buckets"] - counts["last"] > 0
    assert counts["late"] == (counts["buckets"] if distributed else 0)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    return cases.losses(str(tmp_path_factory.mktemp("single")), steps=4)
