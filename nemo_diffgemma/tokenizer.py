"""Text and token ids: the tokenizer beside a checkpoint, if it has one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_diffgemma.errors import UserError
from nemo_diffgemma.json_files import read_object

_JSON_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
               "chat_template.json", "config.json")  # fmt: skip
_RAW = "chat=false gives the prompt to the model as it is"


class TokenizerError(UserError):
    """Text that a tokenizer cannot read, or a tokenizer whose files cannot be used."""


class Text:
    """Prompts into ids and ids into text. `directory` is where a checkpoint keeps its tokenizer, or None.

    Raises `TokenizerError` for damaged files.
    """

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory
        self.tokenizer: Any = None
        if directory is not None and (directory / "tokenizer.json").is_file():
            self.tokenizer = _load(directory)

    def encode(self, prompt: str, chat: bool) -> list[int]:
        """Ids of a prompt, in the chat template where there is one and `chat` is true.

        Raises `TokenizerError` without a tokenizer, for characters that it does not know, and for a template that
        raises or leaves the prompt out.
        """
        if self.tokenizer is None:
            raise TokenizerError(
                f"{self.directory or 'this checkpoint'} has no tokenizer.json, so it cannot read prompt=...; give "
                "token ids: prompt_ids=[2,10,11]"
            )
        turn = self._turn(prompt) if chat and self.tokenizer.chat_template else None
        try:
            prompt.encode("utf-8")
            if turn is not None:
                return self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
            return self.tokenizer(prompt).input_ids
        except Exception as error:  # the tokenizers library raises nothing more special
            raise TokenizerError(
                f"the tokenizer of this checkpoint cannot read prompt={prompt!r} ({error}); are all its characters in "
                f"the vocabulary? {self._vocabulary()}"
            ) from None

    def _turn(self, prompt: str) -> list[dict[str, Any]]:
        """The user's turn as the chat template wants it: its content as text, or as parts."""
        problem = "its result does not have the prompt's text in it"
        for content in (prompt, [{"type": "text", "text": prompt}]):
            turn = [{"role": "user", "content": content}]
            try:
                rendered = self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
            except Exception as error:  # a template is a program, and raises what it likes
                problem = f"it raises {type(error).__name__}: {error}"
                continue
            prints_parts = content is not prompt and "'type':" in rendered.replace(prompt, "")  # as Python writes them
            if _without_spaces(prompt) in _without_spaces(rendered) and not prints_parts:
                return turn
        raise TokenizerError(
            f"the chat template of {self.directory} ({self._template_file()}) cannot take prompt={prompt!r}: "
            f"{problem}; {_RAW}"
        )

    def _template_file(self) -> str:
        assert self.directory is not None
        names = ("chat_template.jinja", "chat_template.json")
        return next((name for name in names if (self.directory / name).is_file()), "tokenizer_config.json")

    def decode(self, ids: Sequence[int]) -> str | None:
        """Text without special tokens; None without a tokenizer."""
        return None if self.tokenizer is None else self.tokenizer.decode(ids, skip_special_tokens=True)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """One piece of text a token, on one line; the id itself without a tokenizer."""
        if self.tokenizer is None:
            return [str(id) for id in ids]
        return [self.tokenizer.decode([id]).replace("\n", "↵") for id in ids]

    def _vocabulary(self) -> str:
        if len(self.tokenizer) > 1000:
            return ""
        known = sorted(token for token in self.tokenizer.get_vocab() if len(token) == 1)
        return f"They are: {''.join(known)}"


def _without_spaces(text: str) -> str:
    """Templates strip a prompt, and wrap it; they do not change its words."""
    return "".join(text.split())


def _load(directory: Path) -> Any:
    """The tokenizer of a directory. Raises `TokenizerError` naming the file that is damaged."""
    _check_files(directory)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
        len(tokenizer)
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # the Rust half panics with a BaseException
        problem = " ".join(str(error).split())[:300] or type(error).__name__
        raise TokenizerError(
            f"the tokenizer in {directory} cannot be read ({problem}); copy tokenizer.json and tokenizer_config.json "
            "again from the checkpoint"
        ) from None
    template = tokenizer.chat_template
    if template is not None and not isinstance(template, str | dict):
        raise TokenizerError(f"{directory}/tokenizer_config.json: chat_template is {template!r}; expected text")
    return tokenizer


def _check_files(directory: Path) -> None:
    for file in map(directory.joinpath, _JSON_FILES):
        if file.is_file():
            read_object(file, TokenizerError)
    template = directory / "chat_template.jinja"
    try:
        if template.is_file():
            template.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{template} is not UTF-8 text ({error}); copy it again from the checkpoint") from None
