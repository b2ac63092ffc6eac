"""What clients get, for the OpenAPI schema: OpenAI's forms, and what stands under `diffusion` beside them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


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


class Usage(BaseModel):
    """Tokens; of several answers to a prompt it is counted once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens


class Choice(BaseModel):
    """One answer."""

    index: int
    finish_reason: Literal["stop", "length"]
    logprobs: None
    diffusion: AnswerDiffusion


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Choice):
    message: ChatMessage


class CompletionChoice(Choice):
    text: str


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


def responses(reply: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """Of an endpoint that answers with `reply`, or with a stream of it."""
    stream = {"text/event-stream": {"schema": _whole(StreamReply)}}
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
