"""Which bytes each token of a tokenizer stands for.

A special token is no text. It stands as its name between two U+0001, which no text of a language may have: so a
language can ask for the token itself, and nothing that is spelled in other tokens is mistaken for it.

Understood are the decoders of Gemma (a space stands as U+2581, bytes without a token as <0xNN>), of byte-level BPE
(GPT-2, Llama 3, Qwen) and of tokens that are simply joined. Others, which add or drop spaces between tokens, would give
another text than the automaton has read: they are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from nemo_diffgemma.serving.constraints.errors import ConstraintError

MARK = "\x01"
_MARKER = re.compile(r"<\|[^<>]*>|<[^<>]*\|>")  # Gemma's, whether its tokenizer calls them special or not
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_UNUSED = re.compile(r"<unused\d+>")  # Gemma's, ordinary words to its tokenizer


def marked(name: str) -> str:
    """How the special token `name` stands in a text."""
    return f"{MARK}{name}{MARK}"


def special_tokens(backend: Any) -> dict[int, str]:
    """The tokens of a `tokenizers.Tokenizer` that are no text, with their names."""
    added = backend.get_added_tokens_decoder().items()
    return {id: token.content for id, token in added if token.special or _MARKER.fullmatch(token.content)}


def bytes_of_tokens(tokenizer: Any) -> dict[int, bytes]:
    """The bytes of every token; unused tokens have none, nor has what would read like a special token's mark.

    `tokenizer` is a fast tokenizer of transformers, or one of `tokenizers`. Raises `ConstraintError` for a decoder of
    another kind.
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    described = json.loads(backend.to_str())
    read, special = byte_reader(described["decoder"]), special_tokens(backend)
    found = {id: marked(name).encode() for id, name in special.items() if not _UNUSED.fullmatch(name)}
    for text, id in backend.get_vocab(with_added_tokens=True).items():
        content = b"" if id in special or _UNUSED.fullmatch(text) else read(text)
        if content and MARK.encode() not in content:
            found[id] = content
    return dict(sorted(found.items()))


def byte_reader(decoder: Mapping[str, Any] | None) -> Callable[[str], bytes]:
    """What `decoder` makes of one token."""
    parts = [] if decoder is None else decoder.get("decoders", [decoder])
    kinds = [part["type"] for part in parts]
    if kinds == ["ByteLevel"]:
        return lambda text: bytes(_byte_level().get(c, -1) for c in text) if _is_byte_level(text) else text.encode()
    if "Fuse" not in kinds or any(kind not in ("Replace", "ByteFallback", "Fuse") for kind in kinds):
        raise ConstraintError(
            f"a tokenizer whose decoder is {'+'.join(kinds) or 'missing'} cannot be constrained; expected ByteLevel, "
            "or Fuse with Replace and ByteFallback, as Gemma's has them"
        )
    replaced = [_replacement(part) for part in parts if part["type"] == "Replace"]
    has_bytes = "ByteFallback" in kinds

    def read(text: str) -> bytes:
        for old, new in replaced:
            text = text.replace(old, new)
        byte = _BYTE.fullmatch(text) if has_bytes else None
        return bytes([int(byte[1], 16)]) if byte else text.encode("utf-8", "ignore")

    return read


def _replacement(part: Mapping[str, Any]) -> tuple[str, str]:
    if "String" not in part["pattern"]:
        raise ConstraintError(f"a tokenizer whose decoder replaces {part['pattern']} cannot be constrained")
    return part["pattern"]["String"], part["content"]


def _is_byte_level(text: str) -> bool:
    return all(c in _byte_level() for c in text)


@cache
def _byte_level() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}
