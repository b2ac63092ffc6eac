"""transformers' DiffusionGemma as the reference of `verify`: its own `generate`, with the random numbers given.

The real sampler draws from torch's generator; a subclass of it takes its numbers from a `Noise` instead, so that both
engines can be asked for the same tokens.

Shapes: B rows, S prompt tokens, C canvas positions, V vocabulary, K experts chosen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.models.diffusion_gemma import DiffusionGemmaForBlockDiffusion
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    DiffusionGemmaGenerationConfig,
    EntropyBoundSampler,
    EntropyBoundSamplerConfig,
)
from transformers.utils import logging

from nemo_diffgemma.diffusion.noise import Noise
from nemo_diffgemma.diffusion.sampler_config import SamplerConfig


class Reference:
    """The model of a Hugging Face directory in float32, on the CPU."""

    def __init__(self, directory: Path) -> None:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.model: Any = DiffusionGemmaForBlockDiffusion.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()

    @torch.no_grad()
    def encode(self, tokens_BS: Tensor) -> tuple[DynamicCache, Tensor]:
        """Cache and final encoder states [B, S, H]."""
        cache = DynamicCache(config=self.model.config.get_text_config())
        output = self.model.model.encoder(input_ids=tokens_BS, past_key_values=cache)
        return cache, output.last_hidden_state

    @torch.no_grad()
    def denoise(self, canvas_BC: Tensor, cache: DynamicCache, signal_BCV: Tensor | None) -> Tensor:
        """Logits [B, C, V]."""
        return self.model(
            decoder_input_ids=canvas_BC, past_key_values=cache, self_conditioning_logits=signal_BCV
        ).logits

    @torch.no_grad()
    def generate(
        self, tokens_BS: Tensor, new_tokens: int, sampler: SamplerConfig, noise: Noise, disturbance: float = 0.0
    ) -> Tensor:
        """Sequences [B, S + generated] of `model.generate`. `disturbance` is the size of noise on all logits."""
        config = DiffusionGemmaGenerationConfig(
            max_new_tokens=new_tokens,
            max_denoising_steps=sampler.max_denoising_steps,
            sampler_config=EntropyBoundSamplerConfig(entropy_bound=sampler.entropy_bound),
            t_min=sampler.t_min,
            t_max=sampler.t_max,
            stability_threshold=sampler.stability_threshold,
            confidence_threshold=sampler.confidence_threshold,
            eos_token_id=list(sampler.eos_ids) or None,
            pad_token_id=sampler.pad_token_id,
        )
        self.model._prepare_sampler = lambda config: _GivenNoise(self.model, config, noise)
        generator = torch.Generator().manual_seed(0)

        def disturb(module: nn.Module, args: Any, logits: Tensor) -> Tensor:
            return logits + disturbance * torch.randn(logits.shape, generator=generator)

        handle = self.model.lm_head.register_forward_hook(disturb)
        try:
            return self.model.generate(tokens_BS, generation_config=config).sequences
        finally:
            handle.remove()
            del self.model._prepare_sampler

    @contextlib.contextmanager
    def routes(self, encoder: bool) -> Iterator[list[Tensor]]:
        """Experts that each layer chooses meanwhile, [B * tokens, K] a layer."""
        stack = self.model.model.encoder.language_model if encoder else self.model.model.decoder
        experts: list[Tensor] = []
        handles = [
            layer.router.register_forward_hook(lambda module, args, output: experts.append(output[2]))
            for layer in stack.layers
        ]
        try:
            yield experts
        finally:
            for handle in handles:
                handle.remove()


class _GivenNoise(EntropyBoundSampler):
    def __init__(self, model: Any, config: Any, noise: Noise) -> None:
        text = model.config.get_text_config()
        super().__init__(config.sampler_config, model.config.canvas_length, text.vocab_size, config.max_denoising_steps)
        self._noise, self._canvas = noise, -1

    def initialize_canvas(self, batch_size: int, device: torch.device) -> Any:
        self._canvas += 1
        return self._noise.initial(self._canvas)

    def accept_canvas(self, current_canvas: Any, denoiser_canvas: Any, logits: Tensor, cur_step: int) -> Any:
        """In place of `multinomial`'s candidate, the smallest id whose cumulative probability exceeds the uniform."""
        cumulative = logits.softmax(-1).double().cumsum(-1)
        uniforms = self._noise.uniforms(self._canvas, int(cur_step)).double()[..., None]
        candidates: Any = (cumulative <= uniforms * cumulative[..., -1:]).sum(-1)
        return super().accept_canvas(current_canvas, candidates, logits, cur_step)

    def renoise_canvas(self, accepted_canvas: Any, cur_step: int) -> Any:
        replacements = self._noise.replacements(self._canvas, int(cur_step))
        assert self.accepted_token_mask is not None
        return torch.where(self.accepted_token_mask, accepted_canvas, replacements)
