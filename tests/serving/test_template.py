"""Text with holes: every combination of lengths that is tried keeps what is locked, in order and apart."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_diffgemma.serving.api.template import (
    MOST_COMBINATIONS,
    MOST_LENGTHS,
    Hole,
    Locked,
    of_token_ids,
    templates,
    written,
)
from nemo_diffgemma.serving.failures import InvalidRequest
from nemo_diffgemma.serving.text import ServedText, files_of
from nemo_diffgemma.tokenizer import Text
from tests.serving import served

IDS = st.lists(st.integers(0, 499), max_size=9).map(tuple)
HOLES = st.tuples(st.integers(1, 40), st.integers(0, 40)).map(lambda pair: Hole(pair[0], pair[0] + pair[1]))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> ServedText:
    directory = tmp_path_factory.mktemp("tokenizer")
    served.tokenizer().save_pretrained(directory)
    files = files_of(Text(directory))
    assert files is not None
    return ServedText(files)


@given(st.lists(st.one_of(IDS.map(Locked), HOLES), max_size=9))
def test_each_template_is_the_parts_in_order_with_lengths_in_their_bounds(parts):
    holes = [part for part in parts if isinstance(part, Hole)]
    free = [hole for hole in holes if hole.least < hole.most]
    if not holes or len(free) > 5:
        with pytest.raises(InvalidRequest, match="hole"):
            templates(parts)
        return
    made = templates(parts)
    assert len(made) <= MOST_COMBINATIONS and len({template.lengths for template in made}) == len(made)
    for place, hole in enumerate(holes):
        tried = {template.lengths[place] for template in made}
        assert {hole.least, hole.most} <= tried <= set(range(hole.least, hole.most + 1))
        assert len(tried) <= MOST_LENGTHS
    for template in made:
        rebuilt, position, lengths = [], 0, iter(template.lengths)
        for part, (begin, end) in zip(template.parts, template.spans, strict=True):
            assert begin == position
            position = end
            rebuilt += part.ids if isinstance(part, Locked) else [None] * next(lengths)
        assert position == template.length == len(rebuilt)
        assert [template.locked.get(place) for place in range(template.length)] == rebuilt
        for longest in (1, 7, 32, 256):
            canvas = template.canvas_length(longest)
            assert canvas <= longest and -(-template.length // canvas) == -(-template.length // longest)


@given(st.lists(st.one_of(st.none(), st.integers(0, 499)), min_size=1, max_size=60))
def test_ids_with_null_are_the_same_template(ids):
    if None not in ids:
        with pytest.raises(InvalidRequest, match="no hole"):
            templates(of_token_ids(ids))
        return
    (template,) = templates(of_token_ids(ids))
    assert [template.locked.get(place) for place in range(template.length)] == ids


@given(st.lists(st.one_of(st.text(min_size=1, max_size=5), st.integers(1, 4)), min_size=1, max_size=8), st.data())
def test_locked_text_is_given_back_as_it_was_and_nothing_of_a_hole_is_lost(text, given_parts, data):
    parts = [
        Locked(tuple(text.encode(part, special_tokens=False)), part) if isinstance(part, str) else Hole(part, part)
        for part in given_parts
    ]
    if not any(isinstance(part, Hole) for part in parts):
        parts.append(Hole(3, 3))
    (template,) = templates(parts)
    letters = st.sampled_from([id for id in range(500) if (content := text.token(id)[1]) and content.isascii()])
    tokens = [template.locked.get(place, data.draw(letters)) for place in range(template.length)]
    pieces = written(text, template, tokens)
    assert [piece for piece, part in zip(pieces, parts, strict=True) if isinstance(part, Locked)] == [
        part.text for part in parts if isinstance(part, Locked)
    ]
    assert "".join(pieces) == text.decode(tokens)
