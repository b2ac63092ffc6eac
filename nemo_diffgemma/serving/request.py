"""What a client asks of the engine, and what it hears of it: msgspec structs, which travel as they are.

No torch here: the front end sends and reads them.
"""

from __future__ import annotations

from enum import Enum

import msgspec
from msgspec import Struct

from nemo_diffgemma.config import ModelConfig
from nemo_diffgemma.diffusion.locked import check_locked
from nemo_diffgemma.diffusion.sampler_config import SamplerConfig
from nemo_diffgemma.diffusion.seeds import check_seed
from nemo_diffgemma.errors import UserError
from nemo_diffgemma.serving.constraints.languages import Language

MOST_SCORES = 20  # of the most probable ids at a place, as OpenAI's API has it


class Request(Struct, frozen=True, tag=True):
    """A prompt and everything that its answer depends on; nothing else does.

    The answer has whole canvases of `canvas_length` until one has a token that ends it, a string of `stop` appears in
    its text, or `max_tokens` are reached, at which it is cut. `drafts` asks for a report of every denoising step.

    `locked` maps positions of the answer, from 0, to ids that stand there from the first step on. An end-of-sequence
    token before the last of them does not end the answer.

    The answer is a text of `language`, whole: it ends within `max_tokens`, and the reason is STOP in every case. With
    either there is no `stop`, which would cut it. A replica compiles the language before it accepts the request; it
    refuses what cannot be compiled in time, what has no text of `max_tokens` or fewer with the `locked` tokens in their
    places, and every language where it has no tokenizer. `serving.untrusted` reads a finished answer once more.

    `adapter` is the name of one that the replica has. `logprobs` asks for the probability of each token
    of a settled canvas, and of so many of the most probable ids at its place. With `chat` the answer may have thoughts
    and calls of tools, in which `stop` is not looked for.
    """

    id: str
    prompt: tuple[int, ...]
    max_tokens: int
    canvas_length: int
    sampler: SamplerConfig = msgspec.field(default_factory=SamplerConfig)
    seed: int = 0
    stop: tuple[str, ...] = ()
    drafts: bool = False
    locked: dict[int, int] = msgspec.field(default_factory=dict)
    language: Language | None = None
    adapter: str | None = None
    logprobs: int | None = None
    chat: bool = False

    def check(self, model: ModelConfig) -> None:
        """Raise `UserError` for what this network can never answer."""
        if not self.prompt:
            raise UserError(f"the prompt has no token; give at least <bos>, id {model.bos_token_id}")
        low, high = min(self.prompt), max(self.prompt)
        if low < 0 or high >= model.vocab_size:
            raise UserError(f"token ids of the prompt range from {low} to {high}; this model has {model.vocab_size}")
        if self.max_tokens < 1:
            raise UserError(f"max_tokens={self.max_tokens}; expected at least 1")
        if not 1 <= self.canvas_length <= model.canvas_length:
            raise UserError(f"canvas_length={self.canvas_length}; expected 1 to {model.canvas_length}")
        check_seed(self.seed)
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_SCORES:
            raise UserError(f"logprobs={self.logprobs}; expected 0 to {MOST_SCORES}, or none")
        self.sampler.check_ids(model.vocab_size)
        check_locked(self.locked, self.max_tokens, model.vocab_size)
        if self.stop and (self.language is not None or self.locked):
            what = "locked places" if self.language is None else f"a language ({self.language.kind})"
            raise UserError(f"stop={self.stop[0]!r} would cut an answer with {what}; leave one of them out")

    @property
    def earliest_end(self) -> int:
        """The first position of the answer at which an end-of-sequence id ends it: what is locked is reached."""
        return max(self.locked, default=0)

    @property
    def canvases(self) -> int:
        """The most canvases that the answer can have."""
        return -(-self.max_tokens // self.canvas_length)

    @property
    def most_context(self) -> int:
        """The most tokens that ever are its context."""
        return len(self.prompt) + (self.canvases - 1) * self.canvas_length


class Reason(Enum):
    """Why an answer ends, as OpenAI's API names it."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


class Draft(Struct, frozen=True, tag=True):
    """A canvas after one of its steps: `remaining` more may follow. Entropies are in nats."""

    id: str
    canvas: int
    remaining: int
    tokens: list[int]
    accepted: list[bool]
    entropy: list[float]


class Scores(Struct, frozen=True):
    """A settled token's log-probability in the last step of its canvas, untempered, and the largest at its place."""

    logprob: float
    top: list[tuple[int, float]]


class Settled(Struct, frozen=True, tag=True):
    """New tokens of an answer: a canvas that will not change, up to what ends the answer; `steps` it took.

    `accepted` counts the cells that its steps have accepted, all steps together, the others became noise again.
    `scores` has an entry a token where the request asks for them.
    """

    id: str
    canvas: int
    steps: int
    tokens: list[int]
    scores: list[Scores] | None = None
    accepted: int = 0


class Finished(Struct, frozen=True, tag=True):
    """The last that is heard of a request; `error` says what is wrong where that is the reason."""

    id: str
    reason: Reason
    prompt_tokens: int
    cached_tokens: int
    error: str | None = None


Event = Draft | Settled | Finished
