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
    diffusion: AnswerDiffusion


class ChatMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None


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


_FAILURES = {
    400: "The request can never be answered as it is.",
    401: "An API key is wanted.",
    404: "There is no such model.",
    413: "The body is too large.",
    429: "The queue is full: Retry-After says when to come again.",
    500: "The engine failed, or the server has a defect.",
    503: "The server loads the model, or ends.",
    504: "The answer took longer than the server allows.",
}


def responses(reply: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """Of an endpoint that answers with `reply`, or with a stream of it."""
    stream = {"text/event-stream": {"schema": StreamReply.model_json_schema()}}
    answer = {"model": reply, "content": stream, "description": "The answer; as a stream where `stream` is true."}
    failures: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorReply, "description": what} for status, what in _FAILURES.items()
    }
    return {200: answer, **failures}
