"""The bound on bits a token: its terms by their definition, tight for the true posterior, and of a network."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nemo_diffgemma.evaluation.likelihood import bound


def by_definition(p_V: Tensor, noised: int, clean: int, level: float) -> float:
    """The integrand as it is written down: a sum over all ids but the noised one."""
    vocabulary, alpha = len(p_V), 1.0 - level
    sure_V = torch.nn.functional.one_hot(torch.tensor(clean), vocabulary).double()
    model_V, true_V = (alpha * q_V + level / vocabulary for q_V in (p_V, sure_V))
    r_V, s_V = model_V / model_V[noised], true_V / true_V[noised]
    terms_V = r_V - s_V + s_V * (s_V / r_V).log()
    return float((terms_V.sum() - terms_V[noised]) / vocabulary / alpha)


def of_prediction(p_NV: Tensor, noised_N: Tensor, clean_N: Tensor, levels_N: Tensor) -> Tensor:
    """`bound` of float64 predictions."""
    vocabulary = p_NV.shape[1]
    ratios_NV = torch.log1p((vocabulary * (1 - levels_N) / levels_N)[:, None] * p_NV)
    picked = (ratios_NV.gather(1, ids[:, None])[:, 0] for ids in (noised_N, clean_N))
    return bound(*picked, ratios_NV.sum(1), noised_N == clean_N, levels_N, vocabulary)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), vocabulary=st.integers(2, 40), level=st.floats(1e-3, 0.999))
def test_the_integrand_is_the_sum_over_ids(seed, vocabulary, level):
    generator = torch.Generator().manual_seed(seed)
    p_NV = (2 * torch.randn(4, vocabulary, generator=generator, dtype=torch.double)).softmax(-1)
    clean_N = torch.randint(vocabulary, (4,), generator=generator)
    noised_N = torch.where(torch.tensor([True, False] * 2), clean_N, (clean_N + 1) % vocabulary)
    levels_N = torch.full((4,), level, dtype=torch.double)
    found_N = of_prediction(p_NV, noised_N, clean_N, levels_N)
    expected = [by_definition(p_V, int(x), int(y), level) for p_V, x, y in zip(p_NV, noised_N, clean_N, strict=True)]
    torch.testing.assert_close(found_N, torch.tensor(expected, dtype=torch.double), rtol=1e-6, atol=1e-9)
    assert (found_N > -1e-9).all()


@pytest.mark.parametrize("vocabulary", [2, 5])
def test_the_bound_is_the_entropy_where_the_prediction_is_the_posterior(vocabulary):
    """Independent tokens: the posterior without a token's own observation is their distribution. Another costs more."""
    pi_V = torch.arange(1, vocabulary + 1).double()
    pi_V /= pi_V.sum()
    levels_T = (torch.arange(20_000).double() + 0.5) / 20_000
    other_V = pi_V.flip(0)
    totals = dict.fromkeys(("posterior", "other"), 0.0)
    for clean in range(vocabulary):
        for noised in range(vocabulary):
            chance_T = pi_V[clean] * ((1 - levels_T) * (noised == clean) + levels_T / vocabulary)
            ids = [torch.full((len(levels_T),), id) for id in (noised, clean)]
            for name, p_V in (("posterior", pi_V), ("other", other_V)):
                found_T = of_prediction(p_V.expand(len(levels_T), -1), *ids, levels_T)
                totals[name] += float((chance_T * found_T).mean())
    entropy = float(-(pi_V * pi_V.log()).sum())
    assert totals["posterior"] == pytest.approx(entropy, rel=1e-3)
    cross_entropy = float(-(pi_V * other_V.log()).sum())
    assert totals["other"] == pytest.approx(cross_entropy, rel=1e-3)
    assert cross_entropy > entropy + 0.1


@pytest.mark.parametrize("layout", [{}, {"tensor": 2}, {"tensor": 2, "expert": 2}], ids=str)
def test_bits_of_a_network_are_those_of_its_logits(pool, layout):
    """With logits of `denoise`, turned into the posterior by hand; in every layout."""
    for ours, plain in pool(2).run("tests.evaluation.cases:bits", layout=layout):
        assert ours == pytest.approx(plain, rel=1e-4)


def test_a_network_that_predicts_nothing_needs_the_bits_of_the_vocabulary():
    """A uniform prediction is the posterior of uniform tokens."""
    levels_T = (torch.arange(5000).double() + 0.5) / 5000
    uniform_TV = torch.full((5000, 8), 1 / 8, dtype=torch.double)
    clean, noised = torch.zeros(5000, dtype=torch.long), torch.ones(5000, dtype=torch.long)
    kept = of_prediction(uniform_TV, clean, clean, levels_T) * (1 - levels_T + levels_T / 8)
    replaced = of_prediction(uniform_TV, noised, clean, levels_T) * levels_T * 7 / 8
    assert float((kept + replaced).mean()) == pytest.approx(math.log(8), rel=1e-3)
