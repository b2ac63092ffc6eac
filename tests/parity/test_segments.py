"""Attention by segments is attention under the dense mask that says who sees whom, whichever kernel computes it.

The mask is written down from the definition, token against token, in float64.
"""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nemo_diffgemma.model import segment_attention
from nemo_diffgemma.model import visibility as visibility_module
from nemo_diffgemma.model.cache import KeyValue, extended
from nemo_diffgemma.model.segment_attention import (
    Kernel,
    attend,
    attend_as_one,
    attend_by_groups,
    choose_kernel,
    flex_options,
)
from nemo_diffgemma.model.segments import Kind, Segment, Span, Stream, stream_of
from nemo_diffgemma.model.visibility import BLOCK, Visibility

HEADS, WIDTH = 4, 8
WINDOWS = [None, 1, 2, 3, 8, 100]


def tokens_of(stream: Stream) -> list[tuple[str, int, int, int]]:
    """(kind, segment, sequence, position) of cached positions and of the stream's tokens."""
    cached = [
        ("context", -1, sequence, position)
        for sequence, span in enumerate(stream.sequences)
        for position in range(span.first, span.end)
    ]
    new = [
        (segment.kind.value, index, segment.sequence, segment.start + place)
        for index, segment in enumerate(stream.segments)
        for place in range(segment.length)
    ]
    return cached + new + [("padding", -1, -1, -1)] * stream.padding


def visible(stream: Stream, window: int | None) -> Tensor:
    """[T, keys] bool, keys being the cached positions of all sequences and then the stream's tokens."""
    tokens = tokens_of(stream)

    def sees(query, key) -> bool:
        kind, index, sequence, position = query
        key_kind, key_index, key_sequence, key_position = key
        if key_kind == "context" and kind in ("context", "canvas") and sequence == key_sequence:
            if kind == "context":  # `window` keys, itself included
                return key_position <= position and (window is None or position - key_position < window)
            start = stream.segments[index].start  # the last window - 1 before its start
            return key_position < start and (window is None or start - key_position < window)
        return kind == key_kind == "canvas" and index == key_index

    return torch.tensor([[sees(query, key) for key in tokens] for query in tokens[-stream.tokens :]])


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """[T, N*D]; zero where a token sees nothing."""
    share = HEADS // k.shape[1]
    k, v = k.double().repeat_interleave(share, 1), v.double().repeat_interleave(share, 1)
    scores = torch.einsum("qnd,knd->nqk", q.double(), k).masked_fill(~mask, -torch.inf)
    return torch.einsum("nqk,knd->qnd", scores.softmax(-1).nan_to_num(0.0), v).flatten(1)


@st.composite
def streams(draw) -> tuple[Stream, int | None, bool]:
    """A stream, a window, and whether the cached context was trimmed to it."""
    trimmed = draw(st.booleans())
    sequences, new = [], []
    for _ in range(draw(st.integers(1, 4))):
        first = draw(st.sampled_from([0, 0, 3]))
        cached = draw(st.sampled_from([0, 4, draw(st.integers(0, 14))]))
        sequences.append(Span(first, first + cached))
        new.append(draw(st.sampled_from([0, 4, draw(st.integers(0, 14))])))
    places = [
        (index, start)
        for index, (span, more) in enumerate(zip(sequences, new, strict=True))
        for start in range(max(span.first + 1, span.end if trimmed else 0), span.end + more + 1)
    ]
    canvases = draw(st.lists(st.sampled_from(places), max_size=6)) if places else []
    segments = [
        Segment(index, Kind.CONTEXT, sequences[index].end, length) for index, length in enumerate(new) if length
    ]
    length = draw(st.integers(1, 5))
    for sequence, start in canvases:
        odd = draw(st.sampled_from([0, 0, 0, 1]))
        segments.append(Segment(sequence, Kind.CANVAS, start, length + odd))
    if not segments:
        sequences.append(Span(0, 0))
        segments = [Segment(len(sequences) - 1, Kind.CONTEXT, 0, 3)]
    multiple = draw(st.sampled_from([1, 2, 4]))
    return Stream(tuple(sequences), tuple(segments), multiple), draw(st.sampled_from(WINDOWS)), trimmed


class Drawn:
    """Random queries, keys and values of a stream and of what is cached, and attention under the dense mask."""

    def __init__(
        self,
        stream: Stream,
        window: int | None,
        trimmed: bool,
        key_heads: int,
        seed: int = 0,
        width: int = WIDTH,
        gradient: bool = False,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(tokens: int, heads: int) -> Tensor:
            return torch.randn(tokens, heads, width, generator=generator)

        self.stream, self.window = stream, window
        self.q, self.k, self.v = (draw(stream.tokens, heads) for heads in (HEADS, key_heads, key_heads))
        cached = sum(span.length for span in stream.sequences)
        old_k, old_v = draw(cached, key_heads), draw(cached, key_heads)
        self.past = KeyValue(old_k, old_v, stream.sequences) if cached else None
        if self.past is not None and trimmed and window is not None:
            self.past = self.past.last(window - 1)
        mask = visible(stream, window)
        self.inputs = [x.requires_grad_(gradient) for x in (self.q, self.k, self.v)]
        self.truth = dense(self.q, torch.cat([old_k, self.k]), torch.cat([old_v, self.v]), mask)

    def assert_true(self, out: Tensor) -> None:
        """The output is that of the dense mask; so are gradients by queries, keys and values, where asked for."""
        torch.testing.assert_close(out.double(), self.truth, atol=1e-5, rtol=1e-5)
        if not self.truth.requires_grad:
            return
        asked = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        both = [torch.autograd.grad(x, self.inputs, asked.to(x.dtype), retain_graph=True) for x in (out, self.truth)]
        for found, true in zip(*both, strict=True):
            torch.testing.assert_close(found, true, atol=1e-4, rtol=1e-4)

    @property
    def context(self) -> KeyValue:
        return extended(self.past, self.k, self.v, self.stream)

    @property
    def visibility(self) -> Visibility:
        return Visibility.of(self.stream, self.window, self.context.kept)


@pytest.mark.parametrize("lengths", [(5, 5, 5), (0, 5, 2), (3, 0, 0), (4,)])
@pytest.mark.parametrize("most", [0, 1, 3, 9])
def test_keys_of_a_sequence_stay_its_own(lengths, most):
    """Cut to the last ones, chosen, or extended by new context, each sequence has what it would have alone."""
    offsets = [sum(lengths[:index]) for index in range(len(lengths))]
    spans = tuple(Span(3, 3 + length) for length in lengths)
    keys = torch.arange(float(sum(lengths)))[:, None, None]
    past = KeyValue(keys, -keys, spans)
    own = [keys[offset : offset + length] for offset, length in zip(offsets, lengths, strict=True)]
    cut = past.last(most)
    assert cut.kept == tuple(Span(3 + max(0, length - most), 3 + length) for length in lengths)
    assert torch.equal(cut.keys, torch.cat([part[max(0, len(part) - most) :] for part in own]))
    new = [2, 0, 1][: len(lengths)]
    stream = stream_of(spans, tuple(new), (), 4, 2)
    more = 100.0 + torch.arange(float(stream.tokens))[:, None, None]
    fresh = more[: sum(new)].split(new)
    grown = extended(cut, more, -more, stream)
    for index in reversed(range(len(lengths))):
        expected = torch.cat([own[index][max(0, lengths[index] - most) :], fresh[index]])
        for of in (grown.of(index), grown.select([index, 0]).of(0)):
            assert torch.equal(of[0], expected) and torch.equal(of[1], -expected)


@settings(max_examples=200)
@given(case=streams(), key_heads=st.sampled_from([1, 2, 4]), seed=st.integers(0, 1000))
def test_attention_of_segments_is_that_of_the_dense_mask(case, key_heads, seed):
    """Any first positions, cached and new lengths, windows and canvases, several at one place and none included."""
    drawn = Drawn(*case, key_heads, seed, gradient=True)
    out, context = attend(drawn.q, drawn.k, drawn.v, drawn.stream, drawn.window, drawn.past)
    drawn.assert_true(out)
    assert tuple(span.end for span in context.kept) == tuple(span.end for span in drawn.stream.sequences_after)
    drawn.assert_true(attend_by_groups(drawn.q, drawn.k, drawn.v, drawn.visibility, context, repeat_heads=True))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@settings(max_examples=60)
@given(case=streams(), key_heads=st.sampled_from([1, 2, 4]), seed=st.integers(0, 1000))
def test_flex_attention_of_the_whole_stream_is_that_of_the_dense_mask(case, key_heads, seed):
    """In its eager form, which evaluates the same mask: the kernel itself needs a GPU."""
    drawn = Drawn(*case, key_heads, seed)
    drawn.assert_true(attend_as_one(drawn.q, drawn.k, drawn.v, drawn.visibility, drawn.context))


def test_one_compilation_of_flex_attention_serves_many_streams(monkeypatch):
    """As for CUDA, but that graphs are run as they are: only sizes of 1 and widths are compiled anew."""
    compilations, given = [], {}

    def compiled(function, plain=torch.compile, **settings):
        given.update(settings)
        return plain(function, backend=lambda graph, _: compilations.append(1) or graph, **settings)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "compile", compiled)
        flex = segment_attention._flex_attention.__wrapped__("cuda")
    assert given == dict(dynamic=True, fullgraph=True, recompile_limit=64)
    monkeypatch.setattr(segment_attention, "_flex_attention", lambda device_type: flex)
    for context in (200, 150, 300, 260, 170):
        sequences = (Span(0, context), Span(3, 40), Span(0, 0))
        stream = stream_of(sequences, (0, 4, context), ((0, context), (1, 44), (2, 13)), 4, 2)
        drawn = Drawn(stream, 8, False, 2, width=16)
        drawn.assert_true(attend_as_one(drawn.q, drawn.k, drawn.v, drawn.visibility, drawn.context))
    assert 1 <= len(compilations) <= 3
    torch._dynamo.reset()


def long_stream(seed: int) -> tuple[Stream, int | None, bool]:
    """Contexts and canvases of several blocks, whose borders lie at blocks' borders or anywhere."""
    chosen = random.Random(seed)
    lengths = [0, 1, 100, BLOCK - 1, BLOCK, 2 * BLOCK, 300, 3 * BLOCK + 1]
    sequences = [
        Span(first, first + chosen.choice(lengths)) for first in chosen.choices([0, 3], k=chosen.randint(1, 3))
    ]
    new = [chosen.choice(lengths) or int(not span.length) for span in sequences]
    window, trimmed = chosen.choice([None, 8, BLOCK, 200]), chosen.random() < 0.5
    places = []
    for _ in range(chosen.randint(0, 3)):
        sequence = chosen.randrange(len(sequences))
        first, end = sequences[sequence]
        places.append((sequence, chosen.randint(max(first + 1, end if trimmed else 0), end + new[sequence])))
    length = chosen.choice([4, 100, BLOCK, 2 * BLOCK])
    return stream_of(tuple(sequences), tuple(new), tuple(places), length, chosen.choice([1, 4])), window, trimmed


@pytest.mark.parametrize("seed", range(40))
def test_blocks_of_the_flex_mask_are_those_that_some_query_sees(seed):
    """A kernel visits no other block, and evaluates no mask in those that every query sees whole."""
    stream, window, trimmed = long_stream(seed)
    cached = sum(span.length for span in stream.sequences)
    past = KeyValue(torch.zeros(cached, 1, 1), torch.zeros(cached, 1, 1), stream.sequences)
    past = past.last(window - 1) if trimmed and window is not None else past
    new = torch.zeros(stream.tokens, 1, 1)
    visibility = Visibility.of(stream, window, extended(past, new, new, stream).kept)
    mask = visibility.block_mask(torch.device("cpu"))
    queries, keys = stream.tokens, visibility.context_keys + stream.canvas_tokens
    seen = mask.mask_mod(0, 0, torch.arange(queries)[:, None], torch.arange(keys))
    padded = torch.zeros(-(-queries // BLOCK) * BLOCK, -(-keys // BLOCK) * BLOCK, dtype=torch.bool)
    padded[:queries, :keys] = seen
    blocks = padded.view(-1, BLOCK, padded.shape[1] // BLOCK, BLOCK).transpose(1, 2)

    def listed(numbers: Tensor, indices: Tensor) -> Tensor:
        out = torch.zeros(blocks.shape[:2], dtype=torch.bool)
        for row, (number, columns) in enumerate(zip(numbers[0, 0].tolist(), indices[0, 0].tolist(), strict=True)):
            out[row, columns[:number]] = True
        return out

    whole = blocks.flatten(2).all(-1)
    assert torch.equal(listed(mask.full_kv_num_blocks, mask.full_kv_indices), whole)
    assert torch.equal(listed(mask.kv_num_blocks, mask.kv_indices), blocks.flatten(2).any(-1) & ~whole)


def equal_rows(rows: int, context: int, cached: int = 0, canvases: bool = False) -> Stream:
    places = tuple((row, cached + context) for row in range(rows)) if canvases else ()
    return stream_of((Span(0, cached),) * rows, (context,) * rows, places, 4, 1)


UNEQUAL = stream_of((Span(0, 3), Span(0, 5)), (), ((0, 3), (1, 5)), 4, 1)


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "stream", "window", "kernel"),
    [
        ("cpu", torch.float32, 256, UNEQUAL, None, Kernel.GROUPS),
        ("cpu", torch.bfloat16, 512, equal_rows(2, 5), None, Kernel.GROUPS),
        # batches of one geometry: the kernels that hold no scores
        ("cuda", torch.bfloat16, 256, equal_rows(2, 5), 8, Kernel.GROUPS),
        ("cuda", torch.bfloat16, 256, equal_rows(2, 0, cached=5, canvases=True), 8, Kernel.GROUPS),
        ("cuda", torch.bfloat16, 512, equal_rows(2, 5, canvases=True), None, Kernel.GROUPS_REPEATED_HEADS),
        ("cuda", torch.float32, 256, equal_rows(2, 5, canvases=True), 8, Kernel.GROUPS_REPEATED_HEADS),
        # masks and unequal sequences: one call
        ("cuda", torch.bfloat16, 256, equal_rows(2, 9), 8, Kernel.FLEX),
        ("cuda", torch.bfloat16, 512, equal_rows(2, 4, cached=5), None, Kernel.FLEX),
        ("cuda", torch.bfloat16, 512, UNEQUAL, None, Kernel.FLEX),
        ("cuda", torch.float32, 16, UNEQUAL, 8, Kernel.FLEX),
        # widths that FlexAttention does not take
        ("cuda", torch.bfloat16, 8, UNEQUAL, 8, Kernel.GROUPS_REPEATED_HEADS),
        ("cuda", torch.bfloat16, 96, UNEQUAL, None, Kernel.GROUPS_REPEATED_HEADS),
    ],
)
def test_the_kernel_follows_from_device_dtype_width_and_geometry(device, dtype, head_dim, stream, window, kernel):
    uniform = Visibility.of(stream, window, stream.sequences_after).is_uniform
    assert choose_kernel(device, dtype, head_dim, uniform) is kernel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 256, 512])
def test_blocks_of_wide_heads_fit_the_shared_memory_of_every_gpu(dtype, head_dim):
    """99 KB on sm_120. Up to a width of 256 torch has blocks of its own for each GPU."""
    options = flex_options(dtype, head_dim)
    if head_dim <= 256:
        assert options == {"BACKEND": "TRITON"}
    else:
        queries, keys = options["fwd_BLOCK_M"], options["fwd_BLOCK_N"]
        assert min(queries, keys) >= 16
        assert head_dim * dtype.itemsize * (queries + 2 * keys * options["num_stages"]) <= 99 << 10


@pytest.mark.parametrize("window", [None, 8, 64, 70], ids=["global", "8", "64", "70"])
@pytest.mark.parametrize("cached", [0, 9])
def test_long_contexts_are_cut_into_tiles(monkeypatch, window, cached):
    """Longer than a tile of queries; the first and the last may be short."""
    for module in (segment_attention, visibility_module):
        monkeypatch.setattr(module, "TILE", 32)
    sequences = (Span(0, cached), Span(3, 3 + cached))
    stream = stream_of(sequences, (150, 147), ((1, cached + 150), (0, 40)), 4, 1)
    drawn = Drawn(stream, window, False, 2, gradient=True)
    drawn.assert_true(attend(drawn.q, drawn.k, drawn.v, stream, window, drawn.past)[0])


class Elements(TorchDispatchMode):
    """How many numbers all operations give."""

    written = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if not function.is_view:
            self.written += sum(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))
        return out


def elements(lengths: list[int], canvases: list[tuple[int, int]]) -> int:
    """Those of forward and backward of one sliding layer."""
    sequences = (Span(0, 0),) * len(lengths)
    stream = stream_of(sequences, tuple(lengths), tuple(canvases), 16, 1)
    q, k, v = (torch.randn(stream.tokens, heads, WIDTH, requires_grad=True) for heads in (HEADS, 2, 2))
    with Elements() as counted:
        attend(q, k, v, stream, 64, None)[0].sum().backward()
    return counted.written


def test_cost_is_linear_in_length_and_in_sequences_and_canvases():
    """Forward and backward: no temporary of all tokens for each block, sequence or canvas."""
    assert elements([8 * 1000], [(0, 500)]) < 8.8 * elements([1000], [(0, 500)])
    many = [100 + index for index in range(64)]
    assert elements(many, [(index, 90 - index) for index in range(64)]) < 8.8 * elements(
        many[::8], [(index, 90 - index) for index in range(8)]
    )


def test_a_query_at_the_window_sees_the_key_after_the_first():
    """With a window of 8, query 8 sees keys 1 to 8; a canvas that starts at 8 sees keys 1 to 7 and itself."""
    stream = stream_of((Span(0, 0),), (9,), ((0, 8), (0, 7)), 2, 1)
    for index, seen in ((8, range(1, 9)), (9, range(1, 8)), (11, range(0, 7))):
        q = torch.zeros(stream.tokens, HEADS, WIDTH)
        k = torch.zeros(stream.tokens, 1, WIDTH)
        v = torch.zeros(stream.tokens, 1, WIDTH)
        v[:9, 0, 0] = 2.0 ** torch.arange(9)  # equal scores: the mean of the values says which were seen
        out, _ = attend(q, k, v, stream, 8, None)
        own = 0 if index < 9 else 2
        assert float(out[index, 0]) * (len(seen) + own) == pytest.approx(sum(2.0**key for key in seen))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("window", [None, 8])
def test_equal_sequences_are_one_batch_of_views(rows, window):
    """No gathered copies and no order to restore: prompts, and canvases behind them or behind what is cached."""
    for stream in (equal_rows(rows, 5, canvases=True), equal_rows(rows, 0, cached=20, canvases=True)):
        visibility = Visibility.of(stream, window, stream.sequences_after)
        assert visibility.is_uniform and visibility.order(torch.device("cpu")) is None
        x = torch.randn(max(stream.tokens, visibility.context_keys), 2, 3)
        for group in visibility.groups:
            assert group.queries.count == rows
            for slices, total in ((group.queries, stream.tokens), (group.keys, visibility.context_keys)):
                of = x[:total]
                assert slices.of(of).untyped_storage().data_ptr() == of.untyped_storage().data_ptr()


def test_sequences_of_different_lengths_run_together_where_they_see_as_much():
    """Canvases behind contexts longer than the window have one geometry in sliding layers, wherever they stand."""
    stream = stream_of((Span(0, 20), Span(3, 31), Span(0, 11)), (), ((0, 20), (1, 31), (2, 11)), 4, 1)
    assert [group.queries.count for group in Visibility.of(stream, 8, stream.sequences).groups] == [3]
    assert [group.queries.count for group in Visibility.of(stream, None, stream.sequences).groups] == [1, 1, 1]


class Recorded(TorchDispatchMode):
    """Names of the operations that run."""

    def __enter__(self):
        self.names = set()
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("as_one", [False, True], ids=["groups", "flex"])
def test_layers_behind_the_first_take_nothing_from_the_host(as_one, monkeypatch):
    """Indices, masks and ranges are made once a stream: no list becomes a tensor, no tensor a number."""
    # the kernel itself is left out: its eager form does not run under a dispatch mode
    monkeypatch.setattr(segment_attention, "_flex_attention", lambda device_type: lambda q, k, v, **_: q)
    sequences = (Span(0, 20), Span(3, 31), Span(0, 11), Span(0, 0))
    stream = stream_of(sequences, (0, 4, 4, 9), ((0, 20), (1, 35), (2, 13), (3, 9), (3, 4)), 4, 2)

    def layer() -> None:
        drawn = layers.pop()
        if as_one:
            attend_as_one(drawn.q, drawn.k, drawn.v, drawn.visibility, drawn.context)
        else:
            attend(drawn.q, drawn.k, drawn.v, stream, 8, drawn.past)

    layers = [Drawn(stream, 8, False, 2, seed) for seed in range(2)]
    with Recorded() as first:
        layer()
    with Recorded() as second:
        layer()
    from_host = {"arange", "lift_fresh", "lift_fresh_copy", "_to_copy", "_local_scalar_dense", "nonzero", "argsort"}
    assert first.names & from_host
    assert not second.names & from_host
