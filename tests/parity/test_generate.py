"""`generate` is transformers' `generate`, token for token, when both are given the same random numbers."""

from __future__ import annotations

import pytest
import torch

from nemo_diffgemma import SamplerConfig
from nemo_diffgemma.diffusion.noise import KeyedNoise
from tests.distributed import cases
from tests.parity import generations
from tests.parity.generations import DAMP, GENERATIONS, PROMPT, ROWS, SUBLAYERS, assert_same_tokens


@pytest.fixture(scope="module")
def both(single, reference, checkpoint):
    """`both(size)` -> transformers' calm model and ours of the same weights."""
    loaded = {}

    def get(size):
        if size not in loaded:
            loaded[size] = cases.load(checkpoint(size, damp=DAMP, sublayers=SUBLAYERS), {})
        return reference(size, damp=DAMP, sublayers=SUBLAYERS), loaded[size]

    return get


@pytest.mark.parametrize("name", GENERATIONS)
def test_tokens(both, name):
    theirs, ours = both(GENERATIONS[name][0])
    assert_same_tokens(cases.generated(ours, **generations.asked(theirs, name)), generations.tokens(theirs, name))


def test_the_generations_cover_what_they_are_for(both):
    """Rows stop at different steps and before the last; EOS ends some rows, or all of them early; canvases differ."""
    found = {name: generations.tokens(both(size)[0], name) for name, (size, _) in GENERATIONS.items()}
    steps = {name: generations.settings(name)["max_denoising_steps"] for name in GENERATIONS}
    for name in ("stable_0", "stable_1", "stable_2", "eos_none"):
        assert len(set(found[name].forwards.tolist())) > 2, name
        assert found[name].forwards.min() < 3 * steps[name], name
    assert found["stable_2"].forwards.sum() > found["stable_1"].forwards.sum() > found["stable_0"].forwards.sum()
    assert any((tokens.sequences[:, -1] == 0).any() for tokens in found.values())  # padded after an EOS
    assert any(tokens.sequences.shape[1] < PROMPT + 3 * 4 for tokens in found.values())  # all rows ended early
    new = found["eos_none"].sequences[:, PROMPT:]
    assert not torch.equal(new[:, :4], new[:, 4:8])


def test_a_row_alone_is_the_row_in_a_batch(both):
    """Padding, neighbours and how long these take to finish change nothing; one seed a row keys it as if alone."""
    theirs, ours = both("base")
    seeds = [11 * row + 5 for row in range(ROWS)]
    noise = KeyedNoise.for_rows(seeds, ROWS, 4, 64)
    truth = generations.tokens(theirs, "stable_1", noise)
    arguments = generations.asked(theirs, "stable_1")
    del arguments["noise"]
    batch = cases.generated(ours, **arguments, seed=seeds)
    assert_same_tokens(batch, truth)
    ids, mask = arguments.pop("input_ids"), arguments.pop("attention_mask")
    for row in truth.robust.nonzero()[:, 0].tolist():
        prompt = ids[row : row + 1, mask[row].bool()]
        for seed in (seeds[row], [seeds[row]]):  # of one row, an int is the same key
            sequences, forwards, _ = cases.generated(ours, input_ids=prompt, **arguments, seed=seed)
            new = min(sequences.shape[1] - prompt.shape[1], batch[0].shape[1] - PROMPT)
            assert torch.equal(sequences[0, prompt.shape[1] :][:new], batch[0][row, PROMPT:][:new])
            assert forwards[0] == batch[1][row]


def test_one_seed_keys_row_r_by_seed_and_r(both):
    theirs, ours = both("base")
    arguments = generations.asked(theirs, "stable_1")
    del arguments["noise"]
    by_seed = cases.generated(ours, **arguments, seed=7)
    explicit = cases.generated(ours, **arguments, noise=KeyedNoise([7] * ROWS, range(ROWS), 4, 64))
    other = cases.generated(ours, **arguments, seed=8)
    assert all(torch.equal(a, b) for a, b in zip(by_seed, explicit, strict=True))
    assert not torch.equal(by_seed[0], other[0])
    assert_same_tokens(by_seed, generations.tokens(theirs, "stable_1", KeyedNoise([7] * ROWS, range(ROWS), 4, 64)))


def test_without_a_sampler_the_checkpoints_settings_apply(both):
    """generation_config.json holds the released values, with 3 and 5 for end-of-turn and tool response."""
    _, ours = both("base")
    assert ours.sampler_defaults == SamplerConfig(
        max_denoising_steps=48,
        entropy_bound=0.1,
        t_min=0.4,
        t_max=0.8,
        stability_threshold=1,
        confidence_threshold=0.005,
        eos_token_id=(1, 3, 5),
        pad_token_id=0,
    )


def test_the_result_is_the_arg_max_and_not_the_noised_canvas(both):
    """With no entropy to spend one position a step is accepted; the others become noise, the answer does not."""
    theirs, ours = both("base")
    seen = []
    ours.generate(
        generations.prompts(theirs)[0],
        max_new_tokens=4,
        sampler=SamplerConfig(max_denoising_steps=5, entropy_bound=0.0),
        observe=seen.append,
    )
    assert [step.remaining for step in seen] == [5, 4, 3, 2, 1]
    assert all((step.accepted.sum(-1) == 1).all() for step in seen)
    result = ours.generate(
        generations.prompts(theirs)[0],
        max_new_tokens=4,
        sampler=SamplerConfig(max_denoising_steps=5, entropy_bound=0.0),
    )
    assert torch.equal(result.sequences[:, PROMPT:], seen[-1].argmax)
