"""Random constraints, and a small tokenizer of Gemma's kind trained on the spot."""

from __future__ import annotations

import json
import random
from functools import cache
from typing import Any

from nemo_diffgemma.serving.constraints import bytes_of_tokens

PAD, EOS = 0, 1


@cache
def tokenizer() -> Any:
    """BPE with byte fallback, U+2581 for spaces and special tokens, as Gemma's, of about 500 tokens."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    text = ['{"name": "Ann", "age": 31, "tags": ["a", "b"], "ok": true, "none": null}', '{"é": -1.5e10}, "你好"'] * 3
    text += [f"the year {year}-01-0{year % 9} was false" for year in range(1900, 1960)]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    specials = ["<pad>", "<eos>", "<unk>", "<turn|>"]
    made.train_from_iterator(text, trainers.BpeTrainer(vocab_size=500, special_tokens=specials, show_progress=False))
    described = json.loads(made.to_str())
    vocabulary = described["model"]["vocab"]
    for token in bytes_:
        vocabulary[token] = len(vocabulary)
    return Tokenizer.from_str(json.dumps(described))


@cache
def tokens() -> dict[int, bytes]:
    return bytes_of_tokens(tokenizer())


def vocab_size() -> int:
    return max(tokens()) + 5  # a checkpoint may have more ids than its tokenizer


def text_of(ids: list[int]) -> bytes:
    """What stands before the end."""
    ids = ids[: ids.index(EOS)] if EOS in ids else ids
    return b"".join(tokens()[id] for id in ids)


def random_regex(draw: random.Random, depth: int = 3) -> str:
    kind = draw.choice(["text", "set", "many", "or", "both", "both"] if depth else ["text", "set"])
    if kind == "text":
        return draw.choice(["a", "b", "ab", "é", r"\.", " ", '"', "0", r"\\", "x", "你"])
    if kind == "set":
        return draw.choice(["[ab]", "[^a-y0]", r"\d", r"\w", r"\s", ".", r"[\d.]", r"[^\W\d]", "[x-z]", r"\S"])
    if kind == "many":
        many = draw.choice(["*", "+", "?", "{2}", "{1,3}", "{0,2}", "{2,}", "*?", "??", "{1,2}?"])
        return f"(?:{random_regex(draw, depth - 1)}){many}"
    parts = [random_regex(draw, depth - 1) for _ in range(draw.randint(2, 3))]
    return f"(?:{'|'.join(parts)})" if kind == "or" else "".join(parts)


def random_schema(draw: random.Random, depth: int = 3) -> Any:
    scalars = [_string, _integer, _number, lambda draw: {"type": draw.choice(["boolean", "null"])}, _listed]
    nested = [_object, _object, _array, lambda draw, depth: {"anyOf": _several(draw, depth)}]
    if depth and draw.random() < 0.75:
        return draw.choice(nested)(draw, depth - 1)
    return draw.choice(scalars)(draw)


def _several(draw: random.Random, depth: int) -> list[Any]:
    return [random_schema(draw, depth) for _ in range(draw.randint(1, 3))]


def _string(draw: random.Random) -> dict[str, Any]:
    more: list[dict[str, Any]] = [{}, {"minLength": 2}, {"maxLength": 3}, {"minLength": 1, "maxLength": 4}]
    more += [{"format": name} for name in ("date", "time", "uuid", "email", "ipv4", "date-time")]
    more += [{"pattern": pattern} for pattern in ('^[a-c"]+$', r"^\d{3}-\d{2}$", "b", r"^x|\\$", r"^[^a]?\n$")]
    return {"type": "string", **draw.choice(more)}


def _integer(draw: random.Random) -> dict[str, Any]:
    low = draw.randint(-120, 1200)
    more = [{}, {"minimum": low}, {"exclusiveMaximum": low}, {"minimum": low, "maximum": low + draw.randint(0, 900)}]
    return {"type": "integer", **draw.choice(more)}


def _number(draw: random.Random) -> dict[str, Any]:
    low = draw.randint(-12, 12)
    more = [
        {},
        {"minimum": low},
        {"exclusiveMaximum": low},
        {"exclusiveMinimum": low, "maximum": low + draw.randint(1, 9)},
    ]
    return {"type": "number", **draw.choice(more)}


def _listed(draw: random.Random) -> dict[str, Any]:
    values: list[Any] = ["a", "é\n", 3, 2.5, True, None, [1, "b"], {"k": []}]
    return draw.choice([{"enum": draw.sample(values, 3)}, {"const": draw.choice(values)}])


def _object(draw: random.Random, depth: int) -> dict[str, Any]:
    if draw.random() < 0.2:
        return {"type": "object", "additionalProperties": random_schema(draw, depth)}
    names = draw.sample(["name", "age", "tags", 'a"b', "é", "x y"], draw.randint(1, 4))
    schema: dict[str, Any] = {"type": "object", "properties": {name: random_schema(draw, depth) for name in names}}
    schema["required"] = [name for name in names if draw.random() < 0.5]
    if draw.random() < 0.5:
        schema["additionalProperties"] = False
    return schema


def _array(draw: random.Random, depth: int) -> dict[str, Any]:
    if draw.random() < 0.2:
        items = _several(draw, depth)
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    more: list[dict[str, int]] = [{}, {"minItems": 1}, {"maxItems": 2}, {"minItems": 1, "maxItems": 3}]
    return {"type": "array", "items": random_schema(draw, depth), **draw.choice(more)}
