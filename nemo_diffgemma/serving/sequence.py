"""A request that is being answered."""

from __future__ import annotations

from dataclasses import dataclass, field

from nemo_diffgemma.diffusion.locked_places import cells_of
from nemo_diffgemma.serving.constraints.sequence import ConstrainedSequence
from nemo_diffgemma.serving.context_memory import Held
from nemo_diffgemma.serving.request import Request
from nemo_diffgemma.serving.slots import Turn


@dataclass(eq=False)
class Sequence:
    """Where a request stands. Its context is the prompt, then the canvases that have settled."""

    request: Request
    held: Held
    slot: int
    cached: int  # tokens of its prompt that need not be encoded
    arrival: int  # requests are numbered as they come
    canvas: int = 0  # which is being denoised
    step: int = 0  # steps of it that have been enqueued
    accepted: int = 0  # cells of it, by all steps whose results are known
    answer: list[int] = field(default_factory=list)
    constraint: ConstrainedSequence | None = None

    @property
    def context(self) -> int:
        """Tokens of context that the canvas needs before it."""
        return len(self.request.prompt) + self.canvas * self.request.canvas_length

    @property
    def missing(self) -> int:
        """Of these, how many are not encoded yet."""
        return self.context - self.held.end

    @property
    def encodes(self) -> bool:
        """Whether some of its prompt is missing."""
        return self.held.end < len(self.request.prompt)

    @property
    def had_all_steps(self) -> bool:
        return self.step == self.request.sampler.max_denoising_steps

    def turn(self) -> Turn:
        """Its next denoising step."""
        request, length = self.request, self.request.canvas_length
        locked = cells_of(request.locked, self.canvas, length)
        return Turn(self.slot, length, self.canvas, self.step, request.seed, request.sampler, locked)

    def settle(self, tokens: list[int]) -> None:
        """Go on behind a canvas that has settled and does not end the answer."""
        if self.constraint is not None:
            self.constraint.settle(tokens)
        self.canvas, self.step, self.accepted = self.canvas + 1, 0, 0
