"""Log-probabilities of settled tokens in OpenAI's two forms.

They are those of the last step of a token's canvas, untempered: what the network made of the place with all others
around it, on both sides.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from nemo_diffgemma.serving.request import Scores
from nemo_diffgemma.serving.text import ServedText

LOWEST = -9999.0  # JSON has no infinity; OpenAI's value for what is all but impossible


def chat_form(text: ServedText | None, tokens: Sequence[int], scores: Sequence[Scores]) -> dict[str, Any]:
    """Of /v1/chat/completions: an entry a token, with the most probable ones at its place."""
    return {"content": entries(text, tokens, scores), "refusal": None}


def entries(text: ServedText | None, tokens: Sequence[int], scores: Sequence[Scores]) -> list[dict[str, Any]]:
    return [
        {**_entry(text, id, score.logprob), "top_logprobs": [_entry(text, *one) for one in score.top]}
        for id, score in zip(tokens, scores, strict=True)
    ]


def completion_form(
    text: ServedText | None, before: Sequence[int], tokens: Sequence[int], scores: Sequence[Scores]
) -> dict[str, Any]:
    """Of /v1/completions: a list for each thing that is told. `before` are the answer's tokens that were told before.

    `text_offset` counts characters from the beginning of the answer.
    """
    told = [_token(text, id) for id in [*before, *tokens]]
    offsets = _offsets([content or b"" for _, content in told])
    return {
        "tokens": [name for name, _ in told[len(before) :]],
        "token_logprobs": [_finite(score.logprob) for score in scores],
        "top_logprobs": [{_token(text, id)[0]: _finite(value) for id, value in score.top} for score in scores],
        "text_offset": offsets[len(before) :],
    }


def _offsets(contents: Sequence[bytes]) -> list[int]:
    """Where the text of each token begins: at the character that some of its bytes complete, if they do."""
    reader, characters, offsets = codecs.getincrementaldecoder("utf-8")("replace"), 0, []
    for content in contents:
        begun = reader.getstate()[0]
        new = reader.decode(content)
        is_broken = begun and new.startswith("\ufffd")  # what was begun before stays incomplete: one character
        offsets.append(characters + 1 if is_broken else characters)
        characters += len(new)
    return offsets


def _entry(text: ServedText | None, id: int, logprob: float) -> dict[str, Any]:
    name, content = _token(text, id)
    return {"token": name, "logprob": _finite(logprob), "bytes": None if content is None else list(content)}


def _token(text: ServedText | None, id: int) -> tuple[str, bytes | None]:
    return (f"token_id:{id}", None) if text is None else text.token(id)


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)
