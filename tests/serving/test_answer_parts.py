"""Answers taken to pieces: whatever the canvases, nothing is lost, nothing is told twice, and no marker is shown."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_diffgemma.serving.answer_parts import AnswerParts, Said, Thought, ToolCall
from nemo_diffgemma.serving.markers import Markers
from nemo_diffgemma.serving.text import ServedText, files_of
from nemo_diffgemma.serving.tool_syntax import MalformedCall, calls_of
from nemo_diffgemma.tokenizer import Text
from tests.serving import cases, gemma


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    directory = tmp_path_factory.mktemp("gemma")
    gemma.tokenizer().save_pretrained(directory)
    return ServedText(files_of(Text(directory)))


class Heard:
    """What was told of an answer, put together."""

    def __init__(self, text: ServedText, **settings: Any) -> None:
        self.parts = AnswerParts(text.decode, text.part_markers, **settings)
        self.said, self.thought, self.calls = "", "", []

    def push(self, tokens: list[int], is_last: bool) -> None:
        for part in self.parts.push(tokens, is_last):
            if isinstance(part, ToolCall):
                assert part.index == len(self.calls)
                self.calls.append((part.name, json.loads(part.arguments)))
            else:
                assert part.text
                self.said += part.text if isinstance(part, Said) else ""
                self.thought += part.text if isinstance(part, Thought) else ""

    @property
    def all(self) -> tuple[Any, ...]:
        return self.said, self.thought, self.calls, self.parts.thought_tokens


def heard(text: ServedText, ids: list[int], cuts: list[int], **settings: Any) -> Heard:
    """An answer that came in canvases which end at `cuts`."""
    made, begin = Heard(text, **settings), 0
    for cut in sorted(min(cut, len(ids)) for cut in cuts):
        made.push(ids[begin:cut], False)
        begin = cut
    if begin < len(ids):
        made.push(ids[begin:], False)
    made.push([], True)
    return made


CUTS = st.lists(st.integers(0, 200), max_size=6)
WORDS = st.text(st.sampled_from("aé世 \n.,:{}[]\"'\\0"), max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | WORDS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b_1", "city"]), inner, max_size=3)
    ),
    max_leaves=6,
)
OBJECTS = st.dictionaries(st.sampled_from(["a", "b_1", "city"]), VALUES, max_size=3)
NAMES = st.sampled_from(["f", "get_weather", "module.name-2"])


def written(value: Any) -> str:
    """As the template writes a value."""
    if isinstance(value, str):
        return f'<|"|>{value}<|"|>'
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{written(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(written, value)) + "]"
    return json.dumps(value) if isinstance(value, bool) else str(value)


SEGMENTS = st.lists(
    st.tuples(st.just("said"), WORDS)
    | st.tuples(st.just("thought"), st.text(st.sampled_from("aé世 .\"'"), min_size=1, max_size=8))
    | st.tuples(st.just("call"), st.tuples(NAMES, OBJECTS)),
    max_size=5,
)


@given(SEGMENTS, CUTS, st.sampled_from(["", "<turn|>", "<|tool_response>"]))
def test_an_answer_as_the_template_writes_it_is_read_whatever_the_canvases(text, segments, cuts, end):
    answer, said, thoughts, calls = "", "", [], []
    for kind, content in segments:
        if kind == "said":
            answer, said = answer + content, said + content
        elif kind == "thought":
            answer += f"<|channel>thought\n{content}\n<channel|>"
            thoughts.append(content)
        else:
            answer += f"<|tool_call>call:{content[0]}{written(content[1])}<tool_call|>"
            calls.append(content)
    found = heard(text, gemma.ids(answer + end), cuts, most_calls=None)
    assert (found.said, found.thought, found.calls) == (said, "\n".join(thoughts), calls)


TOKENS = st.lists(
    st.sampled_from([3, 4, 5, 6, 8])
    | st.integers(0, cases.IDS - 1)
    | st.sampled_from(gemma.ids("call:f{a1,}thought\n")),
    max_size=60,
)


@given(TOKENS, CUTS, st.sampled_from([0, 1, None]), st.lists(WORDS.filter(bool), max_size=2))
def test_canvases_change_nothing(text, ids, cuts, most_calls, stop):
    whole = heard(text, ids, [], most_calls=most_calls, stop=stop)
    assert heard(text, ids, cuts, most_calls=most_calls, stop=stop).all == whole.all


@given(TOKENS, CUTS)
def test_every_token_of_text_is_shown_once_and_no_marker(text, ids, cuts):
    """Where no call may be made, all that is written is shown: as a thought, or as what is said."""
    found = heard(text, ids, cuts)
    assert not any(marker in found.said + found.thought for marker in gemma.SPECIAL)
    expected = {"said": "", "thought": ""}
    kind, run = "said", []

    def ends() -> None:
        pieces = [[]]
        for id in run:
            pieces.append([]) if id == 8 and kind == "call" else pieces[-1].append(id)
        shown = '"'.join(map(text.decode, pieces))
        if kind == "thought":
            shown = "" if shown == "thought" else shown.removeprefix("thought\n")
        expected["thought" if kind == "thought" else "said"] += shown
        run.clear()

    for id in ids:
        after = {3: "thought", 5: "call"}.get(id) or ("said" if (kind, id) in (("thought", 4), ("call", 6)) else None)
        if after is not None:
            ends()
            kind = after
        elif id not in (4, 6):
            run.append(id)
    ends()
    assert found.said == expected["said"]
    assert found.thought == expected["thought"].removesuffix("\n")
    assert found.calls == []


@given(st.lists(st.text(st.sampled_from('call:f{}[],"\\atrue-10.e '), max_size=12), max_size=7))
def test_whatever_is_written_is_calls_or_malformed(pieces):
    try:
        calls = calls_of(["call:f{" + pieces[0], *pieces[1:]] if pieces else pieces)
    except MalformedCall:
        return
    assert all(isinstance(json.loads(call.arguments), dict) for call in calls)


@pytest.mark.parametrize(
    "body, arguments",
    [
        ("{}", {}),
        ("{ }", {}),
        ('{city:<|"|>Rome, {EU}<|"|>,days:3}', {"city": "Rome, {EU}", "days": 3}),
        ('{"city":"Ro\\"me","a":-1.5e3}', {"city": 'Ro"me', "a": -1500.0}),
        ('{<|"|>a b<|"|>:[1,[],{x:None}]}', {"a b": [1, [], {"x": None}]}),
        ("{city:New York,time:12:30,on:True}", {"city": "New York", "time": "12:30", "on": True}),
        ("{a:007,b:NaN,c:1e999}", {"a": "007", "b": "NaN", "c": "1e999"}),
        ("{a:1,a:2}", {"a": 2}),
    ],
)
def test_what_is_written_nearly_right_is_read(text, body, arguments):
    found = heard(text, gemma.ids(f"<|tool_call>call:f{body}<tool_call|>"), [], most_calls=None)
    assert (found.calls, found.said) == ([("f", arguments)], "")


@pytest.mark.parametrize(
    "written, shown",
    [
        ('call:f{a:<|"|>b}', 'call:f{a:"b}'),
        ("call:f{a:}", "call:f{a:}"),
        ("call:f{a:1}}", "call:f{a:1}}"),
        ("call:f{a:1", "call:f{a:1"),
        ("call:{a:1}", "call:{a:1}"),
        ("call:f g{}", "call:f g{}"),
        ("f{a:1}", "f{a:1}"),
        ('call:f{a:<|"|>b<|"|>c}', 'call:f{a:"b"c}'),
        ("call:f{a:" + "[" * 70 + "]" * 70 + "}", "call:f{a:" + "[" * 70 + "]" * 70 + "}"),
        (r'call:f{a:"\ud800"}', r'call:f{a:"\ud800"}'),
        ("call:f{a:" + "9" * 5000 + "!", "call:f{a:" + "9" * 5000 + "!"),
        ("", ""),
    ],
)
def test_a_call_that_is_none_is_shown_as_it_was_written(text, written, shown):
    found = heard(text, gemma.ids(f"so:<|tool_call>{written}<tool_call|>."), [], most_calls=None)
    assert (found.calls, found.said) == ([], f"so:{shown}.")


@pytest.mark.parametrize(
    "answer, said, thought, calls",
    [
        ("<|channel>thought\nhm<tool_call|>m", "", "hmm", 0),
        ("<|channel>thought\nhm<|tool_call>call:f{}<tool_call|>", "", "hm", 1),
        ("<|tool_call>call:f{}<|tool_call>call:f{}<turn|>", "", "", 2),
        ("<|tool_call>call:f{}call:g{}<tool_call|>", "", "", 2),
        ("<|tool_call>call:f{}<|channel>thought\na\n<channel|>b", "b", "a", 1),
        ("<channel|>a<tool_call|>b", "ab", "", 0),
        ("<|channel>thought<channel|>thought\n", "thought\n", "", 0),
        ("<|channel>thought\nthought<channel|>", "", "thought", 0),
        ("<|channel>plan\na<channel|>", "", "plan\na", 0),
    ],
)
def test_markers_that_are_missing_or_too_many(text, answer, said, thought, calls):
    found = heard(text, gemma.ids(answer), [], most_calls=None)
    assert (found.said, found.thought, len(found.calls)) == (said, thought, calls)


def test_a_second_call_that_may_not_be_made_is_shown(text):
    twice = gemma.ids("<|tool_call>call:f{}<tool_call|>" * 2)
    found = heard(text, twice, [], most_calls=1)
    assert (found.calls, found.said) == ([("f", {})], "call:f{}")


def test_calls_have_ids_of_their_own(text):
    parts = AnswerParts(text.decode, text.part_markers, most_calls=None)
    made = parts.push(gemma.ids("<|tool_call>call:f{}<tool_call|>" * 50), True)
    assert len({part.id for part in made}) == 50


def test_stop_strings_are_looked_for_in_what_is_said(text):
    answer = gemma.ids('<|channel>thought\nEND\n<channel|>a<|tool_call>call:f{a:<|"|>END<|"|>}<tool_call|>bEND c')
    found = heard(text, answer, [], stop=["END"], most_calls=None)
    assert (found.said, found.thought, found.calls) == ("ab", "END", [("f", {"a": "END"})])


def test_a_vocabulary_without_markers_has_only_what_is_said(text):
    found = AnswerParts(text.decode, Markers()).push(gemma.ids("<|channel>thought\na<channel|>b"), True)
    assert found == [Said("thought\nab")]


def test_markers_that_a_tokenizer_calls_ordinary_are_not_shown_either(tmp_path):
    gemma.tokenizer().save_pretrained(tmp_path)
    files = files_of(Text(tmp_path))
    files = msgspec.structs.replace(files, tokenizer=files.tokenizer.replace('"special":true', '"special":false'))
    assert '"special": true' not in files.tokenizer and '"special":false' in files.tokenizer
    assert ServedText(files).decode(gemma.ids('a<|"|>b<|turn>c<|tool>')) == "abc"
