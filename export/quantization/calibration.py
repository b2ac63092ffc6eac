"""Ranges of the experts' activations, measured by running the traceable functions, and what quantisation makes of them.

    amax = calibrate(model, Weights(tensors), prompts)                     # token ids
    quantized = {k: v for name in amax for k, v in quantize_weight(name, tensors[name], "fp8", amax[name]).items()}
    model.step(SimulatedWeights({**tensors, **quantized}, "fp8"), ...)     # as an engine with FP8 experts computes it

Memory: one unsharded model in the dtype of the engine; `SimulatedWeights` makes one dequantised matrix at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from export.graph.model import KeyValue, Model, Weights, empty_context, product
from export.quantization.schemes import QuantizationError, dequantize, fake_quantize, model_optimizer
from nemo_diffgemma.diffusion.noise import KeyedNoise
from nemo_diffgemma.diffusion.sampler_config import SamplerConfig


class SimulatedWeights(Weights):
    """Weights whose expert products are computed as a quantised engine computes them, rounding errors of sums aside.

    `tensors` holds the packed tensors of every expert matrix (`quantize_weight`) and all other weights as they are.
    """

    def __init__(self, tensors: Mapping[str, Tensor], scheme: str) -> None:
        super().__init__(tensors)
        self._scheme = scheme

    def linear(self, x: Tensor, name: str, experts: Tensor | None = None) -> Tensor:
        matrix = dequantize(name, self._tensors, self._scheme).to(x.dtype)
        return product(fake_quantize(x, name, self._tensors, self._scheme), matrix, experts)


class _Recorder(Weights):
    """Keeps the largest absolute input of every expert product."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self.calibrators: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self._weights[name]

    def linear(self, x: Tensor, name: str, experts: Tensor | None = None) -> Tensor:
        if name not in self.calibrators:
            self.calibrators[name] = model_optimizer("calib").MaxCalibrator()
        self.calibrators[name].collect(x)
        return self._weights.linear(x, name, experts)


@torch.inference_mode()
def calibrate(
    model: Model, weights: Weights, prompts: Sequence[Sequence[int]], steps: int = 8, seed: int = 0
) -> dict[str, float]:
    """Largest absolute activation in front of every expert matrix, while encoding and denoising one canvas a prompt.

    The form of `model.experts` matters: shares multiply before the second product or after it.

    The range is the maximum seen, no percentile: a clipped expert is worse than a coarser one, and the schemes have
    exponents. Several steps, because a canvas of noise and one almost finished look different to the router.
    """
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise QuantizationError(
            f"got {len(prompts)} prompts, some or all empty; give a few typical ones, each with at least one token id"
        )
    recorder = _Recorder(weights)
    for row, prompt in enumerate(prompts):
        _denoise(model, recorder, prompt, steps, (seed, row))
    return {name: float(calibrator.compute_amax()) for name, calibrator in recorder.calibrators.items()}


def _denoise(model: Model, weights: Weights, prompt: Sequence[int], steps: int, key: tuple[int, int]) -> None:
    """Run one canvas after a prompt."""
    config = model.config
    sampler = SamplerConfig(max_denoising_steps=steps)
    noise = KeyedNoise([key[0]], [key[1]], config.canvas_length, config.vocab_size)
    canvas = noise.initial(0)
    soft = torch.zeros(1, config.canvas_length, config.hidden_size, dtype=model.dtype)
    past = _encode(model, weights, prompt)
    for remaining in range(steps, 0, -1):
        canvas, soft, *_ = model.step(
            weights,
            canvas=canvas,
            soft=soft,
            first=torch.zeros(1, dtype=torch.int64),
            past_length=torch.tensor([len(prompt)]),
            rank=torch.tensor(0),
            temperature=torch.tensor([sampler.temperature(remaining)]),
            entropy_bound=torch.tensor([sampler.entropy_bound]),
            uniforms=noise.uniforms(0, remaining),
            replacements=noise.replacements(0, remaining),
            past=past,
        )


def _encode(model: Model, weights: Weights, prompt: Sequence[int]) -> list[KeyValue]:
    """Keys and values of a whole prompt; the masks of the graph see to the window."""
    empty = empty_context(model.config, model.layout, 1, model.dtype)
    start = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), torch.tensor(0)
    return model.encode(weights, torch.tensor([list(prompt)]), *start, empty)
