"""Which tokens are answers, through templates of every kind; and that their context is what generation sees."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_diffgemma.data.bad_rows import RowError
from nemo_diffgemma.data.chat_template import OPENED, REWRITTEN, ChatTemplate, Rendering
from nemo_diffgemma.data.conversations import Conversation
from tests.data import templates

EOS, TURN = 1, 6
ENDS = {EOS, TURN}

words = st.text("abc xyz,.é\n5", min_size=1, max_size=12).filter(str.strip)
contents = st.one_of(words, st.sampled_from(["the quick brown fox", " 7 + 5?", "\nnew line", "日本語 ☃"]))


@st.composite
def conversations(draw, system: bool = True) -> Conversation:
    """Turns of user and assistant, some behind a system message."""
    messages = []
    if system and draw(st.booleans()):
        messages.append({"role": "system", "content": draw(contents)})
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(contents)})
        messages.append({"role": "assistant", "content": draw(contents)})
    return Conversation(messages)


@functools.cache
def template(text: str) -> ChatTemplate:
    return ChatTemplate(templates.tokenizer(text), ENDS)


def prompt(text: str, conversation: Conversation, messages: int) -> list[int]:
    """What generation sees before message number `messages`."""
    made = templates.tokenizer(text)
    return made.apply_chat_template(conversation.messages[:messages], add_generation_prompt=True, return_dict=False)


def texts(made: ChatTemplate, encoded) -> list[str]:
    return [made.tokenizer.decode(encoded.tokens[start:end]) for start, end in encoded.answers]


@pytest.mark.parametrize("text", [templates.PLAIN, templates.MARKED, templates.MARKED_WITHOUT_END, templates.PARTS])
@settings(max_examples=25)
@given(conversation=conversations())
def test_every_answer_is_found_behind_what_generation_sees(text, conversation):
    encoded = template(text).encode(conversation)
    answers = conversation.answers
    assert texts(template(text), encoded) == [conversation.messages[i]["content"].strip() + "<turn|>" for i in answers]
    for index, (start, _) in zip(answers, encoded.answers, strict=True):
        if text != templates.PARTS:
            assert encoded.tokens[:start] == prompt(text, conversation, index)
    assert encoded.answers[-1][1] == len(encoded.tokens) and encoded.note == ""


@pytest.mark.parametrize("text", [templates.PLAIN, templates.OPENED, templates.REWRITING, templates.BARE])
@settings(max_examples=15)
@given(conversation=conversations())
def test_tokens_of_prefixes_are_those_of_their_texts(text, conversation):
    """Though what stands between special tokens is tokenised once for all of them."""
    made = template(text)
    rendering = Rendering(made, conversation)
    for messages in range(1, len(conversation.messages) + 1):
        for generate in (False, True):
            whole = made.tokenizer(rendering.text(messages, generate), add_special_tokens=False).input_ids
            assert rendering.ids(messages, generate) == whole


def test_each_text_of_a_long_conversation_is_tokenised_once(monkeypatch):
    made, seen = ChatTemplate(templates.tokenizer(templates.PLAIN), ENDS), []
    ids = made.ids
    monkeypatch.setattr(made, "ids", lambda text: seen.append(len(text)) or ids(text))
    turns = [{"role": role, "content": f"fox {n} {role}"} for n in range(40) for role in ("user", "assistant")]
    assert len(made.encode(Conversation(turns)).answers) == 40
    assert sum(seen) < 3 * len(made.render(Conversation(turns)))


@settings(max_examples=25)
@given(conversation=conversations())
def test_generation_may_open_a_turn_with_more_than_the_history_keeps(conversation):
    """The last answer has all of it before it; those before the last have what the history has."""
    made = template(templates.OPENED)
    encoded, answers = made.encode(conversation), conversation.answers
    assert texts(made, encoded) == [conversation.messages[i]["content"].strip() + "<turn|>" for i in answers]
    assert encoded.tokens[: encoded.answers[-1][0]] == prompt(templates.OPENED, conversation, answers[-1])
    assert encoded.note == (OPENED if len(answers) > 1 else "")
    for index, (start, _) in zip(answers[:-1], encoded.answers, strict=False):
        seen = prompt(templates.OPENED, conversation, index)
        assert encoded.tokens[:start] == seen[:start] and made.tokenizer.decode(seen[start:]) == "<mask>thought\n<mask>"


@settings(max_examples=25)
@given(conversation=conversations())
def test_where_earlier_turns_are_rewritten_the_last_alone_is_supervised(conversation):
    made = template(templates.REWRITING)
    encoded, last = made.encode(conversation), conversation.answers[-1]
    assert texts(made, encoded) == [conversation.messages[last]["content"].strip() + "<turn|>"]
    assert encoded.note == (REWRITTEN if len(conversation.answers) > 1 else "")


def test_the_thoughts_of_earlier_turns_are_rewritten_away():
    made = template(templates.OPENED)
    think = {"role": "assistant", "content": "12", "reasoning_content": "7 + 5"}
    one = Conversation([{"role": "user", "content": "what is 7 + 5?"}, think])
    encoded = made.encode(one)
    assert texts(made, encoded) == ["<mask>thought\n7 + 5<mask>12<turn|>"] and encoded.note == ""
    two = Conversation([*one.messages, {"role": "user", "content": "and?"}, think])
    encoded = made.encode(two)
    assert texts(made, encoded) == ["<mask>thought\n7 + 5<mask>12<turn|>"] and encoded.note == REWRITTEN
    assert made.tokenizer.decode(encoded.tokens).count("7 + 5<mask>") == 1


def test_a_call_of_a_tool_and_what_is_said_after_its_result_are_two_answers():
    made = template(templates.OPENED)
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 7, "b": 5}}}
    conversation = Conversation(
        [
            {"role": "user", "content": "what is 7 + 5?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "12"},
            {"role": "assistant", "content": "12, of course"},
        ]
    )
    encoded = made.encode(conversation)
    first, second = texts(made, encoded)
    assert first == '<mask>add{"a": 7, "b": 5}<mask>' and second == "12, of course<turn|>"
    stops = ChatTemplate(templates.tokenizer(templates.OPENED), {*ENDS, 3})  # <unk> begins the tool's response here
    assert texts(stops, stops.encode(conversation))[0] == first + "<unk>"


@settings(max_examples=40)
@given(conversation=conversations(system=False))
def test_without_special_tokens_the_last_answer_is_behind_the_tokens_of_generation(conversation):
    """The tokens of "assistant: " and "fox" are other tokens than "assistant: fox"; generation has the former."""
    made, last = template(templates.BARE), conversation.answers[-1]
    encoded = made.encode(conversation)
    start, end = encoded.answers[-1]
    assert encoded.tokens[:start] == prompt(templates.BARE, conversation, last)
    assert made.tokenizer.decode(encoded.tokens[start:end]) == conversation.messages[last]["content"] + "\n"


def test_messages_behind_the_last_answer_are_left_out():
    conversation = Conversation(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "xyz"}]
    )
    encoded = template(templates.PLAIN).encode(conversation)
    assert template(templates.PLAIN).tokenizer.decode(encoded.tokens[-2:]) == "b<turn|>"


def test_a_greeting_is_supervised_where_there_is_something_to_generate_from():
    greeting = Conversation(
        [
            {"role": "assistant", "content": "a fox"},
            {"role": "user", "content": "b"},
            {"role": "assistant", "content": "c"},
        ]
    )
    assert texts(template(templates.PLAIN), template(templates.PLAIN).encode(greeting)) == ["a fox<turn|>", "c<turn|>"]
    wants_user = "{{ raise_exception('no user') if not messages | selectattr('role', 'eq', 'user') | list }}"
    wants_user += templates.PLAIN
    encoded = template(wants_user).encode(Conversation([{"role": "system", "content": "x"}, *greeting.messages]))
    assert texts(template(wants_user), encoded) == ["c<turn|>"] and encoded.note == ""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (templates.NO_SYSTEM, "refused by the template"),
        (templates.DROPS, "dropped by the template"),
        (templates.MARKS_NOTHING, "no supervised token"),
    ],
    ids=["refuses", "drops", "marks nothing"],
)
def test_a_template_that_cannot_show_a_conversation_makes_a_bad_row(text, reason):
    messages = [{"role": "system", "content": "be short"}, {"role": "user", "content": "a"}]
    with pytest.raises(RowError) as raised:
        template(text).encode(Conversation([*messages, {"role": "assistant", "content": "b"}]))
    assert raised.value.reason == reason
