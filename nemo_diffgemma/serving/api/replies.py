"""What clients get, for the OpenAPI schema: OpenAI's forms, and what stands under `diffusion` beside them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Error(BaseModel):
    """What is wrong: `code` is for programs, `param` names the field."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """Every status but 200 has this body."""

    error: Error


class AnswerDiffusion(BaseModel):
    """How an answer came about. `seed` gives it again; a token that ends the answer is the last of `token_ids`."""

    token_ids: list[int]
    steps: int
    canvases: int
    seed: int


class ReplyDiffusion(BaseModel):
    """Fields of the request that change nothing here."""

    ignored: list[str]


class PromptTokens(BaseModel):
    """Of the tokens of prompts, those that the prefix cache had."""

    cached_tokens: int


class CompletionTokens(BaseModel):
    """Of the tokens of answers, those of thoughts."""

    reasoning_tokens: int


class Usage(BaseModel):
    """Tokens; of several answers to a prompt it is counted once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens
    completion_tokens_details: CompletionTokens


class Choice(BaseModel):
    """One answer."""

    index: int
    finish_reason: Literal["stop", "length"]
    diffusion: AnswerDiffusion


class FunctionReply(BaseModel):
    """`arguments` is the JSON text of an object."""

    name: str
    arguments: str


class ToolCallReply(BaseModel):
    """A whole call. What the model wrote as a call and is none, cut or malformed, stands in `content` instead."""

    id: str
    type: Literal["function"]
    function: FunctionReply


class ChatMessage(BaseModel):
    """What the model says, thinks and calls. Without markers: those are in `diffusion.token_ids` alone."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallReply] | None = None


class TokenLogprob(BaseModel):
    """A token, or one that might stand in its place: `bytes` of all, joined, are the text."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChosenLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    """Of the tokens of settled canvases, in the last step, untempered."""

    content: list[ChosenLogprob]
    refusal: None


class CompletionLogprobs(BaseModel):
    """The same, a list for each thing that is told."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class ChatChoice(Choice):
    finish_reason: Literal["stop", "length", "tool_calls"]  # type: ignore[assignment]
    message: ChatMessage
    logprobs: ChatLogprobs | None


class CompletionChoice(Choice):
    text: str
    logprobs: CompletionLogprobs | None


class _Reply(BaseModel):
    id: str
    created: int
    model: str
    usage: Usage
    diffusion: ReplyDiffusion | None = None


class ChatReply(_Reply):
    """A chat that was not streamed."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class CompletionReply(_Reply):
    """A completion that was not streamed."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class InputDetails(BaseModel):
    """Of the tokens of the prompt, those that the prefix cache had."""

    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(BaseModel):
    """Of the tokens of the answer, those of thoughts."""

    reasoning_tokens: int


class ResponseUsage(BaseModel):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class IncompleteDetails(BaseModel):
    reason: Literal["max_output_tokens"]


class ResponseDiffusion(AnswerDiffusion, ReplyDiffusion):
    """How the answer came about."""


class ResponseReply(BaseModel):
    """A response; other fields say again what was asked. `output` has items of type message, reasoning, function_call.

    A stream has OpenAI's typed events, numbered, and those of type `diffusion.draft` where they are asked for.
    """

    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete"]
    model: str
    output: list[dict[str, Any]]
    incomplete_details: IncompleteDetails | None
    usage: ResponseUsage
    diffusion: ResponseDiffusion


class FilledHole(BaseModel):
    """A hole, from position `start` of the answer's tokens on; its text is null without a tokenizer."""

    text: str | None
    start: int
    token_ids: list[int]


class TriedLengths(BaseModel):
    """Lengths of the holes, and the mean log-probability (nats) of their tokens: the highest was chosen."""

    lengths: list[int]
    logprob: float


class InfillDiffusion(AnswerDiffusion):
    tried: list[TriedLengths] | None = None


class InfillChoice(BaseModel):
    """The whole text, what was locked as it was given, and the holes in their order."""

    index: int
    text: str | None
    holes: list[FilledHole]
    finish_reason: Literal["stop"]
    diffusion: InfillDiffusion


class InfillReply(_Reply):
    """Filled holes; of a stream it is the last event before [DONE]."""

    object: Literal["infill"]
    choices: list[InfillChoice]


class DraftReply(BaseModel):
    """`diffusion.draft` of an event of `stream_options.drafts`, whose `choices` are empty: a canvas after a step.

    `index` is the answer's, `remaining` steps may follow; lists have an entry a cell, entropies in nats.
    """

    index: int
    canvas: int
    remaining: int
    token_ids: list[int]
    accepted: list[bool]
    entropy: list[float]
    text: str | None = None
    pieces: list[str] | None = None


class StreamReply(BaseModel):
    """Server-sent events: chunks in OpenAI's form, one a canvas, and drafts, where they are asked for; then [DONE].

    A choice has `diffusion.token_ids`, `steps` and `canvas` of its chunk, the last one `diffusion.seed`.
    """

    choices: list[dict[str, Any]]
    diffusion: dict[Literal["draft"], DraftReply] | None = None


class ResponseEvent(BaseModel):
    """Of a stream of /v1/responses, as OpenAI names them."""

    type: str


class ModelDiffusion(BaseModel):
    """What a request may ask of a model. `context_tokens` has a prompt and all canvases but the last."""

    context_tokens: int
    canvas_length: int
    vocab_size: int
    sampler: dict[str, Any]


class ModelReply(BaseModel):
    """A name that requests may give."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    diffusion: ModelDiffusion


class ModelsReply(BaseModel):
    """All of them."""

    object: Literal["list"]
    data: list[ModelReply]


class TokensReply(BaseModel):
    """Ids of a text."""

    tokens: list[int]
    count: int
    context_tokens: int


class ReplicaHealth(BaseModel):
    name: str
    requests: int
    layout: str
    device: str


class HealthReply(BaseModel):
    """Replicas that take requests."""

    status: Literal["ok", "loading", "restarting"]
    replicas: list[ReplicaHealth]


_FAILURES: dict[int | str, str] = {
    400: "The request can never be answered as it is.",
    401: "An API key is wanted.",
    404: "There is no such model.",
    413: "The body is too large.",
    429: "The queue is full: Retry-After says when to come again.",
    500: "The engine failed, or the server has a defect.",
    503: "The server loads the model, or ends.",
    504: "The answer took longer than the server allows.",
    "4XX": "The request is none: its path, method, or time.",
}


def failures() -> dict[int | str, dict[str, Any]]:
    """Of every endpoint."""
    return {status: {"model": ErrorReply, "description": what} for status, what in _FAILURES.items()}


def responses(reply: type[BaseModel], chunk: type[BaseModel] = StreamReply) -> dict[int | str, dict[str, Any]]:
    """Of an endpoint that answers with `reply`, or with server-sent events (in OpenAPI 3.2's form) of `chunk`."""
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": _whole(chunk)}
    event = {"type": "object", "required": ["data"], "properties": {"event": {"type": "string"}, "data": data}}
    stream = {"text/event-stream": {"schema": event}}
    return {200: {"model": reply, "content": stream, "description": "The answer; as a stream where `stream` is true."}}


def _whole(model: type[BaseModel]) -> dict[str, Any]:
    """The schema of a model without references, which would lead nowhere from where FastAPI puts it."""
    schema = model.model_json_schema()
    parts = schema.pop("$defs", {})

    def inline(value: Any) -> Any:
        if isinstance(value, list):
            return [inline(one) for one in value]
        if not isinstance(value, dict):
            return value
        if "$ref" in value:
            return inline(parts[value["$ref"].rpartition("/")[2]])
        return {name: inline(one) for name, one in value.items()}

    whole: dict[str, Any] = inline(schema)
    return whole
