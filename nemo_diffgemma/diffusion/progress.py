"""How far a canvas of each sequence has come: kept on the device, seen by the host some steps late.

A GPU computes a step while the host enqueues the next one. So whatever decides when a canvas is finished is a tensor
that nobody waits for, and the host looks at the flag of a step once it has enqueued `STEPS_BEHIND` more of them. What
was enqueued beyond the end changes nothing: `Progress` ignores it, and no observer hears of it. Every rank looks at the
same flag after the same step, and that flag is one on which all ranks agree, so all leave the loop together.

A sequence with a constraint is denoised as if it had none, and so gets the answer that it would have had, where that is
allowed. A canvas that would be finished but is not allowed is guided from then on: what is accepted gets the tokens of
the most probable canvas that is allowed, until that one is stable or there are no more steps.

Shapes: B rows, C canvas positions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemo_diffgemma.diffusion.constraint import Allowed
from nemo_diffgemma.diffusion.sampler import StableAndConfident
from nemo_diffgemma.diffusion.sampler_config import SamplerConfig
from nemo_diffgemma.transfer import LateFlag

STEPS_BEHIND = 1  # of a GPU: enough for it to be busy always, and at most one step a canvas is computed for nothing


class Denoised(NamedTuple):
    """One denoising step as an observer sees it, [B, C] each but `done` [B]."""

    canvas: int
    remaining: int
    argmax: Tensor
    accepted: Tensor
    entropy: Tensor
    done: Tensor


class Progress:
    """One canvas of each sequence while it is denoised.

    `best_BC` are its tokens so far: a row that is done (`done_B`) keeps its own. `live_B` counts the steps of each row
    until then, none for the rows of `finished_B`; `finite` [] says whether all entropies were. `is_over` [] is set once
    all rows are done on every rank: what comes later is ignored. `guided_B` are those that their constraint guides.
    """

    def __init__(
        self, sampler: SamplerConfig, canvas_BC: Tensor, finished_B: Tensor, agreed: Callable[[Tensor], Tensor]
    ) -> None:
        self._stop, self._finished_B, self._agreed = StableAndConfident(sampler), finished_B, agreed
        self.best_BC = canvas_BC
        self.done_B = torch.zeros_like(finished_B)
        self.guided_B = self.done_B
        self.live_B = torch.zeros_like(finished_B, dtype=torch.long)
        self.finite = torch.ones((), dtype=torch.bool, device=finished_B.device)
        self.is_over = torch.zeros_like(self.finite)

    def advance(self, argmax_BC: Tensor, entropy_BC: Tensor, allowed: Allowed | None = None) -> None:
        """Take the result of one more step."""
        self.live_B = self.live_B + ~(self.done_B | self._finished_B)
        watched_BC, allowed_BC = argmax_BC, argmax_BC
        if allowed is not None:
            allowed_BC = allowed.tokens
            watched_BC = torch.where(self.guided_B[:, None], allowed_BC, argmax_BC)
        stable_B = self._stop(torch.where(self.done_B[:, None], self.best_BC, watched_BC), entropy_BC)
        self.best_BC = torch.where(self.done_B[:, None], self.best_BC, allowed_BC)
        if allowed is None:
            self.done_B = self.done_B | stable_B
        else:
            self.done_B = self.done_B | (stable_B & (self.guided_B | allowed.is_argmax))
            self.guided_B = self.guided_B | (stable_B & ~self.done_B)
        self.finite = self.finite & (entropy_BC.isfinite().all() | self.is_over)
        self.is_over = self._agreed(self.done_B.all())

    def guided_canvas(self, canvas_BC: Tensor, accepted_BC: Tensor, allowed: Allowed | None) -> Tensor:
        """The canvas of the next step: of guided rows, what was accepted are tokens that are allowed."""
        if allowed is None:
            return canvas_BC
        return torch.where(self.guided_B[:, None] & accepted_BC, allowed.tokens, canvas_BC)


class Lookout:
    """What the host knows of the steps that it has enqueued: an observation and a flag of each, `behind` steps late."""

    def __init__(self, observe: Callable[[Denoised], Any] | None, behind: int) -> None:
        self._observe, self._behind = observe, behind
        self._pending: deque[tuple[Denoised, LateFlag]] = deque()

    @staticmethod
    def steps_behind(device: torch.device) -> int:
        """How late flags are looked at; at once on a CPU, which has computed a step before the next is asked for."""
        return STEPS_BEHIND if device.type == "cuda" else 0

    def add(self, step: Denoised, is_over: Tensor) -> None:
        """A step that was enqueued, and whether the canvases are finished with it."""
        self._pending.append((step, LateFlag(is_over)))

    def sees_the_end(self) -> bool:
        """Whether the canvases were finished `behind` steps ago; what was enqueued since is for nothing."""
        return len(self._pending) > self._behind and self._next_is_the_last()

    def close(self) -> None:
        """After the last step there is: let the observer see the rest."""
        while self._observe is not None and self._pending and not self._next_is_the_last():
            pass

    def _next_is_the_last(self) -> bool:
        step, is_over = self._pending.popleft()
        if self._observe is not None:
            self._observe(step)
        return bool(is_over)
