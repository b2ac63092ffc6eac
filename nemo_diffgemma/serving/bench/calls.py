"""What is asked of a server under load: prompts of a file, or random ids, with settings of their own.

A file has a prompt a line. Lines of a .jsonl file are JSON: {"messages": [...]}, a conversation whose answer at the end
is left out, {"prompt": ...} with a text or ids, or a text alone. Lines of any other file are texts.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from nemo_diffgemma.errors import UserError
from nemo_diffgemma.repository import user_path


class Call(NamedTuple):
    """A request: its path, and its body as JSON has it."""

    path: str
    body: dict[str, Any]


@dataclass(frozen=True)
class RandomPrompts:
    """`tokens` random ids each, the first `shared` of them the same in all; no two prompts are alike otherwise."""

    tokens: int
    shared: int
    vocab_size: int
    seed: int

    def __iter__(self) -> Iterator[Call]:
        draw = random.Random(self.seed)
        ids = lambda count: [draw.randrange(self.vocab_size) for _ in range(count)]
        shared = ids(self.shared)
        while True:
            yield Call("/v1/completions", {"prompt": shared + ids(self.tokens - self.shared)})


@dataclass(frozen=True)
class FilePrompts:
    """The prompts of a file one after the other, again and again."""

    prompts: Sequence[Call]

    @classmethod
    def of(cls, path: str) -> FilePrompts:
        """Raises `UserError` for a file that cannot be read, and names the line that is no prompt."""
        file = user_path(path)
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"prompts={path} cannot be read: {error}") from None
        of_line = _of_json if file.suffix == ".jsonl" else _of_prompt
        prompts = [of_line(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
        if not prompts:
            raise UserError(f"prompts={path} has no prompt; write one a line")
        return cls(prompts)

    def __iter__(self) -> Iterator[Call]:
        while True:
            yield from self.prompts


def _of_prompt(prompt: Any, place: str) -> Call:
    is_ids = isinstance(prompt, list) and prompt and all(type(id) is int for id in prompt)
    if not is_ids and not (isinstance(prompt, str) and prompt):
        raise UserError(f"{place}: a prompt is a text or a list of ids")
    return Call("/v1/completions", {"prompt": prompt})


def _of_json(line: str, place: str) -> Call:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{place} is no JSON: {error}") from None
    if not isinstance(row, dict):
        return _of_prompt(row, place)
    if "messages" in row:
        messages = row["messages"]
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise UserError(f"{place}: messages={messages!r}; expected a list of objects with role and content")
        if messages and messages[-1].get("role") == "assistant":
            messages = messages[:-1]
        if not messages:
            raise UserError(f"{place}: the conversation has no message that could be answered")
        return Call("/v1/chat/completions", {"messages": messages})
    if "prompt" not in row:
        raise UserError(f'{place} has the keys {sorted(row)}; expected "messages" or "prompt"')
    return _of_prompt(row["prompt"], place)
