"""What the text of an answer must be, as clients write it: OpenAI's `response_format`, and fields of `diffusion`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from nemo_diffgemma.serving.api.body import Body
from nemo_diffgemma.serving.constraints import ConstraintError, Language, json_object, json_of_schema
from nemo_diffgemma.serving.failures import InvalidRequest


class TextFormat(Body):
    """Any text."""

    type: Literal["text"]

    @property
    def language(self) -> Language | None:
        return None


class JsonObjectFormat(Body):
    """Any object of JSON."""

    type: Literal["json_object"]

    @property
    def language(self) -> Language | None:
        return json_object()


class NamedSchema(Body):
    """`strict` changes nothing: what is answered always fits the schema."""

    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] | bool = Field(default=True, alias="schema", description="A JSON schema.")
    strict: bool = True


class JsonSchemaFormat(Body):
    """JSON that a schema accepts."""

    type: Literal["json_schema"]
    json_schema: NamedSchema

    @property
    def language(self) -> Language | None:
        """Raises `InvalidRequest` for keywords that a constraint cannot express."""
        return refused_as("response_format.json_schema.schema", json_of_schema, self.json_schema.schema_)


ResponseFormat = TextFormat | JsonObjectFormat | JsonSchemaFormat


def refused_as(parameter: str, make: Any, *given: Any) -> Any:
    """What `make` makes; what it refuses is refused as this parameter."""
    try:
        return make(*given)
    except ConstraintError as error:
        raise InvalidRequest(f"{parameter}: {error}", "invalid_value", parameter) from None
