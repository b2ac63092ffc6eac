"""Generation, canvas by canvas: denoise until stable, emit the arg-max, make it context, go on.

The final tokens of a canvas enter the context in the same pass that first denoises the next one. Everything random
comes from a `Noise`, so tokens depend neither on the batch nor on the layout. Semantics of transformers' `generate`.

Shapes: B rows, S prompt columns, C canvas positions, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, NoReturn, Protocol

import torch
from torch import Tensor

from nemo_diffgemma.diffusion.noise import Noise
from nemo_diffgemma.diffusion.sampler import SamplerConfig, StableAndConfident, pad_after_eos


@dataclass(frozen=True)
class StepInputs:
    """What one denoising step of a canvas of each sequence is given, besides the cached context.

    `canvas` [B, C] are the noised ids, `soft` [B, C, H] the self-conditioning signal of the step before (None at the
    first); `context` are ids that each sequence gets before its canvas, none for some or all. `temperature` and
    `entropy_bound` (nats) are the sampler's; a candidate is read at `uniforms` [B, C], what is not accepted becomes
    `replacements` [B, C]. After the `last` step nobody needs a signal.
    """

    canvas: Tensor
    uniforms: Tensor
    replacements: Tensor
    temperature: float
    entropy_bound: float
    soft: Tensor | None = None
    context: Sequence[Tensor] | None = None
    last: bool = False


class Settled(NamedTuple):
    """One denoising step with its sampling, [B, C] each; `soft` [B, C, H] is the next step's signal."""

    canvas: Tensor
    argmax: Tensor
    entropy: Tensor
    accepted: Tensor
    soft: Any
    cache: Any


class Denoiser(Protocol):
    """What generation needs of a network or an engine."""

    def start(self, first_positions: Sequence[int]) -> Any:
        """A cache of sequences without context, whose first tokens will have these positions."""

    def sampling_step(self, inputs: StepInputs, cache: Any) -> Settled:
        """Denoise the canvases once after the cached and the new context, and sample."""

    def agree(self, flag: bool) -> bool:
        """Whether `flag` holds on every rank."""

    def raise_non_finite(self, run: Callable[[], Any]) -> NoReturn:
        """Raise an error that names what is not finite first when `run` does again what gave NaN or infinity."""


@dataclass(frozen=True)
class CanvasInputs:
    """What the denoising of one canvas of each sequence is given: `index` counts canvases from 0.

    `context` are the ids that each sequence gets before it, `finished_B` the sequences that have met an EOS id.
    """

    index: int
    context: Sequence[Tensor]
    finished_B: Tensor
    sampler: SamplerConfig
    noise: Noise


class DenoisedCanvas(NamedTuple):
    """A canvas of each sequence after its last step.

    `tokens` [B, C], the cache with the context before them, live steps of each row [B], and whether all entropies of
    the steps were finite, [] bool.
    """

    tokens: Tensor
    cache: Any
    live: Tensor
    finite: Tensor


class Denoised(NamedTuple):
    """One denoising step as an observer sees it, [B, C] each but `done` [B]."""

    canvas: int
    remaining: int
    argmax: Tensor
    accepted: Tensor
    entropy: Tensor
    done: Tensor


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
    denoise_canvas: Callable[[CanvasInputs, Any], DenoisedCanvas] | None = None,
) -> Generation:
    """Generate whole canvases until `max_new_tokens` are reached (rounded up) or every row has met an EOS id.

    Left padding ends here: a row behind three columns of it is a sequence that starts at position 3. `observe` is
    called after every step. `denoise_canvas` is for an engine that runs all steps of a canvas in one call; it gives
    what `stepwise` does. NaN and infinity, in weights or activations, end in the error of `Denoiser.raise_non_finite`.
    """
    rows, prompt = input_ids.shape
    finished_B = torch.zeros(rows, dtype=torch.bool, device=input_ids.device)
    forwards_B = torch.zeros(rows, dtype=torch.long, device=input_ids.device)
    cache = network.start(left_padding)
    context = [row[columns:] for row, columns in zip(input_ids.unbind(), left_padding, strict=True)]
    sequences = input_ids
    for index in range(-(-max_new_tokens // canvas_length)):
        denoise = denoise_canvas or partial(stepwise, network, observe=observe)
        again = partial(denoise, CanvasInputs(index, context, finished_B, sampler, noise), cache)
        final_BC, cache, live_B, finite = again()
        forwards_B += live_B
        finished_before_B = finished_B
        if sampler.eos_ids:
            has_eos_B = torch.isin(final_BC, torch.tensor(sampler.eos_ids, device=final_BC.device)).any(-1)
            finished_B = finished_B | has_eos_B
            if sampler.pad_token_id is not None:
                final_BC = pad_after_eos(final_BC, sampler.eos_ids, sampler.pad_token_id)
                final_BC = final_BC.masked_fill(finished_before_B[:, None], sampler.pad_token_id)
        sequences, context = torch.cat([sequences, final_BC], dim=1), list(final_BC.unbind())
        all_finished, all_finite = torch.stack([finished_B.all(), finite]).tolist()  # one wait for the host
        if not network.agree(all_finite):
            network.raise_non_finite(again)
        if network.agree(all_finished):
            break
    new = sequences[:, prompt:]
    # a tensor in either case: an int divided by a tensor is rounded twice
    pad = sampler.pad_token_id
    emitted_B = torch.full_like(forwards_B, new.shape[1]) if pad is None else (new != pad).sum(1)
    return Generation(sequences, forwards_B, emitted_B / forwards_B.clamp_min(1))


def stepwise(
    network: Denoiser, inputs: CanvasInputs, cache: Any, observe: Callable[[Denoised], None] | None
) -> DenoisedCanvas:
    """Denoise one canvas of each sequence, until all are stable or have had all steps."""
    index, sampler, finished_B = inputs.index, inputs.sampler, inputs.finished_B
    device = finished_B.device
    canvas_BC = inputs.noise.initial(index).to(device)
    done_B, live_B = torch.zeros_like(finished_B), torch.zeros_like(finished_B, dtype=torch.long)
    stop = StableAndConfident(sampler)
    best_BC, soft = canvas_BC, None
    finite = torch.ones((), dtype=torch.bool, device=device)
    for remaining in range(sampler.max_denoising_steps, 0, -1):
        live_B += ~(done_B | finished_B)
        step = StepInputs(
            canvas=canvas_BC,
            uniforms=inputs.noise.uniforms(index, remaining).to(device),
            replacements=inputs.noise.replacements(index, remaining).to(device),
            temperature=sampler.temperature(remaining),
            entropy_bound=sampler.entropy_bound,
            soft=soft,
            context=inputs.context if remaining == sampler.max_denoising_steps else None,
            last=remaining == 1,
        )
        settled = network.sampling_step(step, cache)
        canvas_BC, soft, cache = settled.canvas, settled.soft, settled.cache
        # a row that is done keeps its answer; what else becomes of it touches nobody
        best_BC = torch.where(done_B[:, None], best_BC, settled.argmax)
        done_B = done_B | stop(best_BC, settled.entropy)
        finite = finite & settled.entropy.isfinite().all()
        if observe is not None:
            observe(Denoised(index, remaining, best_BC, settled.accepted, settled.entropy, done_B))
        if remaining == 1 or network.agree(bool(done_B.all())):
            break
    return DenoisedCanvas(best_BC, cache, live_B, finite)
