"""Chat templates that raise, lose the prompt or want parts; tokenizer files that are damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_diffgemma.data import build_tokenizer
from nemo_diffgemma.tokenizer import Text, TokenizerError


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    build_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def with_template(directory: Path, template: str) -> Text:
    (directory / "chat_template.jinja").write_text(template)
    return Text(directory)


PLAIN = "{% for m in messages %}user:{{ m['content'] | trim }};{% endfor %}"
PARTS = "{% for m in messages %}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endfor %}!"


@pytest.mark.parametrize(("template", "rendered"), [(PLAIN, "user:1..4;"), (PARTS, "1..4!")])
def test_a_template_takes_text_or_parts(directory, template, rendered):
    assert (
        with_template(directory, template).encode(" 1..4 ", chat=True)
        == build_tokenizer()(rendered, add_special_tokens=False).input_ids
    )


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ raise_exception('System role not supported') }}", "it raises TemplateError: System role not supported"),
        ("hello", "its result does not have the prompt's text in it"),
        ("{{ messages[0]['content'][:1] }}", "its result does not have the prompt's text in it"),
        ("{% if %}", "it raises TemplateSyntaxError"),
        ("{{ messages[7]['content'] }}", "it raises UndefinedError"),
    ],
)
def test_a_template_that_cannot_take_the_prompt_is_named(directory, template, told):
    text = with_template(directory, template)
    with pytest.raises(TokenizerError) as error:
        text.encode("1..4", chat=True)
    assert "chat_template.jinja" in str(error.value) and told in str(error.value)
    assert "chat=false" in str(error.value)
    assert text.encode("1..4", chat=False) == build_tokenizer()("1..4").input_ids


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{"), ("tokenizer.json", b"[]"), ("tokenizer.json", b"{}"), ("tokenizer.json", b"\xe9"),
        ("tokenizer_config.json", b'{"tokenizer_class": '), ("tokenizer_config.json", b"3"),
        ("tokenizer_config.json", b'{"chat_template": 3, "tokenizer_class": "PreTrainedTokenizerFast"}'),
        ("chat_template.jinja", b"\xe9"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named(directory, name, content):
    (directory / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=name.replace(".", "\\.")):
        Text(directory)


def test_a_truncated_tokenizer_is_named_wherever_it_ends(directory):
    whole = (directory / "tokenizer.json").read_bytes()
    assert json.loads(whole)
    for part in (1, 3, 7):
        (directory / "tokenizer.json").write_bytes(whole[: len(whole) * part // 8])
        with pytest.raises(TokenizerError, match="tokenizer.json is not valid JSON"):
            Text(directory)
