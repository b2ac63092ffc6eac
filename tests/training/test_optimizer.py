"""The learning-rate schedule and where weight decay falls."""

from __future__ import annotations

from itertools import pairwise

import pytest

from nemo_diffgemma.schema import ConfigurationError, OptimGroup
from nemo_diffgemma.training.optimizer import check, learning_rate


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
    import torch

    from nemo_diffgemma.training import optimizer
    from nemo_diffgemma.training.nemo_model import build_network
    from tests.training.cases import config

    settings = config()
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
