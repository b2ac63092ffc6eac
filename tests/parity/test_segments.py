"""Attention by segments is attention under the dense mask that says who sees whom.

The mask is written down from the definition, token against token, in float64.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nemo_diffgemma.model import segments
from nemo_diffgemma.model.segments import Canvas, KeyValue, Stream, attend

HEADS, WIDTH = 4, 8


def visible(stream: Stream, window: int | None) -> Tensor:
    """[T, keys] bool, keys being the cached columns of all rows and then the stream's tokens."""
    cached = [("context", row, column) for row in range(stream.rows) for column in range(stream.cached)]
    tokens = [
        ("context", row, column)
        for row in range(stream.rows)
        for column in range(stream.cached, stream.cached + stream.context)
    ]
    tokens += [("canvas", index, None) for index in range(len(stream.canvases)) for _ in range(stream.canvas_length)]
    tokens += [("padding", None, None)] * stream.padding

    def sees(query, key) -> bool:
        kind, of, column = query
        key_kind, key_of, key_column = key
        if kind == "context" and key_kind == "context":
            near = window is None or column - key_column < window  # `window` keys, itself included
            return of == key_of and stream.first[of] <= key_column <= column and near
        if kind == "canvas" and key_kind == "context":
            row, start = stream.canvases[of].row, stream.canvases[of].start
            near = window is None or start - key_column < window  # the last window - 1 before its start
            return row == key_of and stream.first[row] <= key_column < start and near
        return kind == key_kind == "canvas" and of == key_of

    return torch.tensor([[sees(query, key) for key in cached + tokens] for query in tokens])


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """[T, N*D]; zero where a token sees nothing."""
    share = HEADS // k.shape[1]
    k, v = k.double().repeat_interleave(share, 1), v.double().repeat_interleave(share, 1)
    scores = torch.einsum("qnd,knd->nqk", q.double(), k).masked_fill(~mask, -torch.inf)
    return torch.einsum("nqk,knd->qnd", scores.softmax(-1).nan_to_num(0.0), v).flatten(1)


@st.composite
def streams(draw) -> tuple[Stream, int | None]:
    rows = draw(st.integers(1, 3))
    cached = draw(st.integers(0, 14))
    context = draw(st.integers(0 if cached else 1, 14))
    columns = cached + context
    first = tuple(draw(st.integers(0, columns - 1)) for _ in range(rows))
    # what is cached was trimmed, so a canvas of a later pass starts behind it
    places = [(row, start) for row in range(rows) for start in range(max(first[row] + 1, cached), columns + 1)]
    canvases = draw(st.lists(st.sampled_from(places), max_size=6)) if places else []
    if not context and not canvases:
        canvases = [places[0]]
    window = draw(st.sampled_from([None, 1, 2, 3, 8, 100]))
    stream = Stream(
        first=first,
        context=context,
        cached=cached,
        canvases=tuple(Canvas(*place) for place in canvases),
        canvas_length=draw(st.integers(1, 5)) if canvases else 0,
        multiple=draw(st.sampled_from([1, 2, 4])),
    )
    return stream, window


def check(stream: Stream, window: int | None, key_heads: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(tokens: int, heads: int) -> Tensor:
        return torch.randn(tokens, heads, WIDTH, generator=generator)

    q, k, v = draw(stream.tokens, HEADS), draw(stream.tokens, key_heads), draw(stream.tokens, key_heads)
    old_k, old_v = (draw(stream.rows * stream.cached, key_heads) for _ in range(2))
    past = None
    if stream.cached:
        by_row = [old.view(stream.rows, stream.cached, key_heads, WIDTH).transpose(1, 2) for old in (old_k, old_v)]
        dropped = 0 if window is None else max(0, stream.cached - (window - 1))
        past = KeyValue(*(old[:, :, dropped:] for old in by_row), dropped)
    out, kept = attend(q, k, v, stream, window, past)
    truth = dense(q, torch.cat([old_k, k]), torch.cat([old_v, v]), visible(stream, window))
    torch.testing.assert_close(out.double(), truth, atol=1e-5, rtol=1e-5)
    if stream.cached + stream.context:
        assert kept is not None and kept.end == stream.cached + stream.context


@settings(max_examples=250)
@given(case=streams(), key_heads=st.sampled_from([1, 2, 4]), seed=st.integers(0, 1000))
def test_segments_are_the_dense_mask(case, key_heads, seed):
    """Any left padding, cached columns, window, and set of canvases, several of a row and at one place included."""
    check(*case, key_heads, seed)


@pytest.mark.parametrize("window", [None, 8, 64, 70], ids=["global", "8", "64", "70"])
@pytest.mark.parametrize("cached", [0, 9])
def test_long_contexts_are_cut_into_blocks(monkeypatch, window, cached):
    """Longer than a block of queries, whose last one is short."""
    monkeypatch.setattr(segments, "_QUERY_BLOCK", 32)
    stream = Stream(first=(0, 3), context=150, cached=cached, canvases=(Canvas(1, 150), Canvas(0, 40)), canvas_length=4)
    if cached and window is not None:  # the keys before the second canvas are there: its start is behind the cache
        assert stream.canvases[1].start > cached
    check(stream, window, 2)


def test_a_query_at_the_window_sees_the_key_after_the_first():
    """With a window of 8, query 8 sees keys 1 to 8; a canvas that starts at 8 sees keys 1 to 7 and itself."""
    stream = Stream(first=(0,), context=9, canvases=(Canvas(0, 8), Canvas(0, 7)), canvas_length=2)
    for index, seen in ((8, range(1, 9)), (9, range(1, 8)), (11, range(0, 7))):
        q = torch.zeros(stream.tokens, HEADS, WIDTH)
        k = torch.zeros(stream.tokens, 1, WIDTH)
        v = torch.zeros(stream.tokens, 1, WIDTH)
        v[: stream.context, 0, 0] = 2.0 ** torch.arange(9)  # equal scores: the mean of the values says which were seen
        out, _ = attend(q, k, v, stream, 8, None)
        own = 0 if index < 9 else 2
        assert float(out[index, 0]) * (len(seen) + own) == pytest.approx(sum(2.0**key for key in seen))


@pytest.mark.parametrize(("first", "start"), [(0, 0), (3, 3), (0, 6)], ids=["no context", "padding only", "beyond"])
def test_a_canvas_needs_context_before_it(first, start):
    with pytest.raises(ValueError, match="a canvas needs at least one context token before it"):
        Stream(first=(first,), context=5, canvases=(Canvas(0, start),), canvas_length=4)
