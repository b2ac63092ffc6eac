"""Batches: what a row holds, and which replica reads which example."""

from functools import partial
from itertools import chain, islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from nemo_diffgemma.data import Batches, Example, SudokuDataset, SudokuTask, collate

EOS, PAD = 1, 0
ids = st.lists(st.integers(2, 63), min_size=1, max_size=20).map(tuple)
examples = st.lists(st.builds(Example, ids, ids, st.integers(0, 2**40)), min_size=1, max_size=5)


@given(examples, st.integers(1, 9))
def test_row_is_prompt_response_eos_to_a_whole_canvas_then_padding(examples, canvas_length):
    batch = collate(examples, canvas_length, EOS, PAD)
    for row, example in enumerate(examples):
        prompt, length = batch.prompt_lengths_B[row].item(), batch.lengths_B[row].item()
        tokens = batch.tokens_BS[row].tolist()
        canvases, rest = divmod(length - prompt, canvas_length)
        end = prompt + len(example.response)
        assert rest == 0
        assert (canvases - 1) * canvas_length < len(example.response) <= canvases * canvas_length
        assert tuple(tokens[:prompt]) == example.prompt
        assert tuple(tokens[prompt:end]) == example.response
        assert tokens[end:length] == [EOS] * (length - end)
        assert tokens[length:] == [PAD] * (len(tokens) - length)
        assert batch.samples_B[row] == example.sample
    assert batch.tokens_BS.shape == (len(examples), max(batch.lengths_B))


def test_response_of_whole_canvases_gets_no_eos():
    batch = collate([Example((2,), (5,) * 8, 0)], 4, EOS, PAD)
    assert batch.tokens_BS.tolist() == [[2] + [5] * 8]


def test_every_tensor_of_a_batch_is_int64_and_moves_along():
    batch = collate([Example((2,), (5,), 0), Example((2, 3), (5, 6), 1)], 2, EOS, PAD)
    moved = batch.to("meta")
    for name in ("tokens_BS", "prompt_lengths_B", "lengths_B", "samples_B"):
        assert getattr(batch, name).dtype == torch.int64
        assert getattr(moved, name).device.type == "meta"


@pytest.mark.parametrize("prompt, response", [((), (5,)), ((2,), ())])
def test_empty_prompt_or_response_is_refused(prompt, response):
    with pytest.raises(ValueError, match="both need at least 1"):
        Example(prompt, response, 0)


def test_collate_refuses_what_has_no_canvas():
    with pytest.raises(ValueError, match="expected at least 1"):
        collate([], 16, EOS, PAD)
    with pytest.raises(ValueError, match="canvas_length=0"):
        collate([Example((2,), (5,), 0)], 0, EOS, PAD)


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
    to_batch = partial(collate, canvas_length=16, eos_token_id=EOS, pad_token_id=PAD)

    def stream(replicas):
        samplers = [Batches(8, replica, replicas, first_step=3, steps=5) for replica in range(replicas)]
        loaders = [DataLoader(dataset, batch_sampler=sampler, collate_fn=to_batch) for sampler in samplers]
        assert all(len(loader) == 2 for loader in loaders)
        batches = [batch for step in zip(*loaders, strict=True) for batch in step]
        return torch.cat([b.samples_B for b in batches]), torch.cat([b.tokens_BS for b in batches])

    samples, tokens = stream(1)
    assert samples.tolist() == list(range(24, 40))
    for replicas in (2, 4):
        assert all(map(torch.equal, stream(replicas), (samples, tokens)))
