"""Keyed noise is a function of its key and nothing else, and as uniform as SplitMix64 is."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_diffgemma.diffusion import noise
from nemo_diffgemma.diffusion.noise import CanvasNoise, KeyedNoise, keyed_bits, to_ids, to_uniforms
from nemo_diffgemma.errors import UserError

INT64 = st.integers(-(2**63), 2**63 - 1)
_64 = 2**64 - 1


def splitmix64(x: int) -> int:
    """Steele, Lea and Flood 2014, in Python's integers."""
    x = (x + 0x9E3779B97F4A7C15) & _64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _64
    return x ^ (x >> 31)


@settings(max_examples=50)
@given(key=st.lists(INT64, min_size=1, max_size=6), as_tensors=st.booleans())
def test_bits_are_splitmix64_folded_over_the_key(key, as_tensors):
    state = 0
    for part in key:
        state = splitmix64(state ^ splitmix64(part & _64))
    bits = keyed_bits(*(torch.tensor([part]) if as_tensors else part for part in key))
    assert int(bits) & _64 == state


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1, 99999999999999999999])
def test_a_seed_of_more_than_64_bits_is_named(seed):
    for draw in (
        lambda: KeyedNoise.for_rows(seed, 2, 4, 64),
        lambda: KeyedNoise.for_rows([0, seed], 2, 4, 64),
        lambda: keyed_bits(seed, 1),
    ):
        with pytest.raises(UserError, match=rf"^seed={seed}; expected an integer from -2\^63 to 2\^63 - 1$"):
            draw()


@settings(max_examples=100)
@given(bits=INT64, vocab_size=st.integers(1, 262_144))
def test_every_word_becomes_an_id_of_the_vocabulary_and_a_number_below_one(bits, vocab_size):
    word = torch.tensor(bits)
    assert int(to_ids(word, vocab_size)) == (((bits & _64) >> 32) * vocab_size) >> 32
    uniform = float(to_uniforms(word))
    assert uniform == ((bits & _64) >> 40) / 2**24 and 0.0 <= uniform < 1.0


def drawn(rows: int = 64, canvas_length: int = 64, vocab_size: int = 61, seed: int = 0) -> KeyedNoise:
    return KeyedNoise.for_rows(seed, rows, canvas_length, vocab_size)


@pytest.mark.parametrize("vocab_size", [2, 61, 262_144])
@pytest.mark.parametrize("draw", [lambda n: n.initial(1), lambda n: n.replacements(0, 3)], ids=["initial", "replaced"])
def test_ids_are_uniform_over_the_whole_vocabulary(vocab_size, draw):
    """Special ids, the first and the last among them: chi-square of at most 64 equal bins within five sigma."""
    ids = draw(drawn(512, 64, vocab_size)).flatten()
    bins = min(vocab_size, 64)
    counts = torch.bincount(ids * bins // vocab_size, minlength=bins).double()
    expected = torch.bincount(torch.arange(vocab_size) * bins // vocab_size).double() / vocab_size * ids.numel()
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi_square - (bins - 1)) < 5 * math.sqrt(2 * (bins - 1))
    assert ids.min() >= 0 and ids.max() < vocab_size
    if vocab_size == 61:
        assert {0, 60} <= set(ids.tolist())


def test_uniforms_are_uniform():
    uniforms = drawn(512).uniforms(0, 1).flatten().double()
    counts = torch.histc(uniforms, bins=64, min=0, max=1)
    expected = uniforms.numel() / 64
    assert abs(float(((counts - expected) ** 2 / expected).sum()) - 63) < 5 * math.sqrt(2 * 63)


def test_a_row_does_not_know_its_batch():
    """By (seed, r) it depends on its number; by one seed a row it is as if alone; never on who else is there."""
    batch = KeyedNoise.for_rows(7, 5, 8, 61)
    some = KeyedNoise([7, 7], [4, 1], 8, 61)
    for draw in (lambda n: n.initial(2), lambda n: n.uniforms(2, 9), lambda n: n.replacements(2, 9)):
        assert torch.equal(draw(some), draw(batch)[[4, 1]])
        mixed = KeyedNoise.for_rows([3, 9, 3], 3, 8, 61)
        assert torch.equal(draw(mixed)[1:2], draw(KeyedNoise.for_rows(9, 1, 8, 61)))
        assert torch.equal(draw(mixed)[0], draw(mixed)[2])


def test_a_longer_canvas_begins_like_a_shorter_one():
    """A position's number depends on its own place."""
    assert torch.equal(drawn(canvas_length=64).uniforms(0, 1)[:, :10], drawn(canvas_length=10).uniforms(0, 1))


def test_no_two_uses_share_numbers():
    """Seeds, rows, canvases, steps and purposes: any two are uncorrelated within five sigma."""
    keyed = [
        drawn(seed=seed).uniforms(canvas, step).flatten() for seed in (0, 1) for canvas in (0, 1) for step in (1, 2)
    ]
    purposes = range(noise.CHOICE + 1)
    keyed += [to_uniforms(keyed_bits(5, purpose, torch.arange(4096))) for purpose in purposes]
    correlation = torch.corrcoef(torch.stack(keyed).double())
    assert (correlation - torch.eye(len(keyed))).abs().max() < 5 / math.sqrt(4096)
    assert len(set(purposes)) == len({noise.INITIAL, noise.UNIFORM, noise.REPLACEMENT, noise.LEVEL, noise.CORRUPTED,
                                      noise.CORRUPTION, noise.COIN, noise.CHOICE})  # fmt: skip


def test_one_seed_for_each_row_or_one_for_all():
    with pytest.raises(ValueError, match="2 seeds for 3 rows; give one int, or one int for each row"):
        KeyedNoise.for_rows([1, 2], 3, 4, 61)


@pytest.mark.parametrize("steps", [1, 5])
def test_all_steps_of_a_canvas_at_once_draw_what_each_draws(steps):
    noise = KeyedNoise.for_rows([3, -9], 2, 8, 61)
    whole = CanvasNoise.of(noise, 4, steps, torch.device("cpu"))
    assert torch.equal(whole.initial, noise.initial(4))
    for index, remaining in enumerate(range(steps, 0, -1)):
        assert torch.equal(whole.uniforms[index], noise.uniforms(4, remaining))
        assert torch.equal(whole.replacements[index], noise.replacements(4, remaining))
