"""The tokens of transformers' `generate()`, written out, with every random number given from outside.

Engines have different random streams, so tokens can be compared only where the numbers are injected. Three kinds are
used: the ids a canvas starts from, a uniform per position and step from which the candidate token is drawn by inverse
CDF, and the ids that replace the positions that were not accepted.

    noise = RecordedNoise.draw(seed=0, canvases=3, steps=7, rows=2, canvas_length=4, vocabulary=64)
    sequences, forwards, per_forward, robust = generate(model, ids, max_new_tokens=12, ..., noise=noise, probe=1e-5)
    assert torch.equal(ours[robust], sequences[robust])
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from tests.reference.forward import denoise, encode


class Noise(Protocol):
    """Canvases count from 0. `step` is the number of steps that remain, this one included: N at the first, 1 at the
    last.
    """

    def initial(self, canvas: int) -> Tensor:
        """Ids [B, C] that the canvas starts from."""

    def uniforms(self, canvas: int, step: int) -> Tensor:
        """Numbers [B, C] in [0, 1) that choose the candidate tokens."""

    def replacements(self, canvas: int, step: int) -> Tensor:
        """Ids [B, C] for the positions that are not accepted."""


@dataclass(frozen=True)
class RecordedNoise:
    """All the noise of one run. K canvases, N steps, B rows, C positions."""

    initial_KBC: Tensor
    uniforms_KNBC: Tensor
    replacements_KNBC: Tensor

    @classmethod
    def draw(
        cls, seed: int, *, canvases: int, steps: int, rows: int, canvas_length: int, vocabulary: int
    ) -> "RecordedNoise":
        generator = torch.Generator().manual_seed(seed)
        once, each = (canvases, rows, canvas_length), (canvases, steps, rows, canvas_length)
        return cls(
            torch.randint(vocabulary, once, generator=generator),
            torch.rand(each, generator=generator),
            torch.randint(vocabulary, each, generator=generator),
        )

    def initial(self, canvas: int) -> Tensor:
        return self.initial_KBC[canvas]

    def uniforms(self, canvas: int, step: int) -> Tensor:
        return self.uniforms_KNBC[canvas, self.uniforms_KNBC.shape[1] - step]

    def replacements(self, canvas: int, step: int) -> Tensor:
        return self.replacements_KNBC[canvas, self.replacements_KNBC.shape[1] - step]

    def select(self, rows: list[int] | Tensor) -> "RecordedNoise":
        """The noise of these rows alone, in this order."""
        return RecordedNoise(
            self.initial_KBC[:, rows], self.uniforms_KNBC[:, :, rows], self.replacements_KNBC[:, :, rows]
        )


def inverse_cdf(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The smallest id whose cumulative probability exceeds the uniform, over the last axis of `probabilities`.

    In float64 and relative to the total, so that a uniform next to 1 finds an id although float32 probabilities sum to
    less.
    """
    cumulative = probabilities.double().cumsum(-1)
    return (cumulative <= uniforms.double()[..., None] * cumulative[..., -1:]).sum(-1)


def generate(
    model,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    max_denoising_steps: int,
    entropy_bound: float,
    t_min: float,
    t_max: float,
    stability_threshold: int,
    confidence_threshold: float,
    eos_token_id: int | list[int] | None,
    pad_token_id: int | None,
    noise: Noise,
    probe: float | None = None,
) -> tuple[Tensor, ...]:
    """`(sequences [B, S + n C], forwards [B], tokens_per_forward [B])` as `model.generate()` gives them.

    `forwards` counts the decoder forwards of a row before it was done with a canvas. With `probe`, a fourth: `robust`
    [B], the rows whose tokens and forwards stay the same when normal noise of that size is added to all logits, and
    when it is subtracted. An implementation that differs by rounding can be expected to agree on those rows, not on the
    others.
    """
    settings = dict(
        max_new_tokens=max_new_tokens,
        steps=max_denoising_steps,
        entropy_bound=entropy_bound,
        t_min=t_min,
        t_max=t_max,
        stability=stability_threshold,
        confidence=confidence_threshold,
        eos=[eos_token_id] if isinstance(eos_token_id, int) else eos_token_id,
        pad_id=pad_token_id,
        noise=noise,
    )
    sequences, forwards, per_forward = _generate(model, input_ids, attention_mask, **settings)
    if probe is None:
        return sequences, forwards, per_forward

    robust = torch.ones(len(input_ids), dtype=torch.bool)
    for size in (probe, -probe):
        generator = torch.Generator().manual_seed(0)  # the same noise both times, with either sign

        def disturb(logits: Tensor, size=size, generator=generator) -> Tensor:
            return logits + size * torch.randn(logits.shape, generator=generator)

        disturbed, disturbed_forwards, _ = _generate(model, input_ids, attention_mask, disturb=disturb, **settings)
        both = min(sequences.shape[1], disturbed.shape[1])  # another row may have made one of them go on
        robust &= (sequences[:, :both] == disturbed[:, :both]).all(-1) & (forwards == disturbed_forwards)
    return sequences, forwards, per_forward, robust


@torch.no_grad()
def _generate(
    model,
    sequences: Tensor,
    mask: Tensor | None,
    *,
    max_new_tokens: int,
    steps: int,
    entropy_bound: float,
    t_min: float,
    t_max: float,
    stability: int,
    confidence: float,
    eos: list[int] | None,
    pad_id: int | None,
    noise: Noise,
    disturb: Callable[[Tensor], Tensor] = lambda logits: logits,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, prompt_length = sequences.shape
    canvas_length = model.config.canvas_length
    mask = torch.ones_like(sequences, dtype=torch.bool) if mask is None else mask.bool()
    finished = torch.zeros(rows, dtype=torch.bool)
    forwards = torch.zeros(rows, dtype=torch.int)
    cache, uncached = None, sequences

    for index in range(math.ceil(max_new_tokens / canvas_length)):
        cache, _ = encode(model, uncached, cache, mask)
        canvas = noise.initial(index)
        answer, signal = canvas, None
        past_answers = [torch.full_like(canvas, -1)] * stability
        done = torch.zeros(rows, dtype=torch.bool)
        for step in range(steps, 0, -1):
            forwards += ~(done | finished)
            logits = disturb(denoise(model, canvas, cache, mask, signal))
            # step / steps is rounded to float32, as HF's is, which keeps the step number in a tensor
            tempered = logits / (t_min + (t_max - t_min) * (torch.tensor(step) / steps))
            probabilities = tempered.softmax(-1)
            candidates = inverse_cdf(probabilities, noise.uniforms(index, step))
            accepted = _accept(_entropy(tempered), entropy_bound)
            canvas = torch.where(accepted, candidates, noise.replacements(index, step))
            # A row that is done keeps its answer. HF keeps its canvas and logits too, which nothing shows any more.
            answer = torch.where(done[:, None], answer, tempered.argmax(-1))
            signal = tempered.to(model.dtype)

            stable = torch.ones(rows, dtype=torch.bool)
            for past in past_answers:
                stable &= (past == answer).all(-1)
            past_answers = (past_answers + [answer])[-stability:] if stability else []
            done |= stable & (_entropy(tempered).mean(-1) < confidence)
            if done.all():
                break

        answer = answer.clone()
        ends = torch.isin(answer, torch.tensor(eos or [], dtype=answer.dtype))
        if pad_id is not None:
            answer[finished] = pad_id
            ends_before = ends.cumsum(-1) - ends.long()
            answer[ends_before > 0] = pad_id
        finished = finished | ends.any(-1)
        sequences = torch.cat([sequences, answer], -1)
        if finished.all():
            break
        uncached, mask = answer, pad(mask, (0, canvas_length), value=True)

    new = sequences[:, prompt_length:]
    counted = torch.full((rows,), new.shape[1]) if pad_id is None else (new != pad_id).sum(-1)
    return sequences, forwards, counted / forwards


def _entropy(logits: Tensor) -> Tensor:
    """Nats per position."""
    log_probabilities = logits.log_softmax(-1)
    return -(log_probabilities.exp() * log_probabilities).sum(-1)


def _accept(entropy_BC: Tensor, bound: float) -> Tensor:
    """From the most certain position upwards, while the entropies before it sum to at most the bound."""
    ranked, order = entropy_BC.sort(-1)
    return torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, ranked.cumsum(-1) - ranked <= bound)
