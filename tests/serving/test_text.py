"""Text of prompts and answers in the front end is that of transformers, and streams end where whole answers do."""

from __future__ import annotations

import random
import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_diffgemma.data import build_tokenizer
from nemo_diffgemma.errors import UserError
from nemo_diffgemma.repository import ROOT
from nemo_diffgemma.serving.answer_text import AnswerText
from nemo_diffgemma.serving.text import ServedText, files_of, fingerprint
from nemo_diffgemma.tokenizer import Text
from tests.serving import cases, served


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bytes")
    served.tokenizer().save_pretrained(directory)
    return Text(directory)


@pytest.fixture(scope="module")
def puzzles(tmp_path_factory):
    directory = tmp_path_factory.mktemp("puzzles")
    build_tokenizer().save_pretrained(directory)
    return Text(directory)


CHATS = [
    [{"role": "user", "content": " Grüße, 世界! \n"}],
    [{"role": "system", "content": "a"}, {"role": "user", "content": "<eos>"}, {"role": "assistant", "content": "c"}],
]


@pytest.mark.parametrize("messages", CHATS)
def test_conversations_become_the_ids_that_transformers_makes(text, messages):
    expected = text.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ServedText(files_of(text)).encode_chat(messages) == expected


@given(st.text(max_size=20))
def test_texts_become_the_ids_that_transformers_makes(text, content):
    assert ServedText(files_of(text)).encode(content) == text.encode(content, chat=False)


def test_others_go_on_while_a_long_text_is_read(text):
    """Whoever sends megabytes keeps no event loop from its streams."""
    read, turns, over = ServedText(files_of(text)), [0], threading.Event()

    def others() -> None:
        while not over.wait(0.001):
            turns[0] += 1

    other = threading.Thread(target=others)
    other.start()
    try:
        before = turns[0]
        ids = read.encode("a" * 400_000)
        assert len(ids) == 400_001 and turns[0] - before > 10
    finally:
        over.set()
        other.join()


@given(st.lists(st.integers(0, cases.IDS - 1), max_size=30))
def test_ids_become_the_text_that_transformers_makes(text, ids):
    assert ServedText(files_of(text)).decode(ids) == text.decode(ids)


def test_a_model_without_a_template_takes_one_message_as_it_is(puzzles):
    read = ServedText(files_of(puzzles))
    assert read.encode_chat([{"role": "user", "content": "1..4 ..3."}]) == puzzles.encode("1..4 ..3.", chat=False)
    with pytest.raises(UserError, match="no chat template; send one message"):
        read.encode_chat([{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}])
    with pytest.raises(UserError, match="cannot read the text"):
        read.encode("ü")


def test_what_a_template_refuses_is_the_users_error(text):
    with pytest.raises(UserError, match="no such role"):
        ServedText(files_of(text)).encode_chat([{"role": "robot", "content": "a"}])


def test_variables_of_a_template_may_have_any_name(text):
    """Those of this server's own code too."""
    read, messages = ServedText(files_of(text)), [{"role": "user", "content": "a"}]
    names = ["self", "func", "variables", "context", "__name__", "", "\u00fc", "loop"]
    assert read.encode_chat(messages, dict.fromkeys(names, 1)) == read.encode_chat(messages)


def test_a_fingerprint_tells_tokenizers_apart(text, puzzles):
    found = [fingerprint(files_of(text)), fingerprint(files_of(puzzles)), fingerprint(files_of(Text(None)))]
    assert len(set(found)) == 3 and found[2] == ""


@given(st.data())
def test_pieces_of_an_answer_make_its_text_whatever_the_canvases(text, data):
    """Characters of several tokens, and stop strings, lie across canvases; nothing is told that is not in the end."""
    decode = ServedText(files_of(text)).decode
    ids = data.draw(st.lists(st.integers(0, cases.IDS - 1), max_size=20))
    ids += text.encode(data.draw(st.text(alphabet="añ世🙂b", max_size=12)), chat=False)
    whole = decode(ids)
    draw = random.Random(data.draw(st.integers(0, 1000)))
    stop = []
    if whole and data.draw(st.booleans()):
        begin = draw.randrange(len(whole))
        stop = [whole[begin : begin + draw.randint(1, 4)]]
    answer, told, rest = AnswerText(decode, stop), "", list(ids)
    while rest:
        size = draw.randint(1, 6)
        told += answer.push(rest[:size], is_last=False)
        rest = rest[size:]
        if any(string in decode(answer.tokens) for string in stop):
            break
    told += answer.push([], is_last=True)
    final = decode(answer.tokens)
    ends = [final.index(string) for string in stop if string in final]
    assert told == (final[: min(ends)] if ends else final)


def test_the_front_end_imports_neither_torch_nor_transformers():
    code = "import nemo_diffgemma.serving.front, sys; print([n for n in ('torch', 'transformers') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
