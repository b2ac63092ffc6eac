"""Whether what a stranger sends is a JSON schema at all: before anything reads it as one, and in little time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_diffgemma.serving.constraints.errors import ConstraintError

MOST_SCHEMAS = 20_000  # objects of a schema; and schemas that a translation visits
MOST_MIXED = 1000  # values of a list that are not all strings or all numbers: jsonschema compares each with each


def dialect_of(schema: Mapping[str, Any] | bool) -> Any:
    """The class of jsonschema for the dialect that a schema names; 2020-12 if none."""
    import jsonschema

    return jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)


def check(schema: Mapping[str, Any] | bool) -> None:
    """Raise `ConstraintError` unless `schema` is valid by the dialect that it names, 2020-12 if none.

    Behind it keywords have the types that they should have. Raises `RecursionError` for hundreds of schemas in each
    other.
    """
    import jsonschema

    _check_size(schema)
    if isinstance(schema, Mapping) and not isinstance(schema.get("$schema", ""), str):
        raise ConstraintError(f"schema at #/$schema is {schema['$schema']!r}; expected the address of a dialect")
    try:
        dialect = dialect_of(schema)
        if dialect is jsonschema.Draft3Validator:  # most of its keywords mean something else
            raise ConstraintError("schema at #/$schema is of draft 3; expected draft 4 or later, or no $schema")
        dialect.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ConstraintError(f"schema at {error.json_path} is no JSON schema: {error.message[:300]}") from None


def _check_size(schema: Any) -> None:
    """Raise `ConstraintError` for more than can be checked while a client waits, or for numbers that are none."""
    objects, rest = 0, [schema]
    while rest:
        value = rest.pop()
        if isinstance(value, Mapping):
            objects += 1
            rest += value.values()
        elif isinstance(value, list):
            kinds = {type(one) for one in value}
            if len(value) > MOST_MIXED and not (kinds <= {str} or kinds <= {int, float}):
                raise ConstraintError(f"a list of {len(value)} values in the schema; expected at most {MOST_MIXED}")
            rest += value
        elif isinstance(value, float) and not abs(value) < float("inf"):
            raise ConstraintError(f"the schema has the number {value}; expected numbers of JSON, which are finite")
        if objects > MOST_SCHEMAS:
            raise ConstraintError(f"the schema has more than {MOST_SCHEMAS} objects; make it smaller")
