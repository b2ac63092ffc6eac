"""Generation, canvas by canvas: denoise until stable, emit the arg-max, make it context, go on.

The final tokens of a canvas enter the context in the same pass that first denoises the next one. Everything random
comes from a `Noise`, so tokens depend neither on the batch nor on the layout. Semantics of transformers' `generate`.

Shapes: B rows, S prompt columns, C canvas positions, H hidden, N denoising steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, NoReturn, Protocol

import torch
from torch import Tensor

from nemo_diffgemma.diffusion.constraint import Allowed, Constraints, StepConstraint
from nemo_diffgemma.diffusion.locked_places import LockedPlaces
from nemo_diffgemma.diffusion.noise import CanvasNoise, Noise
from nemo_diffgemma.diffusion.progress import Denoised, Lookout, Progress
from nemo_diffgemma.diffusion.sampler import is_eos, pad_after
from nemo_diffgemma.diffusion.sampler_config import SamplerConfig
from nemo_diffgemma.transfer import to_device

__all__ = ["CanvasInputs", "Denoised", "DenoisedCanvas", "Denoiser", "Generation", "Settled", "StepInputs", "generate"]


@dataclass(frozen=True)
class StepInputs:
    """What one denoising step of a canvas of each sequence is given, besides the cached context.

    `canvas` [B, C] are the noised ids, `soft` [B, C, H] the self-conditioning signal of the step before (None at the
    first); `context` are ids that each sequence gets before its canvas, none for some or all. `temperature` and
    `entropy_bound` (nats) are the sampler's, numbers or float64 tensors: [], or a temperature for each sequence, [B]. A
    candidate is read at `uniforms` [B, C], what is not accepted becomes `replacements` [B, C]. After the `last` step
    nobody needs a signal. With a `constraint` the step says what it allows as well. `locked` [B, C] are ids that stand
    in the canvas, -1 where none does (`diffusion.locked`).
    """

    canvas: Tensor
    uniforms: Tensor
    replacements: Tensor
    temperature: float | Tensor
    entropy_bound: float | Tensor
    soft: Tensor | None = None
    context: Sequence[Tensor] | None = None
    last: bool = False
    constraint: StepConstraint | None = None
    locked: Tensor | None = None


class Settled(NamedTuple):
    """One denoising step with its sampling, [B, C] each; `soft` [B, C, H] is the next step's signal.

    `allowed` is the most probable canvas that the constraint allows, where there is a constraint.
    """

    canvas: Tensor
    argmax: Tensor
    entropy: Tensor
    accepted: Tensor
    soft: Any
    cache: Any
    allowed: Allowed | None = None


class Denoiser(Protocol):
    """What generation needs of a network or an engine."""

    def start(self, first_positions: Sequence[int]) -> Any:
        """A cache of sequences without context, whose first tokens will have these positions."""

    def sampling_step(self, inputs: StepInputs, cache: Any) -> Settled:
        """Denoise the canvases once after the cached and the new context, and sample."""

    def canvas_step(self, inputs: StepInputs, cache: Any) -> Settled:
        """The same without new context: what all steps of a canvas but the first are, of equal shapes all of them."""

    def agreed(self, flags: Tensor) -> Tensor:
        """Which of the flags hold on every rank, on the device: nobody waits for them."""

    def raise_non_finite(self, run: Callable[[], Any]) -> NoReturn:
        """Raise an error that names what is not finite first when `run` does again what gave NaN or infinity."""


@dataclass(frozen=True)
class CanvasInputs:
    """What the denoising of one canvas of each sequence is given: `index` counts canvases from 0.

    `context` are the ids that each sequence gets before it, `finished_B` the sequences that have met an EOS id;
    `noise` are the numbers of all its steps, `temperatures_N` [N] and `entropy_bound` [] float64 on the device. Some of
    the sequences may have a `constraint`, or ids `locked` [B, C], -1 where none is.
    """

    index: int
    context: Sequence[Tensor]
    finished_B: Tensor
    sampler: SamplerConfig
    noise: CanvasNoise
    temperatures_N: Tensor
    entropy_bound: Tensor
    constraint: StepConstraint | None = None
    locked: Tensor | None = None


class DenoisedCanvas(NamedTuple):
    """A canvas of each sequence after its last step.

    `tokens` [B, C], the cache with the context before them, live steps of each row [B], and whether all entropies of
    the steps were finite, [] bool.
    """

    tokens: Tensor
    cache: Any
    live: Tensor
    finite: Tensor


@dataclass(frozen=True)
class Generation:
    """Result: `sequences` [B, S + generated]; for each row the live denoising steps, and tokens for each of them."""

    sequences: Tensor
    forwards: Tensor
    tokens_per_forward: Tensor


def generate(
    network: Denoiser,
    input_ids: Tensor,
    left_padding: Sequence[int],
    *,
    canvas_length: int,
    max_new_tokens: int,
    sampler: SamplerConfig,
    noise: Noise,
    observe: Callable[[Denoised], None] | None = None,
    constraints: Constraints | None = None,
    locked: Sequence[Mapping[int, int]] = (),
    denoise_canvas: Callable[[CanvasInputs, Any], DenoisedCanvas] | None = None,
) -> Generation:
    """Generate whole canvases until `max_new_tokens` are reached (rounded up) or every row has met an EOS id.

    Left padding ends here: a row behind three columns of it is a sequence that starts at position 3. `observe` is
    called after every step. With `constraints` a denoiser's steps must say what they allow. `locked` has for each row
    ids by their place behind the prompt; an EOS id before the last of them ends nothing. `denoise_canvas` is for an
    engine that runs all steps of a canvas in one call; it gives what `stepwise` does. NaN and infinity, in weights or
    activations, end in the error of `Denoiser.raise_non_finite`.
    """
    rows, prompt = input_ids.shape
    device = input_ids.device
    finished_B = torch.zeros(rows, dtype=torch.bool, device=device)
    forwards_B = torch.zeros(rows, dtype=torch.long, device=device)
    scalars = to_device(torch.tensor([*sampler.temperatures, sampler.entropy_bound], dtype=torch.float64), device)
    cache = network.start(left_padding)
    context = [row[columns:] for row, columns in zip(input_ids.unbind(), left_padding, strict=True)]
    sequences, places = input_ids, LockedPlaces(locked, canvas_length, device)
    for index in range(-(-max_new_tokens // canvas_length)):
        drawn = CanvasNoise.of(noise, index, sampler.max_denoising_steps, device)
        told = None if constraints is None else constraints.of_canvas()
        given = (scalars[:-1], scalars[-1], told, places.of_canvas(index))
        inputs = CanvasInputs(index, context, finished_B, sampler, drawn, *given)
        denoise = denoise_canvas or partial(stepwise, network, observe=observe)
        again = partial(denoise, inputs, cache)
        final_BC, cache, live_B, finite = again()
        forwards_B += live_B
        if constraints is not None:
            constraints.advance(final_BC)
        ends_BC = places.may_end(index, is_eos(final_BC, sampler.eos_ids))
        final_BC, finished_B = _ended(final_BC, ends_BC, finished_B, sampler)
        sequences, context = torch.cat([sequences, final_BC], dim=1), list(final_BC.unbind())
        # the one wait of a canvas
        all_finished, all_finite = network.agreed(torch.stack([finished_B.all(), finite])).tolist()
        if not all_finite:
            network.raise_non_finite(again)
        if all_finished:
            break
    new = sequences[:, prompt:]
    # a tensor in either case: an int divided by a tensor is rounded twice
    pad = sampler.pad_token_id
    emitted_B = torch.full_like(forwards_B, new.shape[1]) if pad is None else (new != pad).sum(1)
    return Generation(sequences, forwards_B, emitted_B / forwards_B.clamp_min(1))


def _ended(final_BC: Tensor, ends_BC: Tensor, finished_B: Tensor, sampler: SamplerConfig) -> tuple[Tensor, Tensor]:
    """The canvases with padding behind `ends_BC` and in rows that were finished before, and the rows finished now."""
    if not sampler.eos_ids:
        return final_BC, finished_B
    finished_now_B = finished_B | ends_BC.any(-1)
    if sampler.pad_token_id is not None:
        final_BC = pad_after(final_BC, ends_BC, sampler.pad_token_id)
        final_BC = final_BC.masked_fill(finished_B[:, None], sampler.pad_token_id)
    return final_BC, finished_now_B


def stepwise(
    network: Denoiser, inputs: CanvasInputs, cache: Any, observe: Callable[[Denoised], None] | None
) -> DenoisedCanvas:
    """Denoise one canvas of each sequence, until all are stable or have had all steps."""
    steps, noise = inputs.sampler.max_denoising_steps, inputs.noise
    progress = Progress(inputs.sampler, noise.initial, inputs.finished_B, network.agreed)
    lookout = Lookout(observe, Lookout.steps_behind(noise.initial.device))
    canvas_BC, soft, locked = noise.initial, None, inputs.locked
    if locked is not None:
        canvas_BC = torch.where(locked < 0, canvas_BC, locked)
    for step in range(steps):
        given = StepInputs(
            canvas=canvas_BC,
            uniforms=noise.uniforms[step],
            replacements=noise.replacements[step],
            temperature=inputs.temperatures_N[step],
            entropy_bound=inputs.entropy_bound,
            soft=soft,
            context=inputs.context if step == 0 else None,
            last=step == steps - 1,
            constraint=inputs.constraint,
            locked=locked,
        )
        settled = network.sampling_step(given, cache) if step == 0 else network.canvas_step(given, cache)
        soft, cache = settled.soft, settled.cache
        progress.advance(settled.argmax, settled.entropy, settled.allowed)
        canvas_BC = progress.guided_canvas(settled.canvas, settled.accepted, settled.allowed)
        seen = (progress.best_BC, settled.accepted, settled.entropy, progress.done_B)
        lookout.add(Denoised(inputs.index, steps - step, *seen), progress.is_over)
        if step < steps - 1 and lookout.sees_the_end():
            break
    else:
        lookout.close()
    return DenoisedCanvas(progress.best_BC, cache, progress.live_B, progress.finite)
