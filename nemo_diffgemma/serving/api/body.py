"""What all bodies of requests have in common."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

T = TypeVar("T")
ListOf = Annotated[list[T], Field(fail_fast=True)]  # reading ends at the first wrong one of a million


def _nullable(schema: dict[str, Any]) -> None:
    """Let the schema of a body say that null is as good as absent."""
    for name, field in schema.get("properties", {}).items():
        if name not in schema.get("required", []) and {"type": "null"} not in field.get("anyOf", []):
            about = {key: field.pop(key) for key in ("title", "description", "default") if key in field}
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}], **about}


class Body(BaseModel):
    """Types are strict: "5" is no number. Unknown fields are refused by name; null is as good as absent."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=_nullable)

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, values: Any) -> Any:
        if isinstance(values, dict):
            given = {name: value for name, value in values.items() if value is not None}
            known = {field.alias or name for name, field in cls.model_fields.items()}
            unknown = [name for name in given if name not in known]
            return {name: given[name] for name in given if name in known or name == unknown[0]}
        return values
