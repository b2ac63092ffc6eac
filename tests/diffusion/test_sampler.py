"""The entropy-bound sampler, rule by rule, against brute force."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_diffgemma.diffusion.sampler import SamplerConfig, StableAndConfident, accept, pad_after_eos

# Multiples of 1/64 add up exactly in float32, so brute force may use Python's floats.
ENTROPIES = st.lists(st.integers(0, 64 * 5).map(lambda n: n / 64), min_size=1, max_size=24)
BOUNDS = st.integers(0, 64 * 8).map(lambda n: n / 64)


def accepted_by_hand(entropies: list[float], bound: float) -> list[bool]:
    """Position i is accepted iff the entropies of all that are more certain sum to at most the bound."""
    order = sorted(range(len(entropies)), key=lambda i: entropies[i])
    return [sum(entropies[j] for j in order[: order.index(i)]) <= bound for i in range(len(entropies))]


@given(entropies=ENTROPIES, bound=BOUNDS)
def test_accepted_is_the_longest_prefix_of_the_ranking_that_the_bound_allows(entropies, bound):
    mask = accept(torch.tensor([entropies]), bound)[0]
    by_hand = accepted_by_hand(entropies, bound)
    assert int(mask.sum()) == sum(by_hand)
    # equal entropies may be ranked either way; which values are accepted is determined
    assert sorted(torch.tensor(entropies)[mask].tolist()) == sorted(
        e for e, taken in zip(entropies, by_hand, strict=True) if taken
    )
    assert mask.any()  # the most certain position has nothing before it


@given(entropies=ENTROPIES, bounds=st.tuples(BOUNDS, BOUNDS))
def test_a_larger_bound_accepts_no_fewer(entropies, bounds):
    row = torch.tensor([entropies])
    small, large = accept(row, min(bounds)), accept(row, max(bounds))
    assert (small <= large).all()


def test_rows_are_ranked_apart():
    entropy = torch.tensor([[0.5, 0.0, 0.25], [5.0, 4.0, 3.0]])
    assert accept(entropy, 0.25).tolist() == [[True, True, True], [False, False, True]]
    assert accept(entropy, 0.0).tolist() == [[False, True, True], [False, False, True]]


@settings(max_examples=60)
@given(
    wanted=st.integers(0, 3),
    answers=st.lists(st.tuples(st.integers(0, 1), st.booleans()), min_size=1, max_size=10),
)
def test_a_canvas_stops_when_it_was_the_same_for_enough_steps_and_is_certain(wanted, answers):
    """Against the whole history written down; the first stop needs `stability_threshold` earlier steps."""
    rule = StableAndConfident(SamplerConfig(stability_threshold=wanted, confidence_threshold=0.5))
    history: list[int] = []
    for answer, certain in answers:
        told = rule(torch.tensor([[answer, 7]]), torch.tensor([[0.1, 0.8 if certain else 1.0]]))
        stable = len(history) >= wanted and all(past == answer for past in history[len(history) - wanted :])
        assert bool(told) == (stable and certain)
        history.append(answer)


def test_mean_entropy_must_be_below_the_threshold_not_at_it():
    rule = StableAndConfident(SamplerConfig(stability_threshold=0, confidence_threshold=0.5))
    assert rule(torch.zeros(2, 2), torch.tensor([[0.5, 0.5], [0.5, 0.4375]])).tolist() == [False, True]


@given(
    canvas=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    eos=st.sets(st.integers(0, 5), max_size=3),
    pad=st.integers(0, 5),
)
def test_everything_after_the_first_eos_becomes_padding(canvas, eos, pad):
    end = next((i + 1 for i, token in enumerate(canvas) if token in eos), len(canvas))
    padded = pad_after_eos(torch.tensor([canvas]), tuple(eos), pad)[0].tolist()
    assert padded == canvas[:end] + [pad] * (len(canvas) - end)


def test_temperature_runs_from_t_max_to_just_above_t_min():
    config = SamplerConfig()
    assert config.temperature(48) == pytest.approx(0.8, abs=1e-12)
    assert config.temperature(1) == pytest.approx(0.4 + 0.4 / 48, abs=1e-12)
    assert SamplerConfig(max_denoising_steps=1).temperature(1) == pytest.approx(0.8, abs=1e-12)


def test_defaults_are_transformers_own():
    from transformers.models.diffusion_gemma.generation_diffusion_gemma import DiffusionGemmaGenerationConfig

    theirs = DiffusionGemmaGenerationConfig._get_default_generation_params()
    theirs["entropy_bound"] = theirs.pop("sampler_config").entropy_bound
    del theirs["max_new_tokens"]
    assert {name: getattr(SamplerConfig(), name) for name in theirs} == theirs


def test_a_generation_config_is_read_with_its_nested_sampler():
    config = SamplerConfig.from_mapping(
        {"max_denoising_steps": 16, "eos_token_id": [1, 106], "top_k": 64, "sampler_config": {"entropy_bound": 0.25}}
    )
    assert config == SamplerConfig(max_denoising_steps=16, eos_token_id=(1, 106), entropy_bound=0.25)
    assert config.eos_ids == (1, 106)
    assert SamplerConfig(eos_token_id=5).eos_ids == (5,) and SamplerConfig().eos_ids == ()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(max_denoising_steps=0), "sampler.max_denoising_steps=0; expected at least 1"),
        (dict(t_min=0.8, t_max=0.4), "sampler.t_min=0.8, sampler.t_max=0.4; expected 0 < t_min < t_max"),
        (dict(t_min=0.0), "expected 0 < t_min < t_max"),
        (dict(stability_threshold=-1), "sampler.stability_threshold=-1; expected 0 or more steps"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_mean_nothing_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        SamplerConfig(**wrong)
