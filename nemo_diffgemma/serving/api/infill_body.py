"""The body of POST /v1/infill."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from nemo_diffgemma.serving.api.body import Body, ListOf
from nemo_diffgemma.serving.api.conversation import Message
from nemo_diffgemma.serving.api.fields import Common, StopString, TokenId
from nemo_diffgemma.serving.failures import InvalidRequest

Length = Annotated[int, Field(ge=1, lt=2**31)]


class FreeLength(Body):
    """From `min` to `max` tokens."""

    min: Length
    max: Length


class HolePart(Body):
    """A hole of so many tokens."""

    hole: Length | FreeLength

    @property
    def limits(self) -> tuple[int, int]:
        """The least and the most. Raises `InvalidRequest`."""
        if isinstance(self.hole, int):
            return self.hole, self.hole
        if self.hole.min > self.hole.max:
            what = f"a hole of {self.hole.min} to {self.hole.max} tokens; expected min up to max"
            raise InvalidRequest(what, "invalid_value", "text")
        return self.hole.min, self.hole.max


class InfillBody(Common):
    """POST /v1/infill: `text` is locked where it is text; in `token_ids` null is a hole of one token."""

    text: (
        Annotated[ListOf[Annotated[str, Field(min_length=1)] | HolePart], Field(min_length=1, max_length=1000)] | None
    ) = Field(default=None, description='Spans and holes in their order: ["Once ", {"hole": 12}, " the end."]')
    token_ids: Annotated[ListOf[TokenId | None], Field(min_length=1)] | None = None
    prompt: str | ListOf[TokenId] | None = Field(default=None, description="What stands before the text.")
    messages: Annotated[ListOf[Message], Field(min_length=1)] | None = Field(
        default=None, description="Or a conversation, to which the text is the answer."
    )
    max_tokens: None = None
    stop: Annotated[ListOf[StopString], Field(max_length=0)] = []
