"""Rows of a batch that denoise at steps of their own: what each keeps from step to step, and what it draws.

Rules and noise are those of `diffusion.generate` for a row alone, keyed by its seed and sample 0.

Shapes: B rows, C canvas positions, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from export.engine.engine import Context, Engine
from nemo_diffgemma.diffusion.generate import Settled
from nemo_diffgemma.diffusion.noise import INITIAL, REPLACEMENT, UNIFORM, keyed_bits, to_ids, to_uniforms
from nemo_diffgemma.serving.request import Request
from nemo_diffgemma.transfer import to_device


class State(NamedTuple):
    """Of a row after a step, or with one more axis of all rows of a batch."""

    canvas: Tensor  # noised ids, [C]
    soft: Tensor  # self-conditioning signal, [C, H]
    best: Tensor  # arg-max of the last step, or of that which settled the canvas, [C]
    unchanged: Tensor  # steps before the last that had its arg-max, []
    live: Tensor  # steps until it was done, []
    done: Tensor  # []


@dataclass(eq=False)
class Row:
    """Where a request stands. Its context is the prompt, then the canvases that have settled."""

    request: Request
    context: Context
    canvas: int = 0  # which is being denoised
    step: int = 0  # steps of it that have been enqueued
    accepted: int = 0  # cells of it, by all steps whose results are known
    answer: list[int] = field(default_factory=list)
    state: State = field(init=False, repr=False)  # after its last step

    @property
    def reads_prompt(self) -> bool:
        """Whether some of its prompt is not encoded yet."""
        return self.context.length < len(self.request.prompt)

    @property
    def misses_canvas(self) -> bool:
        """Whether the canvas before this one is not encoded yet."""
        return self.context.length < len(self.request.prompt) + self.canvas * self.request.canvas_length

    @property
    def had_all_steps(self) -> bool:
        return self.step == self.request.sampler.max_denoising_steps


class Rows:
    """One step of a batch: its inputs, and what is kept of its result."""

    def __init__(self, rows: Sequence[Row], engine: Engine) -> None:
        self._rows = rows
        config, device = engine.model_config, engine.device
        self._vocabulary = config.vocab_size
        self._position_C = torch.arange(config.canvas_length, device=device)
        samplers = [row.request.sampler for row in rows]
        remaining = [sampler.max_denoising_steps - row.step for row, sampler in zip(rows, samplers, strict=True)]
        whole = [
            (row.request.seed, row.canvas, left, row.step == 0, sampler.stability_threshold)
            for row, left, sampler in zip(rows, remaining, samplers, strict=True)
        ]
        reals = [
            (sampler.temperature(left), sampler.entropy_bound, sampler.confidence_threshold)
            for left, sampler in zip(remaining, samplers, strict=True)
        ]
        numbers = to_device(torch.tensor(whole, dtype=torch.int64), device).unbind(1)
        self._seed_B1, self._canvas_B1, self._remaining_B1 = (number[:, None] for number in numbers[:3])
        self._first_B, self._wanted_B = numbers[3].bool(), numbers[4]
        # numbers of the host, rounded to float32 where `diffusion.generate` rounds them
        self.temperature_B, self.bound_B, threshold_B = to_device(
            torch.tensor(reals, dtype=torch.float64), device
        ).unbind(1)
        self._threshold_B = threshold_B.float()
        self.canvas_BC, self.soft_BCH, self._before = self._inputs(engine)

    def _inputs(self, engine: Engine) -> tuple[Tensor, Tensor, State | None]:
        """Ids and signals of the step, and the state before; a canvas that begins is noise, and has no signal."""
        initial_BC = to_ids(self._bits(INITIAL, 0), self._vocabulary)
        if all(row.step == 0 for row in self._rows):
            return initial_BC, engine.no_signal(len(self._rows)), None
        first = next(row.state for row in self._rows if row.step)
        states = [row.state if row.step else first for row in self._rows]  # what stands for none is not looked at
        before = State(*(torch.stack(parts) for parts in zip(*states, strict=True)))
        canvas_BC = torch.where(self._first_B[:, None], initial_BC, before.canvas)
        return canvas_BC, before.soft.masked_fill(self._first_B[:, None, None], 0.0), before

    def _bits(self, purpose: int, remaining: Tensor | int) -> Tensor:
        return keyed_bits(self._seed_B1, 0, purpose, self._canvas_B1, remaining, self._position_C)

    def uniforms(self) -> Tensor:
        """Where the inverse CDF is read, [B, C]."""
        return to_uniforms(self._bits(UNIFORM, self._remaining_B1))

    def replacements(self) -> Tensor:
        """Ids for what is not accepted, [B, C]."""
        return to_ids(self._bits(REPLACEMENT, self._remaining_B1), self._vocabulary)

    def advance(self, found: Settled) -> Tensor:
        """Keep the result of the step -> done, finite, live, accepted cells and best of each row, [B, 4 + C]."""
        first_B, before = self._first_B, self._before
        never_B = torch.zeros_like(first_B)
        best_BC, unchanged_B, live_B, done_B = found.argmax, never_B.long(), never_B.long(), never_B
        if before is not None:
            done_B = before.done & ~first_B
            best_BC = torch.where(done_B[:, None], before.best, found.argmax)
            same_B = (best_BC == before.best).all(-1) & ~first_B
            unchanged_B = torch.where(same_B, before.unchanged + 1, 0)
            live_B = torch.where(first_B, 0, before.live)
        live_B = live_B + ~done_B
        finite_B = found.entropy.isfinite().all(-1) | done_B
        confident_B = found.entropy.mean(-1) < self._threshold_B
        done_B = done_B | ((unchanged_B >= self._wanted_B) & confident_B)
        after = State(found.canvas, found.soft, best_BC, unchanged_B, live_B, done_B)
        for row, *parts in zip(self._rows, *(part.unbind() for part in after), strict=True):
            row.state = State(*parts)
        return torch.cat([torch.stack([done_B, finite_B, live_B, found.accepted.sum(1)], dim=1), best_BC], dim=1)
