"""Languages: what they accept, what they refuse by name, and that an independent check agrees."""

from __future__ import annotations

import json
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_diffgemma.serving.constraints import (
    ConstraintError,
    ConstraintViolation,
    bytes_of_tokens,
    choice,
    json_object,
    json_of_schema,
    numbers,
    regex,
)
from nemo_diffgemma.serving.constraints.byte_automaton import ByteAutomaton, byte_automaton
from nemo_diffgemma.serving.constraints.patterns import translated
from tests.serving import examples

DATE = {"type": "string", "format": "date"}
OLDER = "http://json-schema.org/draft-07/schema#"


def compiled(expression: str) -> ByteAutomaton:
    return byte_automaton(expression, most_states=20_000)


@settings(max_examples=80)
@given(seed=st.integers(0, 2**32), texts=st.lists(st.text(alphabet='abxz0 .é"\\你\n', max_size=6), max_size=30))
def test_a_pattern_accepts_what_python_accepts(seed, texts):
    pattern = examples.random_regex(random.Random(seed))
    automaton = compiled(translated(pattern))
    for text in texts:
        assert automaton.accepts(text.encode()) == bool(re.fullmatch(pattern, text)), (pattern, text)


@pytest.mark.parametrize("pattern", ["a|ab", "a??b*", "(?:^a|b$)", "^(?:a|ab)$", r"b.{0,20}b", r"\D+", r"[^\s]*"])
def test_known_traps_of_the_engine_below(pattern):
    automaton = compiled(translated(pattern))
    plain = pattern.replace("^", "", 1).replace("$", "") if pattern.startswith("(?:^") else pattern
    for text in ["", "a", "ab", "b", "bb", "b" + "a" * 20 + "b", "b" + "a" * 21 + "b", "٣", "é"]:
        assert automaton.accepts(text.encode()) == bool(re.fullmatch(plain, text)), text


def test_classes_are_ascii():
    assert not compiled(translated(r"\d")).accepts("٣".encode())
    assert not compiled(translated(r"\w")).accepts("é".encode())


@pytest.mark.parametrize("pattern", [r"[\s\S]*", r"[\D\d]*", r"[a\w\W]*", r"(?:[\S\s]{1,9})?"])
def test_a_class_and_its_complement_are_all_characters(pattern):
    automaton = compiled(translated(pattern))
    for text in ("é", "\u00a0", "\u0085", "٣", "\n", "a\u2003b"):
        assert automaton.accepts(text.encode()) and re.fullmatch(pattern, text)


@pytest.mark.parametrize(
    "pattern, named",
    [(r"(a)\1", "back-reference"), ("a(?=b)", "look-around"), ("(?i)a", "inline flag"), ("a^b", "anchor"),
     (r"\ba", "anchor"), ("(?>a)", "atomic"), ("a++", "possessive"), ("(", "no regular expression"),
     (r"\x00", "empty set"),
     ("(" * 9000 + "a" + ")" * 9000, "groups within groups"), ("a" * 70_000, "70000 characters"),
     (r"\W" * 30_000, "too many classes")],
)  # fmt: skip
def test_what_is_no_regular_language_is_refused_by_name(pattern, named):
    with pytest.raises(ConstraintError, match=named):
        regex(pattern)


@settings(max_examples=60)
@given(low=st.integers(-1200, 1200), width=st.integers(0, 1500), probes=st.lists(st.integers(-4000, 4000), max_size=40))
def test_integers_between_bounds(low, width, probes):
    automaton = compiled(numbers.integers(low, low + width))
    for probe in [*probes, low - 1, low, low + width, low + width + 1]:
        assert automaton.accepts(str(probe).encode()) == (low <= probe <= low + width), probe
    assert not automaton.accepts(b"007") and not automaton.accepts(b"")
    open_ended = compiled(numbers.integers(low, None))
    assert all(open_ended.accepts(str(p).encode()) == (p >= low) for p in probes)


@settings(max_examples=60)
@given(
    low=st.one_of(st.none(), st.integers(-30, 30)),
    width=st.one_of(st.none(), st.integers(0, 30)),
    above=st.booleans(),
    below=st.booleans(),
    probes=st.lists(st.decimals(-70, 70, places=2), max_size=40),
)
def test_numbers_between_whole_bounds(low, width, above, below, probes):
    high = None if width is None else (low or 0) + width
    above, below = above and low is not None, below and high is not None
    written = numbers.numbers(low, high, above, below)
    automaton = compiled(written) if written is not None else None
    edges = [bound for bound in (low, high) if bound is not None]
    for probe in [*probes, *edges]:
        inside = (low is None or (probe > low if above else probe >= low)) and (
            high is None or (probe < high if below else probe <= high)
        )
        text = f"{probe:f}"
        accepted = automaton is not None and automaton.accepts(text.encode())
        assert accepted == inside or (inside and float(text) == 0 and text.startswith("-")), (text, written)


@pytest.mark.parametrize(
    "schema, named",
    [({"type": "integer", "multipleOf": 3}, "'multipleOf'"), ({"type": "array", "uniqueItems": True}, "'uniqueItems'"),
     ({"patternProperties": {"a": {}}}, "'patternProperties'"), ({"not": {}}, "'not'"), ({"if": {}}, "'if'"),
     ({"type": "string", "format": "iri"}, "iri"), ({"type": "string", "pattern": "a", "maxLength": 3}, "pattern"),
     ({"type": "number", "minimum": 0.5}, "minimum"), ({"$ref": "http://x/y"}, "http://x/y"), ({"$ref": "#/a"}, "#/a"),
     ({"allOf": [{"type": "string"}, {"minLength": 1}]}, "allOf"), ({"type": "thing"}, "thing"),
     ({"oneOf": [{"type": "string"}, {"minLength": 1}]}, "oneOf"), ({"anyOf": [True], "type": "null"}, "'type'"),
     ({"type": "object", "minProperties": 2}, "minProperties"),
     ({"enum": ["a" * 40], "pattern": "^(a+)+b$"}, "'pattern' beside 'enum'"), ({"const": 1, "$ref": "#"}, "'\\$ref'"),
     ({"enum": [{"a": "a" * 40}], "properties": {"a": {"pattern": "^(a+)+b$"}}}, "'properties' beside"),
     ({"oneOf": [{"type": "string"}] * 201}, "201 schemas"),
     ({"properties": {"a": {"foo": 1}}}, "properties/a has 'foo'"),
     ({"type": "string", "minLength": -1}, "minLength"), ({"items": [{}]}, "items"), (3, "int"),
     ({"required": "a"}, "required"), ({"enum": ["a" * 40 + "!"], "pattern": "(a+)+$"}, "'pattern' beside 'enum'"),
     ({"const": [1], "items": {"pattern": "(a+)+$"}}, "'items' beside"),
     ({"enum": ["a"], "maxLength": "x"}, "maxLength is no"), ({"const": 1, "type": "thing"}, "type is no"),
     ({"type": "object", "required": ["a"], "additionalProperties": False}, "impossible"),
     ({"oneOf": [{"type": "object", "properties": {"k": {"const": n}}, "required": ["k"]} for n in (1, 1.0)]}, "oneOf"),
     ({"oneOf": [{"type": "object", "properties": {"k": {"const": n}}} for n in (1, 2)]}, "oneOf"),
     ({"oneOf": [{"type": "number"}, {"type": ["integer", "null"]}]}, "oneOf"),
     ({"$schema": OLDER, "prefixItems": [{"const": 1}], "items": {"type": "null"}}, "'prefixItems'.*dialect"),
     ({"$schema": "http://json-schema.org/draft-03/schema#", "format": "time"}, "draft 3"),
     ({"$ref": f"#/$defs/{'a' * 2000}"}, "expected a place"),
     ({"$ref": "#"}, "impossible"), ({"type": "string", "pattern": "(?=a)"}, "look-around"),
     ({"$defs": {n: {"anyOf": [{"$ref": f"#/$defs/{m}"} for m in "abcdef"]} for n in "abcdef"}, "$ref": "#/$defs/a"},
      "schemas|impossible")],
)  # fmt: skip
def test_keywords_that_cannot_be_expressed_are_refused_by_name(schema, named):
    with pytest.raises(ConstraintError, match=named):
        json_of_schema(schema)


@pytest.mark.parametrize(
    "schema, inside, outside",
    [
        ({"type": "object"}, ["{}", ' {"a":\n[1, {"b": null}]} '], ["[]", '{"a": 1,}', ""]),
        ({"type": ["string", "null"], "maxLength": 2}, ['"é你"', '"\\n\\""', "null"], ['"abc"', "1"]),
        ({"type": "string"}, ['"\\u00e9"', '"\\ud83d\\ude00"'], ['"\\ud83d"', '"\n"', '"\\x"']),
        ({"pattern": '^[a"]+$'}, ['"a\\""'], ['"a""', '""', '"b"']),
        ({"pattern": "b"}, ['"abc"', '"\\u00e9b"'.replace("\\u00e9", "é")], ['"ac"']),
        ({"format": "date"}, ['"2024-02-29"', '"1999-12-31"'], ['"2023-02-29"', '"2024-13-01"', '"0000-01-01"']),
        ({"type": "array", "prefixItems": [{"const": 1}, {"type": "null"}]}, ["[1, null]"], ["[1]", "[1, null, 2]"]),
        ({"oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}],
          "$defs": {k: {"type": "object", "properties": {"k": {"const": k}}, "required": ["k"]} for k in "ab"}},
         ['{"k": "a"}', '{"k": "b"}'], ['{"k": "c"}', "{}"]),
        ({"properties": {"next": {"$ref": "#"}, "v": {"type": "integer"}}},
         ["{}", '{"next": {"next": {"v": 1}}}', '{"v": -2}'], ['{"v": 1.5}', '{"next": 1}']),
        ({"enum": [1, "1", None, "long"], "maxLength": 3, "type": ["string", "null"]},
         ['"1"', "null"], ["1", '"long"']),
        ({"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 1},
         ["{}", '{"a": true}'], ['{"a": true, "b": false}', '{"a": 1}']),
        ({"items": False}, ["[]"], ["[1]"]),
        ({"$defs": {"a b": {"const": 1}, "a%20b": {"const": 2}, "c/d~": {"const": 3}},
          "anyOf": [{"$ref": "#/$defs/a%20b"}, {"$ref": "#/$defs/c~1d~0"}]}, ["1", "3"], ["2"]),
        ({"$schema": "http://json-schema.org/draft-04/schema#", "type": "integer", "enum": [1, 2.0]}, ["1"], ["2.0"]),
        ({"oneOf": [{"type": "object", "properties": {"a": {"enum": [n, [n]]}, "b": {"const": n // 2}},
                     "required": ["a", "b"]} for n in range(4)]},
         ['{"a": 3, "b": 1}', '{"a": [2], "b": 1}'], ['{"a": 3, "b": 0}']),
        ({"oneOf": [{"type": "object", "properties": {"k": {"const": v}}, "required": ["k"]} for v in (1, True, "1")]},
         ['{"k": true}', '{"k": "1"}'], ['{"k": false}']),
    ],
    ids=str,
)  # fmt: skip
def test_json_of_a_schema(schema, inside, outside):
    language = json_of_schema(schema)
    automaton = compiled(language.expression)
    for text in inside:
        assert automaton.accepts(text.encode()), text
        language.check(text)
    for text in outside:
        assert not automaton.accepts(text.encode()), text


def test_the_check_is_independent_of_the_automaton():
    language = json_of_schema({"type": "object", "properties": {"a": DATE}, "required": ["a"]})
    for text in ['{"a": "2023-02-30"}', "{}", '{"a": 1}', "nonsense", '{"a": NaN}']:
        with pytest.raises(ConstraintViolation):
            language.check(text)
    for language, text in ((regex("a+"), "b"), (choice(["x", "y"]), "z"), (json_object(), "[]")):
        with pytest.raises(ConstraintViolation):
            language.check(text)


def test_choice():
    automaton = compiled(choice(["a", "ab", "(.*)", "é\n"]).expression)
    assert [automaton.accepts(t.encode()) for t in ("a", "ab", "(.*)", "é\n", "x", "")] == [True] * 4 + [False] * 2
    for wrong in ([], "ab", [1], ["\x00"], ["\ud800"]):
        with pytest.raises(ConstraintError, match="choice"):
            choice(wrong)


def test_tokens_are_the_bytes_that_the_tokenizer_decodes():
    tokenizer, tokens = examples.tokenizer(), examples.tokens()
    text = '{"name": "Ann", "é": "你好 \U0001f600"}, the year 1999'
    ids = tokenizer.encode(text).ids
    assert b"".join(tokens[id] for id in ids).decode() == text == tokenizer.decode(ids)
    assert tokens[tokenizer.token_to_id("<turn|>")] == b"\x01<turn|>\x01", "no text, but a token that can be asked for"
    assert tokenizer.token_to_id("<0x01>") not in tokens
    assert tokens[tokenizer.token_to_id("<0x0A>")] == b"\n" and tokens[tokenizer.token_to_id("▁")] == b" "


def test_tokens_of_other_tokenizers():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from nemo_diffgemma.data.sudoku_tokenizer import build_tokenizer

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(["é you you"], trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    tokens = bytes_of_tokens(made)
    assert b"".join(tokens[id] for id in made.encode("é you\n").ids) == "é you\n".encode()
    assert bytes_of_tokens(build_tokenizer())[4] == b"."
    for decoder in (decoders.WordPiece(), decoders.Metaspace(), None):
        made.decoder = decoder
        with pytest.raises(ConstraintError, match="decoder"):
            bytes_of_tokens(made)


def test_random_schemas_are_translated_and_json_dumps_agrees():
    accepted = 0
    for seed in range(60):
        schema = examples.random_schema(random.Random(seed), depth=1)
        automaton = compiled(json_of_schema(schema).expression)
        for value in ("a", "ab", 3, -7, 2.5, None, True, [], [True], {}, {"name": "a"}, {"k": []}, [1, "b"]):
            text = json.dumps(value)
            if automaton.accepts(text.encode()):
                accepted += 1
                json_of_schema(schema).check(text)
    assert accepted > 30
