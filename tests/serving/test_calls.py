"""Calls of tools and answers after a thought, as languages: the template's syntax, and its tokens as tokens."""

from __future__ import annotations

import functools
import random

import jinja2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_diffgemma.serving.constraints import (
    ConstraintError,
    ConstraintViolation,
    Language,
    after_thought,
    choice,
    json_of_schema,
    tool_calls,
)
from nemo_diffgemma.serving.constraints.byte_automaton import ByteAutomaton, byte_automaton
from nemo_diffgemma.serving.constraints.token_bytes import marked
from tests.serving import examples, gemma, held

MARKERS = ("<|tool_call>", "<tool_call|>", '<|"|>', "<|channel>", "<channel|>")


def tool(name: str, parameters=None) -> dict:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


WEATHER = tool(
    "weather",
    {"type": "object", "required": ["city"], "properties": {
        "days": {"type": "integer", "minimum": 1, "maximum": 10}, "city": {"type": "string"},
        "units": {"type": "array", "items": {"enum": ["C", "F"]}}, "more": {}}},
)  # fmt: skip
NOW = tool("now")
ONE = '<|tool_call>call:weather{city:<|"|>Genoa, "IT"\n<|"|>,days:3}<tool_call|>'


def written(text: str) -> str:
    """With tokens as languages read them."""
    for name in MARKERS:
        text = text.replace(name, marked(name))
    return text


@functools.cache
def compiled(language: Language) -> ByteAutomaton:
    return byte_automaton(language.expression, most_states=40_000)


def agreed(language: Language, automaton: ByteAutomaton, text: str) -> bool:
    """Whether the automaton accepts a text; the check must say the same."""
    accepts = automaton.accepts(text.encode())
    if accepts:
        language.check(text)
    else:
        with pytest.raises(ConstraintViolation):
            language.check(text)
    return accepts


@pytest.mark.parametrize(
    "text, one, several, none",
    [
        (ONE, True, True, True),
        ("<|tool_call>call:now{}<tool_call|>", True, True, True),
        (ONE + "<|tool_call>call:now{}<tool_call|>", False, True, False),
        ("Let me see. " + ONE, False, False, True),
        ("It rains.", False, False, True),
        ("", False, False, True),
        (ONE + "x", False, False, False),
        (ONE.removesuffix("<tool_call|>"), False, False, False),
        ("<|tool_call>call:now{a:1}<tool_call|>", False, False, False),
        ("<|tool_call>call:other{}<tool_call|>", False, False, False),
        ("<|tool_call>call:weather{days:3}<tool_call|>", False, False, False),
        ('<|tool_call>call:weather{city:<|"|><|"|>,days:11}<tool_call|>', False, False, False),
        ('<|tool_call>call:weather{city:<|"|>a<|"|>,units:[<|"|>C<|"|>,<|"|>F<|"|>]}<tool_call|>', True, True, True),
        ('<|tool_call>call:weather{city:<|"|>a<|"|>,more:{k:[1,null,{b:<|"|>c<|"|>}]}}<tool_call|>', True, True, True),
    ],
)
def test_calls(text, one, several, none):
    tools = [WEATHER, NOW]
    languages = (tool_calls(tools, False), tool_calls(tools, True), tool_calls(tools, False, required=False))
    found = [agreed(language, compiled(language), written(text)) for language in languages]
    assert found == [one, several, none]


def test_what_is_spelled_like_a_token_is_text():
    """Strings may have what looks like a marker; outside of them, and for a tokenizer, only the token is one."""
    language = tool_calls([WEATHER], False)
    automaton = compiled(language)
    quote = marked('<|"|>')
    inside = f"{marked('<|tool_call>')}call:weather{{city:{quote}<|tool_call>{quote}}}"
    assert agreed(language, automaton, inside + marked("<tool_call|>"))
    assert not agreed(language, automaton, ONE)
    found = held.automaton(held.LANGUAGES[-1])
    state = found.start
    for id in gemma.ids('<|tool_call>call:weather{city:<|"|>a<|"|>}<tool_call|>'):
        state = int(found.following[found.class_of_id[id], state])
    assert found.accepting[state]
    spelled = gemma.tokenizer().backend_tokenizer.model.token_to_id
    first = int(found.following[found.class_of_id[spelled("<")], found.start])
    assert first == found.dead


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_every_call_of_the_language_is_a_call_by_the_schema(seed):
    """Texts of random tools' calls, drawn from the automaton, are read by the parser and accepted by jsonschema."""
    draw = random.Random(seed)
    names = draw.sample(["city", "days", "b_2", "Zone", "a.b"], draw.randint(1, 3))
    properties = {name: examples.random_schema(draw, 1) for name in names}
    schema = {"type": "object", "properties": properties, "required": [n for n in names if draw.random() < 0.5]}
    try:
        language = tool_calls([tool("first", schema), NOW], parallel=draw.random() < 0.5)
    except ConstraintError:  # a member's name or a value that cannot be written
        return
    automaton = compiled(language)
    for _ in range(5):
        language.check(drawn(automaton, draw))


def drawn(automaton: ByteAutomaton, draw: random.Random) -> str:
    """A text of an automaton: at random, and after some bytes the shortest way to an end."""
    distance = np.where(automaton.accepting, 0, 1 << 20)
    while True:
        nearer = np.minimum(distance, 1 + distance[automaton.following].min(1))
        if (nearer == distance).all():
            break
        distance = nearer
    text, state = bytearray(), automaton.start
    for step in range(5000):
        if automaton.accepting[state] and step > 60:
            break
        ways = [byte for byte in range(256) if distance[automaton.following[state, byte]] < 1 << 20]
        if step > 60:
            ways = [byte for byte in ways if distance[automaton.following[state, byte]] < distance[state]]
        if not ways:
            break
        text.append(draw.choice(ways))
        state = int(automaton.following[state, text[-1]])
    assert automaton.accepting[state]
    return text.decode()


@pytest.mark.parametrize(
    "arguments",
    [{"city": "Genoa"}, {"days": 2, "city": "", "units": []}, {"city": "x", "more": [True, -2.5, {"k": {"l": "m"}}]},
     {"units": ["C", "F"], "city": "é\n", "more": {"Z": [], "a": "b"}}],
)  # fmt: skip
def test_what_the_template_writes_is_of_the_language(arguments):
    """The history of a conversation has calls as the model is to write them."""
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(gemma.TEMPLATE)
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    text = template.render(messages=messages, bos_token="<bos>", add_generation_prompt=False)
    text = text[text.index("<|tool_call>") : text.index("<tool_call|>") + len("<tool_call|>")]
    language = tool_calls([WEATHER], True)
    assert agreed(language, compiled(language), written(text)), text


def test_an_answer_after_a_thought():
    language = after_thought(choice(["yes", "no"]))
    automaton = compiled(language)
    thought = written("<|channel>thought\nIs it?\n<channel|>")
    for text, fine in [
        ("yes", True), (thought + "no", True), (written("<|channel>thought\n<channel|>yes"), True), (thought, False),
        (thought + "maybe", False), (thought + thought + "yes", False), ("<|channel>thought\n<channel|>yes", False),
        (written("<|channel>other\n<channel|>yes"), False), (written("<|channel>thought\nyes"), False),
    ]:  # fmt: skip
        assert agreed(language, automaton, text) is fine, text
    calls = after_thought(tool_calls([NOW], False))
    assert agreed(calls, compiled(calls), thought + written("<|tool_call>call:now{}<tool_call|>"))


@pytest.mark.parametrize(
    "tools, named",
    [
        ([], "no tool to call"),
        ([{"type": "function"}], "expected .*function"),
        ([tool("a b")], "a name of letters"),
        ([NOW, NOW], "two tools 'now'"),
        ([tool("now", {"type": "string"})], "tool 'now' has parameters that are no object"),
        ([tool("now", {"type": "object", "properties": {"a": {"not": {}}}})], "tool 'now': .*properties/a has 'not'"),
        ([tool("now", {"type": "object", "properties": {"a:b": {}}})], "'now': .*'a:b', which"),
        ([tool("now", {"type": "object", "properties": {"a": {"const": "\x01"}}})], "without NUL and U.0001"),
        ([tool("now", {"type": "object", "properties": {"a": 1}})], "'now': "),
    ],
)
def test_tools_that_cannot_be_called_are_refused_by_name(tools, named):
    with pytest.raises(ConstraintError, match=named):
        tool_calls(tools, False)


def test_text_has_no_marks():
    with pytest.raises(ConstraintError, match="U.0001"):
        choice(["a\x01"])
    assert compiled(json_of_schema({"const": "\x01"})).accepts(b'"\\u0001"')
