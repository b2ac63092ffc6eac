"""Epochs without repetition, in any layout and after any stop: the order is a function of seed and index."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_diffgemma.data import Batches
from nemo_diffgemma.data.order import Order, permuted


@settings(max_examples=60)
@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_a_permutation_takes_every_place_once(size, key):
    assert sorted(permuted(index, size, key) for index in range(size)) == list(range(size))


def test_permutations_of_a_few_are_all_different_and_alike_often():
    counts = Counter(tuple(permuted(index, 4, key * 977 + 5) for index in range(4)) for key in range(24_000))
    assert len(counts) == 24 and all(abs(count - 1000) < 5 * 1000**0.5 for count in counts.values())


def test_where_an_example_goes_is_uniform():
    places = Counter(permuted(7, 1000, key) // 100 for key in range(10_000))
    assert len(places) == 10 and all(abs(count - 1000) < 5 * 1000**0.5 for count in places.values())


@settings(max_examples=30)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4), seed=st.integers(0, 2**40))
def test_without_weights_each_example_comes_once_an_epoch(sizes, seed):
    order, epoch = Order(sizes, None, seed), sum(sizes)
    all_of_them = sorted((source, place) for source, size in enumerate(sizes) for place in range(size))
    epochs = [[order.at(e * epoch + index) for index in range(epoch)] for e in range(3)]
    assert all(sorted(each) == all_of_them for each in epochs)
    if epoch > 8:
        assert epochs[0] != epochs[1] and [Order(sizes, None, seed + 1).at(i) for i in range(epoch)] != epochs[0]


@settings(max_examples=8)
@given(weights=st.lists(st.floats(0.01, 100), min_size=2, max_size=4), seed=st.integers(0, 2**40))
def test_sources_have_their_shares_and_epochs_of_their_own(weights, seed):
    sizes = [7, 500, 50, 1000][: len(weights)]
    order = Order(sizes, weights, seed)
    drawn = [order.at(index) for index in range(2 * 4096)]
    for source, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
        own = [place for other, place in drawn if other == source]
        share = weight / sum(weights)
        assert abs(len(own) / len(drawn) - share) <= len(weights) / 4096 * (1 + share)
        for start in range(0, len(own) - size + 1, size):
            assert len(set(own[start : start + size])) == size  # a whole epoch before anything comes again
        assert abs(sum(other == source for other, _ in drawn[:512]) - 512 * share) <= 2  # evenly spread


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_nothing_is_skipped_or_repeated_after_a_stop_in_another_layout(replicas):
    """Three epochs of 40 examples in steps of 8: two replicas until step 7, then `replicas`."""

    def read(ranks: int, first: int, steps: int) -> list[int]:
        loaders = [Batches(8, rank, ranks, first, steps) for rank in range(ranks)]
        return [index for step in zip(*loaders, strict=True) for part in step for index in part]

    order = Order([30, 10], None, seed=3)
    seen = [order.at(index) for index in read(2, 0, 7) + read(replicas, 7, 15)]
    assert all(Counter(seen[start : start + 40]).most_common(1)[0][1] == 1 for start in (0, 40, 80))
    assert Counter(seen).most_common()[-1][1] == 3
