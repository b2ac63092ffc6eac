"""A JSON schema -> a regular expression whose every string is JSON, or another notation, that the schema accepts.

The language is a part of what the schema accepts: members stand in the order of `properties`, no others are added, and
what nests without end (a recursive `$ref`, any JSON) nests to a fixed depth. Keywords that a regular language cannot
express are refused by name, never ignored; so are unknown ones. JSON whitespace may stand wherever JSON allows it.

None instead of a regular expression is the empty language (`false`, or a `$ref` nested too deeply): what needs it is
empty as well, what may do without it does.
"""

from __future__ import annotations

import functools
import operator
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

from nemo_diffgemma.json_files import brief
from nemo_diffgemma.serving.constraints import numbers
from nemo_diffgemma.serving.constraints.errors import ConstraintError
from nemo_diffgemma.serving.constraints.formats import FORMATS
from nemo_diffgemma.serving.constraints.json_values import JSON
from nemo_diffgemma.serving.constraints.schema_check import MOST_SCHEMAS, check, dialect_of
from nemo_diffgemma.serving.constraints.values import Values

Schema = Mapping[str, Any] | bool
Place = tuple[str | int, ...]

NESTING = 3  # how often a $ref may stand within itself
LONGEST = 1_000_000  # characters of the expression: schemas that refer to each other may grow without end
LONGEST_REFERENCE = 1000  # characters of a $ref
MOST_BRANCHES = 200  # of a oneOf

_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
_ANNOTATIONS = set("title description default examples deprecated readOnly writeOnly $comment $schema $id $defs "
                   "definitions discriminator".split())  # fmt: skip
_OF_TYPE = {
    "object": set("properties required additionalProperties minProperties maxProperties".split()),
    "array": set("items prefixItems minItems maxItems uniqueItems".split()),
    "string": set("minLength maxLength pattern format".split()),
    "number": set("minimum maximum exclusiveMinimum exclusiveMaximum".split()),
}
_OF_TYPE["integer"] = _OF_TYPE["number"]
_COMBINING = ("$ref", "anyOf", "oneOf", "allOf", "enum", "const")
_BESIDE_LISTED = _ANNOTATIONS | {"enum", "const", "type", "minLength", "maxLength"} | _OF_TYPE["number"]
_SCHEMA = ("items", "additionalProperties")  # the value is a schema; of the next ones it holds schemas
_SCHEMAS = ("$defs", "definitions", "properties", "prefixItems", "anyOf", "oneOf", "allOf")
_KNOWN = _ANNOTATIONS | {"type", *_COMBINING}.union(*_OF_TYPE.values())


def translated(schema: Schema, values: Values = JSON) -> str:
    """The regular expression, in Rust's dialect; `values` is how values are written.

    Raises `ConstraintError` naming a keyword and where it stands.
    """
    if not isinstance(schema, Mapping | bool):
        raise ConstraintError(f"a JSON schema of type {type(schema).__name__}; expected an object, true or false")
    try:
        check(schema)
        written = _Translator(schema, values).value(schema, ())
    except RecursionError:
        raise ConstraintError("the schema nests hundreds of schemas; expected at most a few dozen") from None
    if written is None:
        raise ConstraintError("no JSON text of finite depth satisfies the schema: something required is impossible")
    return f"{values.space}{written}{values.space}"


def problem_of(value: Any, schema: Schema) -> str:
    """What `jsonschema` says against a value, or nothing."""
    import jsonschema

    kind = dialect_of(schema)
    if isinstance(schema, Mapping):  # every $ref is a place in it, whatever its name
        schema = {name: given for name, given in schema.items() if name != "$id"}
    worst = jsonschema.exceptions.best_match(kind(schema, format_checker=kind.FORMAT_CHECKER).iter_errors(value))
    return "" if worst is None else f"{worst.json_path}: {worst.message[:300]}"


class _Translator:
    def __init__(self, root: Schema, values: Values) -> None:
        self._root, self._values = root, values
        self._within: Counter[str] = Counter()  # how often each $ref is being translated
        self._visited = 0

    def value(self, schema: Schema, at: Place) -> str | None:
        """A value that satisfies `schema`, which stands at `at` in the whole."""
        self._visited += 1
        if self._visited > MOST_SCHEMAS:
            raise ConstraintError(f"the schema spreads into more than {MOST_SCHEMAS} schemas; make $refs nest less")
        if schema is False:
            return None
        if schema is True:
            return self._values.anything()
        if not isinstance(schema, Mapping):
            raise self._refusal(at, f"is {schema!r}; expected an object, true or false")
        self._check_keywords(schema, at)
        written = self._written(schema, at)
        if written is not None and len(written) > LONGEST:
            raise ConstraintError(
                f"the schema's regular expression has more than {LONGEST} characters; make it smaller"
            )
        return None if written is None else f"(?:{written})"

    def _written(self, schema: Mapping[str, Any], at: Place) -> str | None:
        if "enum" in schema or "const" in schema:
            return self._listed(schema, at)
        for keyword in ("$ref", "anyOf", "oneOf", "allOf"):
            if keyword in schema:
                self._check_alone(schema, keyword, at)
                return self._combined(keyword, schema[keyword], (*at, keyword))
        types = self._types(schema, at)
        if not types:
            return self._values.anything()
        writers = {"object": self._object, "array": self._array, "string": self._string, "number": self._number}
        writers |= {"integer": self._integer, "boolean": lambda *_: "true|false", "null": lambda *_: "null"}
        return _either([writers[kind](schema, at) for kind in types])

    # -- keywords --------------------------------------------------------------------------------------------------

    def _refusal(self, at: Place, problem: str) -> ConstraintError:
        return ConstraintError(f"schema at #/{'/'.join(map(str, at))} {problem}")

    def _check_keywords(self, schema: Mapping[str, Any], at: Place) -> None:
        for keyword in schema:
            if keyword not in _KNOWN and not keyword.startswith("x-"):
                raise self._refusal(at, f"has {keyword!r}, which a constraint cannot express; leave it out")
        if "$id" in schema and schema is not self._root:  # a $ref in it would mean places in it
            raise self._refusal(at, "has '$id' within the schema; leave it out")

    def _check_alone(self, schema: Mapping[str, Any], keyword: str, at: Place) -> None:
        beside = [name for name in schema if name != keyword and name in _KNOWN - _ANNOTATIONS]
        if beside:
            raise self._refusal(at, f"has {beside[0]!r} beside {keyword!r}; a constraint can express one of them alone")

    def _types(self, schema: Mapping[str, Any], at: Place) -> list[str]:
        """The types that a value may have; without `type`, the one that the other keywords speak of."""
        given = schema.get("type")
        types = [given] if isinstance(given, str) else given
        if types is None:
            of_keywords = [kind for kind in ("object", "array", "string", "number") if _OF_TYPE[kind] & set(schema)]
            return of_keywords[:1]
        if not isinstance(types, Sequence) or not types or any(kind not in _TYPES for kind in types):
            raise self._refusal((*at, "type"), f"is {given!r}; expected one or several of {', '.join(_TYPES)}")
        return [kind for kind in types if not (kind == "integer" and "number" in types)]

    def _whole(self, schema: Mapping[str, Any], keyword: str, at: Place) -> int | None:
        number = schema.get(keyword)
        if number is None:
            return None
        if isinstance(number, bool) or not isinstance(number, int | float) or number < 0 or number != int(number):
            raise self._refusal((*at, keyword), f"is {number!r}; expected a whole number, 0 or more")
        return int(number)

    # -- combinations ----------------------------------------------------------------------------------------------

    def _listed(self, schema: Mapping[str, Any], at: Place) -> str | None:
        """`enum` and `const`: the listed values that the rest of the schema accepts, asked of jsonschema.

        The rest is of those keywords that are quick to check, whatever a stranger writes: no patterns.
        """
        beside = [name for name in schema if name not in _BESIDE_LISTED and not name.startswith("x-")]
        if beside:
            raise self._refusal(at, f"has {beside[0]!r} beside 'enum' or 'const'; leave it out")
        values = schema["enum"] if "enum" in schema else [schema["const"]]
        if not isinstance(values, Sequence) or isinstance(values, str):
            raise self._refusal((*at, "enum"), f"is {values!r}; expected a list of values")
        # without `enum`, in which jsonschema looks for each value from the beginning
        rest = {name: given for name, given in schema.items() if name not in _ANNOTATIONS | {"enum"}}
        accepted = dialect_of(self._root)(rest).is_valid
        return _either([self._values.exactly(value) for value in values if accepted(value)])

    def _combined(self, keyword: str, given: Any, at: Place) -> str | None:
        if keyword == "$ref":
            return self._referred(given, at)
        if not isinstance(given, Sequence) or isinstance(given, str) or not given:
            raise self._refusal(at, f"is {given!r}; expected a list of schemas")
        if keyword == "allOf" and len(given) > 1:
            raise self._refusal(at, "has several schemas; a constraint can express allOf of one alone: merge them")
        if keyword == "oneOf" and len(given) > MOST_BRANCHES:
            raise self._refusal(at, f"has {len(given)} schemas; expected at most {MOST_BRANCHES}, or use anyOf")
        if keyword == "oneOf" and not self._exclude_each_other(given):
            raise self._refusal(
                at, "has schemas that may hold at once; give them different types or tags, or use anyOf"
            )
        return _either([self.value(schema, (*at, index)) for index, schema in enumerate(given)])

    def _referred(self, reference: Any, at: Place) -> str | None:
        if self._within[reference] >= NESTING:
            return None
        self._within[reference] += 1
        written = self.value(self._target(reference, at), at)
        self._within[reference] -= 1
        return written

    def _target(self, reference: Any, at: Place) -> Schema:
        is_place = isinstance(reference, str) and (reference == "#" or reference.startswith("#/"))
        if not is_place or len(reference) > LONGEST_REFERENCE:
            raise self._refusal(at, f"is {brief(reference)}; expected a place in this schema, such as '#/$defs/name'")
        target: Any = self._root
        names = [part.replace("~1", "/").replace("~0", "~") for part in unquote(reference[2:]).split("/")]
        for name in names if reference != "#" else ():
            try:
                target = target[int(name)] if isinstance(target, Sequence) else target[name]
            except (LookupError, ValueError, TypeError):
                raise self._refusal(at, f"is {reference!r}, and there is nothing of that name") from None
        if reference != "#" and not _is_place_of_schema(names):  # it was never checked
            raise self._refusal(at, f"is {reference!r}, where no schema stands; expected one such as '#/$defs/name'")
        return target

    def _exclude_each_other(self, schemas: Sequence[Any]) -> bool:
        """Whether no value can satisfy two of them: other types, or other constants of a member that both require."""
        branches = [self._resolved(schema) for schema in schemas]
        apart = [0] * len(branches)  # of each branch a bit for every other one that it excludes
        types: dict[int, Collection[Any]] = dict(enumerate(map(_types, branches)))
        for sets in (types, *_tags(branches).values()):
            having: Counter[Any] = Counter()
            all_of_them = 0
            for index, values in sets.items():
                all_of_them |= 1 << index
                for value in values:
                    having[value] |= 1 << index
            for index, values in sets.items():
                shared = functools.reduce(operator.or_, (having[value] for value in values), 0)
                apart[index] |= all_of_them & ~shared
        return all(bits | 1 << index == (1 << len(branches)) - 1 for index, bits in enumerate(apart))

    def _resolved(self, schema: Any) -> Any:
        for _ in range(NESTING):
            if isinstance(schema, Mapping) and "$ref" in schema:
                schema = self._target(schema["$ref"], ("oneOf",))
        return schema if isinstance(schema, Mapping) else {}

    # -- types -----------------------------------------------------------------------------------------------------

    def _string(self, schema: Mapping[str, Any], at: Place) -> str | None:
        shortest, longest = (self._whole(schema, f"{end}Length", at) for end in ("min", "max"))
        has_length = shortest is not None or longest is not None
        given = [name for name in ("pattern", "format") if name in schema] + (
            ["minLength, maxLength"] if has_length else []
        )
        if len(given) > 1:
            raise self._refusal(at, f"has {' and '.join(given)}; a constraint can express one of them alone")
        if "pattern" in schema:
            return self._values.matching(str(schema["pattern"]))
        if "format" in schema:
            if schema["format"] not in FORMATS:
                known = ", ".join(FORMATS)
                raise self._refusal((*at, "format"), f"is {schema['format']!r}; a constraint can express {known}")
            return self._values.quoted(FORMATS[schema["format"]])
        if longest is not None and longest < (shortest or 0):
            return None
        return self._values.string(shortest or 0, longest)

    def _bounds(self, schema: Mapping[str, Any], at: Place) -> dict[str, float | int]:
        bounds = {name: schema[name] for name in _OF_TYPE["number"] if name in schema}
        for name, bound in bounds.items():
            if isinstance(bound, bool) or not isinstance(bound, int | float) or not abs(bound) < 1e308:
                raise self._refusal((*at, name), f"is {brief(bound)}; expected a number below 1e308")
        return bounds

    def _integer(self, schema: Mapping[str, Any], at: Place) -> str | None:
        bounds = self._bounds(schema, at)
        if not bounds:
            return numbers.INTEGER
        lows = [-int(-bounds["minimum"] // 1)] if "minimum" in bounds else []
        lows += [int(bounds["exclusiveMinimum"] // 1) + 1] if "exclusiveMinimum" in bounds else []
        highs = [int(bounds["maximum"] // 1)] if "maximum" in bounds else []
        highs += [-int(-bounds["exclusiveMaximum"] // 1) - 1] if "exclusiveMaximum" in bounds else []
        return numbers.integers(max(lows, default=None), min(highs, default=None))

    def _number(self, schema: Mapping[str, Any], at: Place) -> str | None:
        bounds = self._bounds(schema, at)
        for name, bound in bounds.items():
            if bound != int(bound) or abs(bound) >= numbers.BOUND:
                raise self._refusal(
                    (*at, name),
                    f"is {bound!r}; of a number a constraint can express whole bounds below {numbers.BOUND}",
                )
        if not bounds:
            return numbers.NUMBER
        # a bound that is excluded is narrower than the same one included
        low = max(((bounds[name], name != "minimum") for name in ("minimum", "exclusiveMinimum") if name in bounds),
                  default=(None, False))  # fmt: skip
        high = min(((bounds[name], name == "maximum") for name in ("maximum", "exclusiveMaximum") if name in bounds),
                   default=(None, True))  # fmt: skip
        whole = [None if bound is None else int(bound) for bound in (low[0], high[0])]
        return numbers.numbers(whole[0], whole[1], above=low[1], below=not high[1])

    def _array(self, schema: Mapping[str, Any], at: Place) -> str | None:
        if schema.get("uniqueItems"):
            raise self._refusal(at, "has 'uniqueItems', which a constraint cannot express; leave it out")
        fewest, most = self._whole(schema, "minItems", at) or 0, self._whole(schema, "maxItems", at)
        if most is not None and most < fewest:
            return None
        if "prefixItems" in schema:
            return self._tuple(schema, fewest, most, at)
        if not isinstance(schema.get("items", True), Mapping | bool):
            raise self._refusal((*at, "items"), "is a list; give the schemas of the first items as 'prefixItems'")
        item = self.value(schema.get("items", True), (*at, "items")) if most != 0 else None
        if item is None:
            return self._values.bracketed(r"\[", "", r"\]") if fewest == 0 else None
        return self._values.array(item, fewest, most)

    def _tuple(self, schema: Mapping[str, Any], fewest: int, most: int | None, at: Place) -> str | None:
        if "prefixItems" not in dialect_of(self._root).VALIDATORS:
            raise self._refusal(
                at, "has 'prefixItems', which the dialect of its $schema does not know; leave $schema out"
            )
        given = schema["prefixItems"]
        if not isinstance(given, Sequence) or isinstance(given, str) or not given:
            raise self._refusal((*at, "prefixItems"), f"is {given!r}; expected a list of schemas")
        if fewest > len(given) or (most is not None and most < len(given)):
            raise self._refusal(at, "has minItems or maxItems that differ from the number of prefixItems")
        items = [self.value(item, (*at, "prefixItems", index)) for index, item in enumerate(given)]
        present = [item for item in items if item is not None]
        if present != items:
            return None
        return self._values.bracketed(r"\[", self._values.comma.join(present), r"\]")

    def _object(self, schema: Mapping[str, Any], at: Place) -> str | None:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(properties, Mapping):
            raise self._refusal((*at, "properties"), f"is {properties!r}; expected an object of schemas")
        if not isinstance(required, Sequence) or isinstance(required, str):
            raise self._refusal((*at, "required"), f"is {required!r}; expected a list of names")
        others = schema.get("additionalProperties", True)
        named = {**properties, **{name: others for name in required if name not in properties}}
        fewest, most = self._whole(schema, "minProperties", at) or 0, self._whole(schema, "maxProperties", at)
        if not named:
            if fewest > 1:
                raise self._refusal(at, "has 'minProperties', but names may repeat where none are given; leave it out")
            value = self.value(others, (*at, "additionalProperties")) if most != 0 else None
            if value is None:
                return self._values.bracketed(r"\{", "", r"\}") if fewest == 0 else None
            return self._values.object_of(value, fewest, most)
        if fewest > len(set(required)) or (most is not None and most < len(named)):
            raise self._refusal(at, "has minProperties or maxProperties beside named members; leave them out")
        members = []
        for name in self._values.in_order(list(named)):
            written = self.value(named[name], (*at, "properties", name))
            if written is not None:
                members.append((self._values.member(self._values.name(name), written), name in required))
            elif name in required:
                return None
        return self._values.record(members)


def _is_place_of_schema(names: Sequence[str]) -> bool:
    """Whether what stands there in a schema is a schema."""
    rest = list(names)
    while rest:
        steps = 1 if rest[0] in _SCHEMA else 2 if rest[0] in _SCHEMAS and len(rest) > 1 else 0
        if not steps:
            return False
        rest = rest[steps:]
    return True


def _either(parts: Sequence[str | None]) -> str | None:
    """Any of the languages that are not empty."""
    return "|".join(f"(?:{part})" for part in dict.fromkeys(parts) if part is not None) or None


def _types(schema: Mapping[str, Any]) -> set[str]:
    """The types that a value of it may have."""
    given = schema.get("type", _TYPES)
    chosen = {given} if isinstance(given, str) else set(given)
    return chosen | {"integer"} if "number" in chosen else chosen


def _tags(branches: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, Collection[Any]]]:
    """The constants of members that objects must have: by name, then by the number of the branch."""
    found: dict[str, dict[int, Collection[Any]]] = defaultdict(dict)
    for index, schema in enumerate(branches):
        if schema.get("type") == "object":
            properties = schema.get("properties", {})
            for name in set(schema.get("required", [])) & set(properties):
                member = properties[name]
                if isinstance(member, Mapping) and ("enum" in member or "const" in member):
                    values = member["enum"] if "enum" in member else [member["const"]]
                    found[name][index] = [_as_equal(value) for value in values]
    return found


def _as_equal(value: Any) -> Any:
    """Something hashable, equal for equal values of JSON: 1 is 1.0, and true is neither."""
    if isinstance(value, Mapping):
        return frozenset((name, _as_equal(one)) for name, one in value.items())
    if isinstance(value, list):
        return tuple(map(_as_equal, value))
    return (type(value) is bool, value)
