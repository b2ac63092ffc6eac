"""What no stream can be: segments out of order, or out of their context."""

from __future__ import annotations

import pytest

from nemo_diffgemma.model.segments import Kind, Segment, Span, Stream, stream_of
from nemo_diffgemma.model.visibility import Visibility


@pytest.mark.parametrize(("first", "start"), [(0, 0), (3, 3), (0, 6)], ids=["no context", "first position", "beyond"])
def test_a_canvas_needs_context_before_it(first, start):
    with pytest.raises(ValueError, match="a canvas needs at least one context token before it"):
        stream_of((Span(first, first),), (5 - first,), ((0, start),), 4, 1)


@pytest.mark.parametrize(
    "segments",
    [
        [Segment(0, Kind.CANVAS, 2, 4), Segment(0, Kind.CONTEXT, 2, 3)],
        [Segment(1, Kind.CONTEXT, 2, 3), Segment(0, Kind.CONTEXT, 2, 3)],
        [Segment(0, Kind.CONTEXT, 2, 3), Segment(0, Kind.CONTEXT, 5, 3)],
    ],
    ids=["a canvas first", "another order", "one sequence twice"],
)
def test_context_comes_first_and_once(segments):
    with pytest.raises(ValueError, match="context segments come before canvases, one of a sequence, in the order of"):
        Stream((Span(0, 2), Span(0, 2)), tuple(segments))


def test_context_continues_its_sequence():
    with pytest.raises(ValueError, match="does not begin where"):
        Stream((Span(0, 2),), (Segment(0, Kind.CONTEXT, 3, 3),))


def test_a_canvas_that_would_see_dropped_keys_is_an_error():
    stream = stream_of((Span(0, 20),), (), ((0, 15),), 4, 1)
    with pytest.raises(ValueError, match="sees keys from position 8 on, but those before 13 were dropped"):
        Visibility.of(stream, 8, (Span(13, 20),))
