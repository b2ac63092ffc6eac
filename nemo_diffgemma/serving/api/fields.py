"""Bodies of requests. Fields that mean nothing here are refused by name; null is as good as absent."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import Field

from nemo_diffgemma.serving.api.body import Body, ListOf
from nemo_diffgemma.serving.api.conversation import Message
from nemo_diffgemma.serving.api.response_format import ResponseFormat, TextFormat, refused_as
from nemo_diffgemma.serving.api.tools import Offer, Tool, ToolChoice
from nemo_diffgemma.serving.constraints import Language, after_thought, choice, json_of_schema, regex
from nemo_diffgemma.serving.failures import InvalidRequest
from nemo_diffgemma.serving.request import MOST_SCORES

Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Scores = Annotated[int, Field(ge=0, le=MOST_SCORES)] | None
StopString = Annotated[str, Field(min_length=1, max_length=1000)]

# Settings of models that choose one token after another: taken, since clients send them unasked, and named in the
# answer as ignored. A canvas is sampled by `diffusion.t_min` and `t_max` instead.
IGNORED = ("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")


class Diffusion(Body):
    """How a canvas is sampled; what is left out is as the checkpoint has it. Bounds and thresholds are in nats."""

    max_denoising_steps: int | None = Field(default=None, description="The most steps of a canvas.")
    entropy_bound: float | None = Field(default=None, description="What entropies of accepted positions sum to.")
    t_min: float | None = Field(default=None, description="Temperature of the last step, nearly.")
    t_max: float | None = Field(default=None, description="Temperature of the first step.")
    stability_threshold: int | None = Field(default=None, description="Steps without a change that settle a canvas.")
    confidence_threshold: float | None = Field(default=None, description="Mean entropy below which it may settle.")
    canvas_length: int | None = Field(default=None, description="Tokens of a canvas; short ones suit short answers.")

    regex: str | None = Field(default=None, description="The answer's text is a match of it, as Python's fullmatch.")
    choice: ListOf[str] | None = Field(default=None, description="The answer's text is one of these.")
    json_schema: dict[str, Any] | bool | None = Field(default=None, description="It is JSON that this schema accepts.")

    def sampler(self) -> dict[str, Any]:
        """What is given of the settings of the sampler."""
        return self.model_dump(include=_OF_SAMPLER, exclude_none=True)

    @property
    def language(self) -> Language | None:
        """What the answer's text must be. Raises `InvalidRequest` for what a constraint cannot express."""
        makers = {"regex": regex, "choice": choice, "json_schema": json_of_schema}
        given = [name for name in makers if getattr(self, name) is not None]
        if len(given) > 1:
            what = f"diffusion.{given[0]} and diffusion.{given[1]} cannot be had at once"
            raise InvalidRequest(what, "invalid_value", f"diffusion.{given[1]}")
        return refused_as(f"diffusion.{given[0]}", makers[given[0]], getattr(self, given[0])) if given else None


_OF_SAMPLER = {"max_denoising_steps", "entropy_bound", "t_min", "t_max", "stability_threshold", "confidence_threshold"}


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
    stop: StopString | Annotated[ListOf[StopString], Field(max_length=16)] = []
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
    def has_parts(self) -> bool:
        """Whether its answer is a chat's, of thoughts, calls of tools and what is said; else all of it is text."""
        return False

    @cached_property
    def language(self) -> Language | None:
        """What the whole answer must be. It may take a while. Raises `InvalidRequest`."""
        return self.diffusion.language

    @property
    def may_be_held(self) -> bool:
        """Whether it can have a language: else none needs to be made."""
        return any(getattr(self.diffusion, name) is not None for name in ("regex", "choice", "json_schema"))

    def without_content(self) -> Self:
        """All that `language` is made of, without what is long."""
        content = ("messages", "prompt", "text", "token_ids")
        return self.model_copy(update={name: None for name in content if name in type(self).model_fields})

    def know(self, language: Language | None) -> None:
        """It was made elsewhere."""
        self.__dict__["language"] = language  # where `cached_property` has it

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
        given = [name for name in IGNORED if getattr(self, name) is not None]
        given += ["store"] if self.store else []
        return given + (["stream_options.include_obfuscation"] if self.stream_options.include_obfuscation else [])


class Templated(Body):
    """What a chat template gets besides the messages."""

    tools: ListOf[Tool] = []
    tool_choice: ToolChoice | None = Field(
        default=None, description="Without it: auto. none hides the tools from the model; other choices force a call."
    )
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = Field(
        default=None, description="Any but none: the model thinks first. How much, it decides itself."
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default={}, description="Variables of the model's own template; enable_thinking: true lets it think first."
    )

    @property
    def template_variables(self) -> dict[str, Any]:
        """Raises `InvalidRequest`."""
        given = dict(self.chat_template_kwargs)
        if self.reasoning_effort is not None:
            given.setdefault("enable_thinking", self.reasoning_effort != "none")
        for name in ("messages", "tools", "add_generation_prompt"):
            if name in given:
                where = f"chat_template_kwargs.{name}"
                raise InvalidRequest(f"{where} is for the server to say", "invalid_value", where)
        if self.tools and self.tool_choice != "none":
            given["tools"] = [tool.for_template() for tool in self.tools]
        return given


class ChatBody(Common, Templated):
    """POST /v1/chat/completions"""

    messages: ListOf[Message] = Field(min_length=1)
    parallel_tool_calls: bool = Field(default=True, description="An answer may have several calls.")
    response_format: ResponseFormat = Field(
        default=TextFormat(type="text"), description="What the text must be, behind a thought where there is one."
    )
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = Field(
        default=None, description="The most tokens of an answer. max_tokens beside it is ignored."
    )
    logprobs: bool = Field(default=False, description="Tell each token's log-probability where its canvas settled.")
    top_logprobs: Scores = Field(default=None, description="And those of so many ids at its place.")

    @property
    def has_parts(self) -> bool:
        return True

    @property
    def ignored(self) -> list[str]:
        return super().ignored + (["max_tokens"] if self.max_tokens and self.max_completion_tokens else [])

    @cached_property
    def offer(self) -> Offer:
        """Raises `InvalidRequest`."""
        return Offer.of(self.tools, self.tool_choice, self.parallel_tool_calls)

    @property
    def may_be_held(self) -> bool:
        """Raises `InvalidRequest`."""
        return super().may_be_held or self.response_format.type != "text" or self.offer.may_hold

    @cached_property
    def language(self) -> Language | None:
        """Of calls that are forced, or of the text. Raises `InvalidRequest`."""
        of_format, of_diffusion = self.response_format.language, self.diffusion.language
        if of_format is not None and of_diffusion is not None:
            raise InvalidRequest(
                "response_format and diffusion both say what the text must be", "invalid_value", "response_format"
            )
        of_text = of_format or of_diffusion
        if of_text is not None and self.offer.tools and not self.offer.is_forced:
            raise InvalidRequest(
                "an answer that may call tools cannot be held to a format of text as well; give tool_choice: none for "
                "the text, or required for calls",
                "invalid_value",
                "response_format" if of_format else "diffusion",
            )
        language = refused_as("tools", lambda: self.offer.language) or of_text
        if language is not None and self.template_variables.get("enable_thinking"):
            return after_thought(language)
        return language

    @property
    def scores(self) -> int | None:
        """Raises `InvalidRequest`."""
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true", "invalid_value", "top_logprobs")
        return self.top_logprobs or 0 if self.logprobs else None


class CompletionBody(Common):
    """POST /v1/completions"""

    prompt: str | ListOf[TokenId] | ListOf[str] | ListOf[ListOf[TokenId]]
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    logprobs: Scores = Field(default=None, description="Tell log-probabilities of tokens, and of so many at a place.")

    @property
    def scores(self) -> int | None:
        return self.logprobs


class TokenizeBody(Templated):
    """POST /tokenize: the ids of a text, or of a conversation as the model reads it."""

    model: str | None = None
    prompt: str | None = None
    messages: ListOf[Message] | None = None
    add_special_tokens: bool = True
