"""The entropy-bound sampler, rule by rule, against brute force."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nemo_diffgemma import ModelConfig
from nemo_diffgemma.diffusion.sampler import StableAndConfident, accept, pad_after_eos
from nemo_diffgemma.diffusion.sampler_config import SamplerConfig
from nemo_diffgemma.errors import UserError

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
        (dict(t_min=0.8, t_max=0.4), "sampler.t_min=0.8, t_max=0.4; expected 0 <= t_min < t_max"),
        (dict(t_min=-0.1), "expected 0 <= t_min < t_max"),
        (dict(stability_threshold=-1), "sampler.stability_threshold=-1; expected 0 or more steps"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_mean_nothing_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        SamplerConfig(**wrong)


JSON_VALUES = (
    *(None, True, False, 0, -1, 1, 2, 48, 10**30, 0.0, -0.5, 1e-320, 1e-12, 0.1, 0.5, 0.8, 2.0, 1e300, 1e400, -1e400),
    *(math.nan, "", "48", "nan", [], [1], [1, 3], [[1]], [None], {}, {"entropy_bound": 0.2}, {"entropy_bound": "x"}),
)
NAMES = tuple(vars(SamplerConfig())) + ("sampler_config",)
RELEASED = {
    "max_denoising_steps": 48,
    "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.1},
    "t_min": 0.4,
    "t_max": 0.8,
    "eos_token_id": [1, 3],
    "pad_token_id": 0,
}


@settings(max_examples=300)
@given(
    changes=st.dictionaries(st.sampled_from(NAMES), st.sampled_from(JSON_VALUES), max_size=2),
    last_logit=st.floats(-30, 30, width=32),
)
@example(changes={"max_denoising_steps": "48"}, last_logit=0.0)
@example(changes={"t_min": 0}, last_logit=30.0)
@example(changes={"pad_token_id": -100}, last_logit=0.0)
@example(changes={"pad_token_id": 5000}, last_logit=0.0)
def test_a_generation_config_is_read_or_named_with_its_key(tmp_path_factory, changes, last_logit):
    """And with what is read, arithmetic works: temperatures keep logits finite, something is accepted, ids are ids."""
    directory = tmp_path_factory.getbasetemp()
    file = directory / "generation_config.json"
    file.write_text(json.dumps(RELEASED | changes))
    model = ModelConfig(vocab_size=64)
    try:
        config = SamplerConfig.of_checkpoint(directory, model)
    except UserError as error:
        assert str(error).startswith(f"{file}: ") and "expected" in str(error)
        assert any(name in str(error) for name in (*changes, "entropy_bound")) and "\n" not in str(error)
        return
    coldest = torch.tensor([last_logit, 30.0]) / torch.tensor(config.temperature(1), dtype=torch.float32)
    assert coldest.isfinite().all() and coldest.softmax(0).isfinite().all()
    assert accept(torch.tensor([[last_logit + 30, 3.0]]), config.entropy_bound).any()
    assert config.pad_token_id is None or 0 <= config.pad_token_id < 64
    again = SamplerConfig.from_mapping(json.loads(json.dumps(config.to_huggingface())))
    assert again.temperature(1) == config.temperature(1) and again.eos_ids == config.eos_ids


@settings(max_examples=200)
@given(changes=st.dictionaries(st.sampled_from(NAMES[:6]), st.sampled_from(JSON_VALUES[6:21]), max_size=2))
def test_what_transformers_refuses_is_refused(changes):
    """But for zeros as bounds, which mean "the most certain alone" and "never early" here, and integers as floats."""
    from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
        DiffusionGemmaGenerationConfig,
        EntropyBoundSamplerConfig,
    )

    try:
        ours = SamplerConfig(**changes)
    except UserError:
        return
    written = {k: v for k, v in ours.to_huggingface().items() if k != "sampler_config"}
    DiffusionGemmaGenerationConfig(**(written | {"confidence_threshold": ours.confidence_threshold + 1e-9}))
    EntropyBoundSamplerConfig(entropy_bound=ours.entropy_bound + 1e-9)


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"entropy_bound": math.nan}, "sampler.entropy_bound=nan; expected a finite number of nats, 0 or more"),
        ({"entropy_bound": -1}, "sampler.entropy_bound=-1; expected a finite number of nats"),
        ({"entropy_bound": math.inf}, "sampler.entropy_bound=inf; expected a finite"),
        ({"confidence_threshold": math.nan}, "sampler.confidence_threshold=nan; expected a finite"),
        ({"t_max": math.inf}, "sampler.t_max=inf; expected a finite number"),
        ({"pad_token_id": -100}, "sampler.pad_token_id=-100; expected a token id, or null for none"),
        ({"eos_token_id": [1, "x"]}, "sampler.eos_token_id=.*; expected a token id, a list of them"),
        ({"max_denoising_steps": 2.5}, "sampler.max_denoising_steps=2.5; expected at least 1, a whole number"),
    ],
    ids=str,
)
def test_an_override_is_named_as_it_was_typed(given_, message):
    with pytest.raises(UserError, match=message):
        SamplerConfig().with_overrides(given_)


def test_ids_outside_the_vocabulary_are_refused_where_the_vocabulary_is_known():
    with pytest.raises(UserError, match="sampler.pad_token_id=64 is outside the vocabulary; expected .* 0 to 63"):
        SamplerConfig(pad_token_id=64).check_ids(64)
    with pytest.raises(UserError, match=r"sampler.eos_token_id=\(64, 106\) is outside the vocabulary"):
        SamplerConfig(eos_token_id=(64, 106)).check_ids(64)
    SamplerConfig(eos_token_id=(1, 106), pad_token_id=63).check_ids(64)  # ids of a larger vocabulary never come up


@pytest.mark.parametrize("content", ["[]", '{"t_min": ', "null", '"text"'])
def test_a_damaged_generation_config_is_named(tmp_path, content):
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(UserError, match=f"{tmp_path}/generation_config.json is .*copy it again from the checkpoint"):
        SamplerConfig.of_checkpoint(tmp_path, ModelConfig())
