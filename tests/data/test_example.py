"""Batches: what a row holds, and which replica reads which example."""

from functools import partial
from itertools import chain, islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from nemo_diffgemma.data import Batches, Example, SudokuDataset, SudokuTask, collate
from nemo_diffgemma.errors import UserError

EOS = 1


@st.composite
def conversation(draw) -> Example:
    """Tokens with some answers in them."""
    spans, position = [], 0
    for _ in range(draw(st.integers(1, 3))):
        start = position + draw(st.integers(0 if position else 1, 5))
        position = start + draw(st.integers(1, 12))
        spans.append((start, position))
    tokens = draw(st.lists(st.integers(2, 63), min_size=position, max_size=position + 3).map(tuple))
    return Example(tokens, tuple(spans), draw(st.integers(0, 2**40)))


examples = st.lists(conversation(), min_size=1, max_size=5)


@given(examples, st.integers(1, 9), st.booleans())
def test_row_is_its_tokens_and_the_recipes_fill_where_asked_for(examples, canvas_length, fills):
    rows = collate(examples, canvas_length, EOS, fills)
    assert rows.tokens_T.dtype == torch.int64 and rows.fill_id == EOS
    for row, example in enumerate(examples):
        length, answers = rows.lengths[row], list(rows.answers[row])
        tokens = tuple(rows.tokens_T[rows.offsets[row] :][:length].tolist())
        known = len(example.tokens)
        assert tokens == example.tokens + (EOS,) * (length - known)
        assert rows.samples[row] == example.sample
        assert answers[:-1] == list(example.answers[:-1])
        start, end = answers[-1]
        if fills and example.answers[-1][1] == known:
            assert end == length and (end - start) % canvas_length == 0 and length - known < canvas_length
        else:
            assert length == known and (start, end) == example.answers[-1]
    assert len(rows) == len(examples) and rows.tokens_T.shape == (sum(rows.lengths),)


@given(examples, st.integers(1, 9), st.integers(1, 6))
def test_rows_may_be_split_and_cut(examples, canvas_length, size):
    """Into as many at a time as one likes, and to their beginnings: each row stays what it is."""
    rows = collate(examples, canvas_length, EOS)
    parts = rows.split(size)
    assert [len(part) for part in parts[:-1]] == [size] * (len(parts) - 1) and sum(map(len, parts)) == len(rows)
    assert torch.equal(torch.cat([part.tokens_T for part in parts]), rows.tokens_T)
    for name in ("answers", "lengths", "samples"):
        assert list(chain(*(getattr(part, name) for part in parts))) == list(getattr(rows, name))
    assert all(part.fill_id == EOS for part in parts)
    cuts = [example.answers[0][0] for example in examples]
    prefixes = [tuple(prefix.tolist()) for prefix in rows.prefixes(cuts).split(cuts)]
    assert prefixes == [example.tokens[:cut] for example, cut in zip(examples, cuts, strict=True)]


def test_response_of_whole_canvases_gets_no_eos():
    assert collate([Example((2, *[5] * 8), ((1, 9),), 0)], 4, EOS, True).tokens_T.tolist() == [2] + [5] * 8


def test_only_tokens_move_to_a_device():
    """As Lightning moves a batch: what is read on the host stays there."""
    from lightning.fabric.utilities.apply_func import move_data_to_device

    rows = collate([Example((2, 5), ((1, 2),), 0), Example((2, 3, 5, 6), ((2, 4),), 1)], 2, EOS, True)
    moved = move_data_to_device(rows, "meta")
    assert moved.tokens_T.device.type == "meta"
    assert (moved.answers, moved.lengths, moved.samples) == ([[(1, 3)], [(2, 4)]], [3, 4], [0, 1])


@pytest.mark.parametrize("answers", [(), ((0, 1),), ((1, 1),), ((1, 3),)])
def test_an_example_without_a_context_or_an_answer_is_refused(answers):
    with pytest.raises(UserError, match="example 7: .* expected at least one"):
        Example((2, 5), answers, 7)


def test_collate_refuses_what_has_no_canvas():
    with pytest.raises(ValueError, match="expected at least 1"):
        collate([], 16, EOS)
    with pytest.raises(ValueError, match="canvas_length=0"):
        collate([Example((2, 5), ((1, 2),), 0)], 0, EOS)


@given(replicas=st.integers(1, 6), size=st.integers(1, 5), steps=st.integers(1, 6))
def test_replicas_share_each_step_in_order_without_overlap(replicas, size, steps):
    batch = replicas * size
    by_replica = [list(Batches(batch, replica, replicas, steps=steps)) for replica in range(replicas)]
    by_step = list(zip(*by_replica, strict=True))
    assert len(by_step) == steps
    for step, slices in enumerate(by_step):
        assert all(len(part) == size for part in slices)
        assert list(chain(*slices)) == list(range(step * batch, (step + 1) * batch))


@given(first_step=st.integers(0, 9), extra=st.integers(0, 5))
def test_resuming_equals_skipping(first_step, extra):
    whole = Batches(6, 1, 3, steps=first_step + extra)
    resumed = Batches(6, 1, 3, first_step=first_step, steps=first_step + extra)
    endless = Batches(6, 1, 3, first_step=first_step)
    assert list(resumed) == list(whole)[first_step:] == list(islice(endless, extra))
    assert len(resumed) == extra


def test_batches_without_steps_has_no_length():
    with pytest.raises(TypeError, match="steps="):
        len(Batches(4, 0, 1))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((10, 0, 4), "data.global_batch_size=10 .* use data.global_batch_size=8 or data.global_batch_size=12"),
        ((3, 0, 4), "use data.global_batch_size=4$"),
        ((0, 0, 4), "use data.global_batch_size=4$"),
        ((8, 4, 4), "replica=4 of replicas=4"),
        ((8, 0, 4, -1), "first_step=-1"),
        ((8, 0, 4, 5, 4), "use trainer.max_steps=5 or more"),
    ],
)
def test_impossible_batches_say_what_to_type(arguments, message):
    with pytest.raises(ValueError, match=message):
        Batches(*arguments)


def test_a_loader_reads_the_same_stream_whatever_the_number_of_replicas():
    dataset = SudokuDataset(SudokuTask())
    to_rows = partial(collate, canvas_length=16, fill_id=EOS)

    def stream(replicas):
        samplers = [Batches(8, replica, replicas, first_step=3, steps=5) for replica in range(replicas)]
        loaders = [DataLoader(dataset, batch_sampler=sampler, collate_fn=to_rows) for sampler in samplers]
        assert all(len(loader) == 2 for loader in loaders)
        batches = [batch for step in zip(*loaders, strict=True) for batch in step]
        return torch.tensor([s for b in batches for s in b.samples]), torch.cat([b.tokens_T for b in batches])

    samples, tokens = stream(1)
    assert samples.tolist() == list(range(24, 40))
    for replicas in (2, 4):
        assert all(map(torch.equal, stream(replicas), (samples, tokens)))
