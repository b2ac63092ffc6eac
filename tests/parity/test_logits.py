"""The network is transformers' network: logits and states within 1e-4 in float32, on one process."""

from __future__ import annotations

import copy

import pytest
import torch

from nemo_diffgemma.model.norm import rms_norm
from tests.distributed import cases
from tests.parity.questions import KINDS, SUBLAYERS, TOLERANCE, answer, contexts, question
from tests.reference import SIZES, encode_and_denoise, encoder_states


@pytest.fixture(scope="module")
def both(single, reference, checkpoint):
    """`both(size)` -> transformers' model and ours of the same weights."""
    loaded = {}

    def get(size):
        if size not in loaded:
            loaded[size] = cases.load(checkpoint(size, sublayers=SUBLAYERS[size]), {})
        return reference(size, sublayers=SUBLAYERS[size]), loaded[size]

    return get


@pytest.mark.parametrize(
    ("size", "context", "kind"),
    [
        pytest.param(size, context, kind, id=f"{size}-{context}-{kind}")
        for size in SIZES
        for context in contexts(size)
        for kind in KINDS
        if context > 1 or kind != "padded"
    ],
)
def test_logits_of_a_canvas(both, size, context, kind):
    theirs, ours = both(size)
    asked = question(theirs, kind, context)
    assert cases.answer(ours, **asked.asked()).sub(answer(theirs, asked)).abs().max() < TOLERANCE


@pytest.mark.parametrize("size", SIZES)
def test_encoder_states(both, size):
    """What the autoregressive loss reads: the encoder's states after the final norm, in one pass over clean tokens."""
    theirs, ours = both(size)
    tokens = question(theirs, "plain", 20).input_ids
    with torch.no_grad():
        states = ours.encode_clean(tokens.flatten(), [tokens.shape[1]] * len(tokens)).context_hidden
    states = states.view(*tokens.shape, -1)
    assert states.sub(encoder_states(theirs, tokens)).abs().max() < TOLERANCE


@pytest.mark.parametrize("context", [5, 8, 20])
def test_a_finished_canvas_leaves_the_cache_of_one_long_prompt(both, context):
    """Keys and values of the canvas while it was noise are gone; sliding layers keep the last window - 1 columns."""
    theirs, ours = both("bigger_canvas")
    asked = question(theirs, "after_3_canvases", context)
    cache = ours.encode(asked.input_ids, asked.attention_mask)
    for tokens in asked.finished:
        cache = cases.committed(ours, cache, tokens, asked.canvas)
    everything = torch.cat([asked.input_ids, *asked.finished], dim=1)
    mask = torch.nn.functional.pad(asked.attention_mask, (0, everything.shape[1] - context), value=1)
    whole = ours.encode(everything, mask)
    end, padding = everything.shape[1], (asked.attention_mask == 0).sum(1).tolist()
    assert cache.sequences == whole.sequences == tuple((first, end) for first in padding)
    for layer, (stepwise, at_once) in enumerate(zip(cache.layers, whole.layers, strict=True)):
        most = end if ours.layers[layer].self_attn.window is None else ours.model_config.sliding_window - 1
        assert stepwise.kept == at_once.kept == tuple((max(first, end - most), end) for first in padding)
        assert len(stepwise.keys) == sum(span.length for span in stepwise.kept)
        assert stepwise.keys.sub(at_once.keys).abs().max() < TOLERANCE
        assert stepwise.values.sub(at_once.values).abs().max() < TOLERANCE


def test_no_signal_is_a_zero_signal_and_not_zero_logits(both):
    """Zero logits mean "anything goes", whose embedding is the mean of the table; the first step is told nothing."""
    theirs, ours = both("base")
    asked = question(theirs, "plain", 9)
    cache = ours.encode(asked.input_ids)
    nothing = ours.denoise(asked.canvas, cache)
    zeros = torch.zeros(*asked.canvas.shape, ours.model_config.hidden_size)
    canvases = [(row, 9) for row in range(3)]
    without = ours.canvas_hidden(asked.canvas, canvases, cache, None)
    silent = ours.canvas_hidden(asked.canvas, canvases, cache, zeros)
    assert torch.equal(without, silent)

    zero_logits = torch.zeros_like(nothing)
    assert ours.denoise(asked.canvas, cache, zero_logits).sub(nothing).abs().max() > 0.1
    reference_of_zeros = encode_and_denoise(theirs, asked.input_ids, asked.canvas, None, zero_logits)
    assert ours.denoise(asked.canvas, cache, zero_logits).sub(reference_of_zeros).abs().max() < TOLERANCE


def test_without_a_signal_canvas_embeddings_still_get_unit_rms(both):
    _, ours = both("base")
    embeddings = ours.embed_tokens.look_up(torch.arange(12))
    conditioned = ours.self_conditioning(embeddings)
    torch.testing.assert_close(conditioned.square().mean(-1), torch.ones(12), atol=1e-4, rtol=0)
    torch.testing.assert_close(conditioned, rms_norm(embeddings, None, 1e-6), atol=1e-6, rtol=0)


def test_padding_must_be_told(both):
    """The same ids with and without their mask are different prompts: padding is not recognised by its id."""
    theirs, ours = both("base")
    asked = question(theirs, "padded", 9)
    with_mask = ours.denoise(asked.canvas, ours.encode(asked.input_ids, asked.attention_mask))
    without = ours.denoise(asked.canvas, ours.encode(asked.input_ids))
    torch.testing.assert_close(with_mask[0], without[0], atol=TOLERANCE, rtol=0)  # the row without padding
    assert with_mask[1:].sub(without[1:]).abs().amax((1, 2)).min() > 0.1


def test_a_row_neither_sees_its_neighbours_nor_its_place(both):
    """No capacity, no dropping: in another order, alone, or without its padding, a row has the same logits."""
    theirs, ours = both("deep")
    asked = question(theirs, "padded", 9)
    logits = ours.denoise(asked.canvas, ours.encode(asked.input_ids, asked.attention_mask))
    order = [2, 0, 1]
    shuffled = ours.denoise(asked.canvas[order], ours.encode(asked.input_ids[order], asked.attention_mask[order]))
    torch.testing.assert_close(shuffled, logits[order], atol=TOLERANCE, rtol=0)
    for row in range(3):
        prompt = asked.input_ids[row : row + 1, asked.attention_mask[row].bool()]
        alone = ours.denoise(asked.canvas[row : row + 1], ours.encode(prompt))
        torch.testing.assert_close(alone[0], logits[row], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("copy_of", ["encoder", "decoder"])
def test_the_two_copies_of_the_layer_scalar_are_not_one(both, copy_of):
    """Changing one side's copy alone changes what transformers' copy of that side changes."""
    theirs, ours = both("base")
    theirs, ours = copy.deepcopy(theirs), copy.copy(ours)
    asked = question(theirs, "plain", 9)
    before = cases.answer(ours, **asked.asked())
    scalars = [(layer.encoder_layer_scalar if copy_of == "encoder" else layer.layer_scalar) for layer in ours.layers]
    side = theirs.model.encoder.language_model if copy_of == "encoder" else theirs.model.decoder
    try:
        with torch.no_grad():
            for layer, scalar in zip(side.layers, scalars, strict=True):
                layer.layer_scalar.mul_(1.5)
                scalar.mul_(1.5)
        after = cases.answer(ours, **asked.asked())
        assert after.sub(before).abs().max() > 0.1
        assert after.sub(answer(theirs, asked)).abs().max() < TOLERANCE
    finally:
        with torch.no_grad():
            for scalar in scalars:
                scalar.div_(1.5)
