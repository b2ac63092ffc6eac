"""However late the host looks at the flags of a GPU, nothing of a generation changes: against the loop by hand."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NoReturn

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nemo_diffgemma.diffusion.generate import Settled, StepInputs, generate
from nemo_diffgemma.diffusion.noise import KeyedNoise
from nemo_diffgemma.diffusion.progress import Denoised, Lookout
from nemo_diffgemma.diffusion.sampler_config import SamplerConfig

LENGTH, VOCABULARY = 2, 4


@dataclasses.dataclass
class Script:
    """A denoiser that answers what is written: [canvases, steps, B, C] ids and entropies, also beyond the end."""

    argmax: Tensor
    entropy: Tensor
    place: tuple[int, int] = (-1, 0)  # of the answer before
    steps: int = 0

    class NotFinite(Exception):
        pass

    def start(self, first_positions: Any) -> int:
        return -1

    def sampling_step(self, inputs: StepInputs, cache: int) -> Settled:
        assert inputs.context is not None and inputs.soft is None
        return self._answer(inputs, cache + 1, 0)

    def canvas_step(self, inputs: StepInputs, cache: int) -> Settled:
        assert inputs.context is None and inputs.soft is self.soft
        return self._answer(inputs, cache, self.place[1] + 1)

    def _answer(self, inputs: StepInputs, canvas: int, step: int) -> Settled:
        self.place, self.soft = (canvas, step), object()
        self.steps += 1
        remaining = len(self.argmax[0]) - step
        assert float(inputs.temperature) == 0.4 + 0.4 * remaining / len(self.argmax[0])
        assert inputs.last == (remaining == 1)
        argmax, entropy = self.argmax[canvas, step], self.entropy[canvas, step]
        return Settled(inputs.canvas, argmax, entropy, entropy < 1, self.soft, canvas)

    def agreed(self, flags: Tensor) -> Tensor:
        return flags

    def raise_non_finite(self, run: Callable[[], Any]) -> NoReturn:
        raise self.NotFinite(f"canvas {self.place[0]}")


def by_hand(script: Script, sampler: SamplerConfig) -> tuple[list[list[int]], list[int], list[tuple], int | None]:
    """Tokens and live steps of each row, what observers see, and the canvas that was not finite if there is one."""
    rows = range(script.argmax.shape[2])
    tokens: list[list[int]] = [[] for _ in rows]
    forwards, ended, seen = [0] * len(rows), [False] * len(rows), []
    for canvas in range(len(script.argmax)):
        done, best = [False] * len(rows), [[0] * LENGTH for _ in rows]
        history: list[list[list[int]]] = []
        finite = True
        for step in range(sampler.max_denoising_steps):
            entropies = script.entropy[canvas, step].tolist()
            for row in rows:
                forwards[row] += not (done[row] or ended[row])
                if not done[row]:
                    best[row] = script.argmax[canvas, step, row].tolist()
            finite = finite and all(math.isfinite(entropy) for row in entropies for entropy in row)
            wanted = sampler.stability_threshold
            for row in rows:
                past = history[len(history) - wanted :]
                same = len(history) >= wanted and all(canvas_then[row] == best[row] for canvas_then in past)
                certain = sum(entropies[row]) / LENGTH < sampler.confidence_threshold
                done[row] = done[row] or (same and certain)
            history.append([list(row) for row in best])
            seen.append((canvas, sampler.max_denoising_steps - step, [list(row) for row in best], list(done)))
            if all(done):
                break
        if not finite:
            return tokens, forwards, seen, canvas
        for row in rows:
            emitted = best[row]
            if ended[row]:
                emitted = [0] * LENGTH
            elif 1 in emitted:
                end = emitted.index(1) + 1
                emitted, ended[row] = emitted[:end] + [0] * (LENGTH - end), True
            tokens[row] += emitted
        if all(ended):
            break
    return tokens, forwards, seen, None


@st.composite
def scripts(draw) -> Script:
    canvases, steps, rows = draw(st.integers(1, 3)), draw(st.integers(1, 8)), draw(st.integers(1, 3))
    shape = (canvases, steps, rows, LENGTH)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    calm, sure = draw(st.sampled_from([0.1, 0.5])), draw(st.sampled_from([0.3, 0.9]))
    others = torch.randint(VOCABULARY, shape, generator=generator)
    argmax = torch.where(torch.rand(shape, generator=generator) < calm, others, 2)
    entropy = torch.where(torch.rand((*shape[:3], 1), generator=generator) < sure, 0.25, 2.0).expand(shape).clone()
    for _ in range(draw(st.integers(0, 1))):
        entropy.view(-1)[draw(st.integers(0, entropy.numel() - 1))] = draw(st.sampled_from([torch.nan, torch.inf]))
    return Script(argmax, entropy)


@settings(max_examples=150)
@given(script=scripts(), wanted=st.integers(0, 2), behind=st.sampled_from([0, 1, 2, 5]), observed=st.booleans())
def test_late_flags_change_nothing(script, wanted, behind, observed):
    """Tokens, forwards, what observers see, and whether NaN is found, though answers beyond the end differ."""
    canvases, steps, rows = script.argmax.shape[:3]
    sampler = SamplerConfig(
        max_denoising_steps=steps,
        stability_threshold=wanted,
        confidence_threshold=1.0,
        eos_token_id=1,
        pad_token_id=0,
    )
    tokens, forwards, seen, broken = by_hand(script, sampler)
    observations: list[Denoised] = []
    arguments = dict(
        canvas_length=LENGTH,
        max_new_tokens=canvases * LENGTH,
        sampler=sampler,
        noise=KeyedNoise.for_rows(0, rows, LENGTH, VOCABULARY),
        observe=observations.append if observed else None,
    )
    prompt = torch.full((rows, 1), 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Lookout, "steps_behind", staticmethod(lambda device: behind))
        if broken is None:
            result = generate(script, prompt, [0] * rows, **arguments)
            assert result.sequences[:, 1:].tolist() == tokens
            assert result.forwards.tolist() == forwards
        else:
            with pytest.raises(Script.NotFinite, match=f"canvas {broken}"):
                generate(script, prompt, [0] * rows, **arguments)
    if observed:
        assert [(d.canvas, d.remaining, d.argmax.tolist(), d.done.tolist()) for d in observations] == seen
    began = {canvas for canvas, *_ in seen}
    assert len(seen) <= script.steps <= min(len(seen) + behind * len(began), steps * len(began))
    if behind == 0:
        assert script.steps == len(seen)  # on a CPU no step is computed for nothing
