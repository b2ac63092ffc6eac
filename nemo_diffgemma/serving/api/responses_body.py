"""The body of POST /v1/responses, and the chat that it stands for: both are asked in one way.

Answers are not kept, so what refers to an earlier one is refused; a conversation is sent whole, as items.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from nemo_diffgemma.serving.api.body import Body, ListOf
from nemo_diffgemma.serving.api.conversation import CalledFunction, CalledTool, Message
from nemo_diffgemma.serving.api.fields import ChatBody, Diffusion, Seed, StreamOptions
from nemo_diffgemma.serving.api.response_format import JsonObjectFormat, JsonSchemaFormat, NamedSchema, TextFormat
from nemo_diffgemma.serving.api.tools import Function, FunctionName, NamedChoice, Tool, ToolChoice
from nemo_diffgemma.serving.failures import InvalidRequest

_MOST_METADATA = 16  # as OpenAI has it
Status = Literal["in_progress", "completed", "incomplete"]


class Piece(Body):
    """A part of a text."""

    type: Literal["input_text", "output_text", "text", "reasoning_text", "summary_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None
    parsed: Any = Field(default=None, description="What the openai package adds. Not read.")


Text = str | ListOf[Piece]


class MessageItem(Body):
    """A turn of a conversation."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Text
    id: str | None = None
    status: Status | None = None
    phase: str | None = None


class CallItem(Body):
    """A call that an answer has made."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    parsed_arguments: Any = Field(default=None, description="What the openai package adds. Not read.")
    id: str | None = None
    status: Status | None = None


class ResultItem(Body):
    """What came of it."""

    type: Literal["function_call_output"]
    call_id: str
    output: Text
    id: str | None = None
    status: Status | None = None


class ReasoningItem(Body):
    """What an answer's thoughts were."""

    type: Literal["reasoning"]
    id: str | None = None
    summary: ListOf[Piece] = []
    content: ListOf[Piece] | None = None
    encrypted_content: str | None = None
    status: Status | None = None


Item = MessageItem | CallItem | ResultItem | ReasoningItem


class _OfFunction(Body):
    type: Literal["function"]


class FunctionTool(Function, _OfFunction):
    """A tool that an answer may call. Its type is looked at first."""


class FunctionChoice(_OfFunction):
    """The answer must call this tool."""

    name: str


class SchemaFormat(NamedSchema):
    """JSON that a schema accepts."""

    type: Literal["json_schema"]


class TextOptions(Body):
    """What the text must be. `verbosity` changes nothing."""

    format: TextFormat | JsonObjectFormat | SchemaFormat = TextFormat(type="text")
    verbosity: Literal["low", "medium", "high"] | None = None


class Reasoning(Body):
    """Any effort but none: the model thinks first. Thoughts are told whole: `summary` changes nothing."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


def _few(given: Any) -> Any:
    if isinstance(given, dict) and len(given) > _MOST_METADATA:
        raise ValueError(f"expected at most {_MOST_METADATA} entries")
    return given


class ResponsesBody(Body):
    """POST /v1/responses"""

    model: str
    input: str | Annotated[ListOf[Item], Field(min_length=1)]
    instructions: str | None = Field(default=None, description="A system message before the input.")
    max_output_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    tools: ListOf[FunctionTool] = []
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool = True
    text: TextOptions = TextOptions()
    reasoning: Reasoning = Reasoning()
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    seed: Seed | None = Field(default=None, description="The same seed gives the same answer; without one it is drawn.")
    diffusion: Diffusion = Diffusion()
    chat_template_kwargs: dict[str, Any] = Field(default={}, description="Variables of the model's own template.")

    previous_response_id: str | None = Field(default=None, description="Refused: answers are not kept.")
    store: bool | None = Field(default=None, description="false: answers are not kept.")
    background: bool | None = Field(default=None, description="false: an answer has one connection.")
    truncation: Literal["disabled"] | None = None
    include: ListOf[Literal["reasoning.encrypted_content"]] | None = Field(
        default=None, description="Changes nothing: thoughts are told in clear text."
    )
    temperature: float | None = Field(default=None, description="Ignored: see diffusion.t_min and t_max.")
    top_p: float | None = Field(default=None, description="Ignored.")
    user: str | None = None
    metadata: Annotated[dict[str, str], BeforeValidator(_few)] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    @property
    def ignored(self) -> list[str]:
        """Names of given fields that change nothing here; the chat has more."""
        given = {
            "reasoning.summary": self.reasoning.summary or self.reasoning.generate_summary,
            "text.verbosity": self.text.verbosity,
            "include": self.include,
        }
        return [name for name, value in given.items() if value]

    def chat(self) -> ChatBody:
        """The chat that is asked. Raises `InvalidRequest`."""
        self._refuse_what_needs_memory()
        return ChatBody(
            model=self.model,
            messages=_messages(self.instructions, self.input),
            max_tokens=self.max_output_tokens,
            tools=[
                Tool(type="function", function=Function(**tool.model_dump(exclude={"type"}))) for tool in self.tools
            ],
            tool_choice=_choice(self.tool_choice),
            parallel_tool_calls=self.parallel_tool_calls,
            response_format=_format(self.text.format),
            reasoning_effort=self.reasoning.effort,
            chat_template_kwargs=self.chat_template_kwargs,
            stream=self.stream,
            stream_options=self.stream_options,
            seed=self.seed,
            diffusion=self.diffusion,
            temperature=self.temperature,
            top_p=self.top_p,
        )

    def _refuse_what_needs_memory(self) -> None:
        given = {
            "previous_response_id": "send the items of earlier turns again, in input",
            "store": "leave it out, or send false",
            "background": "leave it out, or send false",
        }
        for name, instead in given.items():
            if getattr(self, name):
                what = f"{name}={getattr(self, name)!r}: this server keeps no answers; {instead}"
                raise InvalidRequest(what, "unsupported_parameter", name)


def _choice(given: ToolChoice | FunctionChoice | None) -> ToolChoice | None:
    if not isinstance(given, FunctionChoice):
        return given
    return NamedChoice(type="function", function=FunctionName(name=given.name))


def _format(given: TextFormat | JsonObjectFormat | SchemaFormat) -> TextFormat | JsonObjectFormat | JsonSchemaFormat:
    if not isinstance(given, SchemaFormat):
        return given
    schema = NamedSchema(**given.model_dump(exclude={"type"}, by_alias=True))
    return JsonSchemaFormat(type="json_schema", json_schema=schema)


def _messages(instructions: str | None, given: str | Sequence[Item]) -> list[Message]:
    """A conversation. What an assistant thinks, says and calls in a row is one message."""
    made = [Message(role="system", content=instructions)] if instructions is not None else []
    if isinstance(given, str):
        return [*made, Message(role="user", content=given)]
    called: set[str] = set()
    thoughts: list[str] = []
    is_open = False  # the last message is an assistant's, to which calls may be added

    def think() -> None:
        """Thoughts that nothing of the assistant's follows are a turn of their own."""
        if thoughts:
            made.append(Message(role="assistant", content="", reasoning_content="".join(thoughts)))
            thoughts.clear()

    for index, item in enumerate(given):
        if isinstance(item, ReasoningItem):
            thoughts += [piece.text for piece in item.content or item.summary]
            is_open = False
        elif isinstance(item, ResultItem):
            if item.call_id not in called:
                at = f"input.{index}.call_id"
                raise InvalidRequest(f"{at}: {item.call_id!r} is no call before it", "invalid_value", at)
            think()
            made.append(Message(role="tool", content=_text(item.output), tool_call_id=item.call_id))
            is_open = False
        elif isinstance(item, MessageItem) and item.role != "assistant":
            think()
            made.append(Message(role=item.role, content=_text(item.content)))
            is_open = False
        else:
            if isinstance(item, MessageItem) or not is_open:
                said = _text(item.content) if isinstance(item, MessageItem) else ""
                made.append(Message(role="assistant", content=said, reasoning_content="".join(thoughts) or None))
                thoughts, is_open = [], True
            if isinstance(item, CallItem):
                function = CalledFunction(name=item.name, arguments=item.arguments)
                calls = made[-1].tool_calls or []
                calls.append(CalledTool(id=item.call_id, function=function))
                made[-1].tool_calls = calls
                called.add(item.call_id)
    think()
    if not made:
        raise InvalidRequest("input has no message", "invalid_value", "input")
    return made


def _text(given: Text) -> str:
    return given if isinstance(given, str) else "".join(piece.text for piece in given)
