"""Bodies of requests. Fields that mean nothing here are refused by name; null is as good as absent."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from nemo_diffgemma.serving.failures import InvalidRequest

Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Scores = Annotated[int, Field(ge=0, le=20)] | None
StopString = Annotated[str, Field(min_length=1, max_length=1000)]

# Settings of models that choose one token after another: taken, since clients send them unasked, and named in the
# answer as ignored. A canvas is sampled by `diffusion.t_min` and `t_max` instead.
IGNORED = ("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")


class Body(BaseModel):
    """Types are strict: "5" is no number."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, values: Any) -> Any:
        if isinstance(values, dict):
            return {name: value for name, value in values.items() if value is not None}
        return values


class Diffusion(Body):
    """How a canvas is sampled; what is left out is as the checkpoint has it. Bounds and thresholds are in nats."""

    max_denoising_steps: int | None = Field(default=None, description="The most steps of a canvas.")
    entropy_bound: float | None = Field(default=None, description="What entropies of accepted positions sum to.")
    t_min: float | None = Field(default=None, description="Temperature of the last step, nearly.")
    t_max: float | None = Field(default=None, description="Temperature of the first step.")
    stability_threshold: int | None = Field(default=None, description="Steps without a change that settle a canvas.")
    confidence_threshold: float | None = Field(default=None, description="Mean entropy below which it may settle.")
    canvas_length: int | None = Field(default=None, description="Tokens of a canvas; short ones suit short answers.")

    def sampler(self) -> dict[str, Any]:
        """What is given of the settings of the sampler."""
        return self.model_dump(exclude={"canvas_length"}, exclude_none=True)


class StreamOptions(Body):
    """What a stream has beside the text."""

    include_usage: bool = False
    include_obfuscation: bool = False  # OpenAI's padding against eavesdroppers: never done here
    drafts: bool = Field(default=False, description="Also send the canvas after each denoising step.")


class Common(Body):
    """What chats and completions share."""

    model: str
    n: int = Field(default=1, ge=1, le=128, description="Answers; answer i is what seed + i gives alone.")
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] = []
    seed: Seed | None = Field(default=None, description="The same seed gives the same answer; without one it is drawn.")
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    diffusion: Diffusion = Diffusion()

    temperature: float | None = Field(default=None, description="Ignored: see diffusion.t_min and t_max.")
    top_p: float | None = Field(default=None, description="Ignored.")
    top_k: int | None = Field(default=None, description="Ignored.")
    min_p: float | None = Field(default=None, description="Ignored.")
    frequency_penalty: float | None = Field(default=None, description="Ignored.")
    presence_penalty: float | None = Field(default=None, description="Ignored.")
    repetition_penalty: float | None = Field(default=None, description="Ignored.")
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def scores(self) -> int | None:
        """Of how many ids at each place the log-probability is told, beside the chosen one's; None: of none at all."""
        return None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def ignored(self) -> list[str]:
        """Names of given fields that change nothing."""
        return [name for name in IGNORED if getattr(self, name) is not None]


class TextPart(Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Body):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def for_template(self) -> dict[str, str]:
        """As chat templates know it."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatBody(Common):
    """POST /v1/chat/completions"""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool = Field(default=False, description="Tell each token's log-probability where its canvas settled.")
    top_logprobs: Scores = Field(default=None, description="And those of so many ids at its place.")

    @property
    def scores(self) -> int | None:
        """Raises `InvalidRequest`."""
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true", "invalid_value", "top_logprobs")
        return self.top_logprobs or 0 if self.logprobs else None


class CompletionBody(Common):
    """POST /v1/completions"""

    prompt: str | list[TokenId] | list[str] | list[list[TokenId]]
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    logprobs: Scores = Field(default=None, description="Tell log-probabilities of tokens, and of so many at a place.")

    @property
    def scores(self) -> int | None:
        return self.logprobs


class TokenizeBody(Body):
    """POST /tokenize: the ids of a text, or of a conversation as the model reads it."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True
