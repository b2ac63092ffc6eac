"""Context and any number of canvases in one pass: the same as one after the other, and nothing leaks."""

from __future__ import annotations

import pytest
import torch

from nemo_diffgemma.model.cache import Cache
from tests.distributed import cases
from tests.parity.questions import TOLERANCE

ROWS, COLUMNS = 3, 21  # 63 context tokens: tensor parallelism has to pad
CANVASES = [(0, 3), (1, 15), (0, 7), (0, 11), (2, 21), (1, 1), (0, 7)]


def tokens(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    context = torch.randint(64, (ROWS, COLUMNS), generator=generator)
    return context, torch.randint(64, (len(CANVASES), 4), generator=generator)


@pytest.fixture(scope="module")
def model(single, checkpoint):
    return cases.load(checkpoint("base"), {})


def joint_pass(model, context, canvas, canvases, soft=None):
    rows, columns = context.shape
    stream = model.stream(Cache.empty([0] * rows).sequences, [columns] * rows, canvases)
    tokens = torch.cat([context.flatten(), canvas.flatten()])
    return model.run(tokens, stream, soft=soft, need_context_hidden=True)


def encoded(model, context):
    rows, columns = context.shape
    return model.encode_clean(context.flatten(), [columns] * rows)


@pytest.mark.parametrize("signal", [False, True], ids=["no_signal", "signal"])
def test_one_pass_equals_encoding_first(model, signal):
    context, canvas = tokens()
    soft = torch.randn(*canvas.shape, 32, generator=torch.Generator().manual_seed(1)) if signal else None
    with torch.no_grad():
        joint = joint_pass(model, context, canvas, CANVASES, soft)
        first = encoded(model, context)
        apart = model.canvas_hidden(canvas, CANVASES, first.cache, soft)
    assert joint.canvas_hidden.sub(apart).abs().max() < TOLERANCE
    assert joint.context_hidden.sub(first.context_hidden).abs().max() < TOLERANCE
    for together, alone in zip(joint.cache.layers, first.cache.layers, strict=True):
        assert together.keys.sub(alone.keys).abs().max() < TOLERANCE
        assert together.values.sub(alone.values).abs().max() < TOLERANCE


def test_context_may_come_in_pieces(model):
    """Columns after cached ones, with canvases in the same pass."""
    context, canvas = tokens()
    late = [(row, start) for row, start in CANVASES if start >= 9]
    canvas = canvas[: len(late)]
    with torch.no_grad():
        whole = joint_pass(model, context, canvas, late)
        cache = model.encode(context[:, :9])
        stream = model.stream(cache.sequences, [COLUMNS - 9] * ROWS, late)
        pieces = model.run(torch.cat([context[:, 9:].flatten(), canvas.flatten()]), stream, cache=cache)
    assert pieces.canvas_hidden.sub(whole.canvas_hidden).abs().max() < TOLERANCE


def test_a_canvas_of_many_is_the_canvas_alone(model):
    context, canvas = tokens()
    with torch.no_grad():
        cache = encoded(model, context).cache
        all_at_once = model.canvas_hidden(canvas, CANVASES, cache, None).view(len(CANVASES), 4, -1)
        for index, place in enumerate(CANVASES):
            alone = model.canvas_hidden(canvas[index : index + 1], [place], cache, None)
            assert alone.sub(all_at_once[index]).abs().max() < TOLERANCE


def assert_nothing_leaks(influence):
    """A canvas hears every clean token before it and all of itself, and of everything else exactly nothing."""
    for (row, start), (of_context, _) in zip(CANVASES, influence, strict=True):
        expected = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
        expected[row, :start] = True
        assert torch.equal(of_context > 0, expected)
    own = torch.stack([of_canvases for _, of_canvases in influence])
    assert torch.equal(own > 0, torch.eye(len(CANVASES), dtype=torch.bool)[:, :, None].expand(-1, -1, 4))


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("joint", [True, False], ids=["one_pass", "encoded_first"])
def test_no_canvas_sees_its_own_answer(single, checkpoint, joint, recompute):
    """By gradient with respect to the embeddings: exactly zero for the canvas's clean tokens and for all later ones."""
    context, canvas = tokens()
    assert_nothing_leaks(cases.influence(checkpoint("base"), {}, context, canvas, CANVASES, joint, recompute))


@pytest.mark.parametrize("layout", [dict(tensor=2, expert=2), dict(expert=2)], ids=["tp2_ep2", "ep2"])
def test_no_canvas_sees_its_own_answer_in_a_layout(pool, checkpoint, layout):
    context, canvas = tokens()
    arguments = dict(context=context, canvas=canvas, canvases=CANVASES, joint=True, recompute="none")
    ranks = pool(2).run("tests.distributed.cases:influence", path=checkpoint("base"), layout=layout, **arguments)
    for influence in ranks:
        assert_nothing_leaks(influence)


def test_no_context_token_hears_a_canvas_or_a_later_token(model):
    context, canvas = tokens()
    kept = []
    look_up = type(model.embed_tokens).look_up

    def keeping(ids):
        kept.append(look_up(model.embed_tokens, ids))
        return kept[-1]

    model.embed_tokens.look_up = keeping
    try:
        hidden = joint_pass(model, context, canvas, CANVASES).context_hidden.view(ROWS, COLUMNS, -1)
    finally:
        del model.embed_tokens.look_up
    for column in (0, 7, 8, 20):
        (gradient,) = torch.autograd.grad(hidden[1, column].square().sum(), kept, retain_graph=True)
        heard = gradient.abs().amax(-1) > 0
        expected = torch.zeros_like(heard)
        expected[COLUMNS : COLUMNS + column + 1] = True
        assert torch.equal(heard, expected)
