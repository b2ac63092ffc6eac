"""Batches: what a row holds, and which replica reads which example."""

from functools import partial
from itertools import chain, islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from nemo_diffgemma.data import Batches, Example, SudokuDataset, SudokuTask, collate

EOS = 1
ids = st.lists(st.integers(2, 63), min_size=1, max_size=20).map(tuple)
examples = st.lists(st.builds(Example, ids, ids, st.integers(0, 2**40)), min_size=1, max_size=5)


@given(examples, st.integers(1, 9))
def test_row_is_prompt_response_and_eos_to_a_whole_canvas(examples, canvas_length):
    rows = collate(examples, canvas_length, EOS)
    assert rows.tokens_T.dtype == torch.int64
    for row, example in enumerate(examples):
        prompt, length = rows.prompt_lengths[row], rows.lengths[row]
        tokens = rows.tokens_T[rows.offsets[row] :][:length].tolist()
        canvases, rest = divmod(length - prompt, canvas_length)
        end = prompt + len(example.response)
        assert rest == 0
        assert (canvases - 1) * canvas_length < len(example.response) <= canvases * canvas_length
        assert tuple(tokens[:prompt]) == example.prompt
        assert tuple(tokens[prompt:end]) == example.response
        assert tokens[end:] == [EOS] * (length - end)
        assert rows.samples[row] == example.sample
    assert len(rows) == len(examples) and rows.tokens_T.shape == (sum(rows.lengths),)


@given(examples, st.integers(1, 9), st.integers(1, 6))
def test_rows_may_be_split_and_cut(examples, canvas_length, size):
    """Into as many at a time as one likes, and to their beginnings: each row stays what it is."""
    rows = collate(examples, canvas_length, EOS)
    parts = rows.split(size)
    assert [len(part) for part in parts[:-1]] == [size] * (len(parts) - 1) and sum(map(len, parts)) == len(rows)
    assert torch.equal(torch.cat([part.tokens_T for part in parts]), rows.tokens_T)
    for name in ("prompt_lengths", "lengths", "samples"):
        assert list(chain(*(getattr(part, name) for part in parts))) == list(getattr(rows, name))
    prompts = rows.prefixes(rows.prompt_lengths).split(rows.prompt_lengths)
    assert [tuple(prompt.tolist()) for prompt in prompts] == [example.prompt for example in examples]


def test_response_of_whole_canvases_gets_no_eos():
    assert collate([Example((2,), (5,) * 8, 0)], 4, EOS).tokens_T.tolist() == [2] + [5] * 8


def test_only_tokens_move_to_a_device():
    """As Lightning moves a batch: what is read on the host stays there."""
    from lightning.fabric.utilities.apply_func import move_data_to_device

    rows = collate([Example((2,), (5,), 0), Example((2, 3), (5, 6), 1)], 2, EOS)
    moved = move_data_to_device(rows, "meta")
    assert moved.tokens_T.device.type == "meta"
    assert (moved.prompt_lengths, moved.lengths, moved.samples) == ([1, 2], [3, 4], [0, 1])


@pytest.mark.parametrize("prompt, response", [((), (5,)), ((2,), ())])
def test_empty_prompt_or_response_is_refused(prompt, response):
    with pytest.raises(ValueError, match="both need at least 1"):
        Example(prompt, response, 0)


def test_collate_refuses_what_has_no_canvas():
    with pytest.raises(ValueError, match="expected at least 1"):
        collate([], 16, EOS)
    with pytest.raises(ValueError, match="canvas_length=0"):
        collate([Example((2,), (5,), 0)], 0, EOS)


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
    to_rows = partial(collate, canvas_length=16, eos_token_id=EOS)

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
