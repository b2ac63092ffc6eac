"""Types of the fields of a schema: which hold text, numbers or a group.

text_kind(TrainConfig, "exp_manager.version").may_be_null
"""

from __future__ import annotations

import dataclasses
import functools
import types
from typing import Any, Union, get_args, get_origin, get_type_hints


@dataclasses.dataclass(frozen=True)
class TextKind:
    """A key whose values are text. A field with metadata {"literal": True} takes the word null as text."""

    may_be_null: bool


def text_kind(schema: type, key: str) -> TextKind | None:
    """What kind of text `key` (with dots) holds, None where it holds something else or is no key."""
    *groups, name = key.split(".")
    kind: Any = schema
    for group in groups:
        kind = group_of(get_type_hints(kind).get(group)) or get_type_hints(kind).get(group)
        kind = _with_key(kind, name)
        if get_origin(kind) is dict:
            is_text = group == groups[-1] and get_args(kind)[1] is str
            return TextKind(may_be_null=False) if is_text else None
        if not dataclasses.is_dataclass(kind):
            return None
    field = kind.__dataclass_fields__.get(name)
    if field is None:
        return None
    kind = get_type_hints(kind)[name]
    if str not in options_of(kind):
        return None
    return TextKind(may_be_null=kind is not str and not field.metadata.get("literal"))


def is_text_list(schema: type, key: str) -> bool:
    """Whether `key` (with dots) holds a list of texts."""
    *groups, name = key.split(".")
    kind: Any = schema
    for group in groups:
        kind = group_of(get_type_hints(kind).get(group))
        if kind is None:
            return False
        kind = _with_key(kind, name)
    return get_type_hints(kind).get(name) == list[str]


def _with_key(kind: Any, name: str) -> Any:
    """The group of data itself, or that of the first kind of data that has a key of this name."""
    from nemo_diffgemma.data.tasks import KINDS, DataGroup, task_class

    if kind is not DataGroup or name in kind.__dataclass_fields__:
        return kind
    kinds = (task_class(kind_of_data).keys for kind_of_data in KINDS)
    return next((keys for keys in kinds if name in keys.__dataclass_fields__), kind)


def options_of(kind: Any) -> tuple[Any, ...]:
    """The types that a value of `kind` may have."""
    return get_args(kind) if get_origin(kind) in (types.UnionType, Union) else (kind,)


def group_of(kind: Any) -> Any:
    """The dataclass that a type is, or that it is besides None; else None."""
    return next((option for option in options_of(kind) if dataclasses.is_dataclass(option)), None)


def relaxed(schema: Any) -> Any:
    """A schema of the same keys and defaults whose values are of any type: nothing is converted on the way."""
    return _relaxed(schema)


@functools.cache  # one class of each, which those of derived classes derive from
def _relaxed(schema: Any) -> Any:
    hints = get_type_hints(schema)
    fields = []
    for field in dataclasses.fields(schema):
        kind, given = hints[field.name], field.default_factory
        group = group_of(kind)
        if group is not None:
            kind = relaxed(group)
            if given is not dataclasses.MISSING:
                given = relaxed(type(given()))  # of the group, or of a class derived from it
            kind = kind | None if type(None) in options_of(hints[field.name]) else kind
        else:
            kind = dict[str, Any] if get_origin(kind) is dict else Any
        if given is not dataclasses.MISSING:
            fields.append((field.name, kind, dataclasses.field(default_factory=given)))
        elif field.default is not dataclasses.MISSING:
            fields.append((field.name, kind, dataclasses.field(default=field.default)))
        else:
            fields.append((field.name, kind, dataclasses.field(default="???")))
    bases = tuple(relaxed(base) for base in schema.__bases__ if dataclasses.is_dataclass(base))
    return dataclasses.make_dataclass(schema.__name__, fields, bases=bases)
