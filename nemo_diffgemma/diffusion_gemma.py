"""DiffusionGemma as users meet it: load, encode, denoise, generate, save. See the README's first example."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from nemo_diffgemma.checkpoint import huggingface
from nemo_diffgemma.checkpoint.tensor_files import CheckpointError
from nemo_diffgemma.config import ConfigError, ModelConfig
from nemo_diffgemma.diffusion.generate import Denoised, Generation, Settled, generate
from nemo_diffgemma.diffusion.noise import KeyedNoise, Noise
from nemo_diffgemma.diffusion.sampler import SamplerConfig, accept
from nemo_diffgemma.model.cache import Cache
from nemo_diffgemma.model.initialisation import initialise
from nemo_diffgemma.model.network import Network
from nemo_diffgemma.model.segments import left_padding
from nemo_diffgemma.parallel.agreement import agree_error
from nemo_diffgemma.parallel.groups import device
from nemo_diffgemma.parallel.layout import LayoutError


class DiffusionGemma(Network):
    """The network in the layout that `parallel.initialize` made; every rank calls its methods with equal arguments."""

    @classmethod
    def from_huggingface(cls, path: str | Path, dtype: torch.dtype = torch.float32) -> DiffusionGemma:
        """Load a released-format directory; each rank reads only its own slices.

        Raises `ConfigError`, `LayoutError` or `CheckpointError`, on every rank.
        """
        error: Exception | None = None
        try:
            config = ModelConfig.from_pretrained(path)
            huggingface.check(config, path)  # before memory is taken for sizes that may be wrong
            model = cls(config, dtype)
        except (ConfigError, LayoutError, CheckpointError, OSError) as failure:
            error = failure
        agree_error(error)
        huggingface.load(model, path)
        return model.eval()

    def save_huggingface(self, path: str | Path) -> huggingface.Written:
        """Write what `from_huggingface` reads: every tensor back, in the dtype of the file it came from."""
        return huggingface.save(self, path)

    @property
    def sampler_defaults(self) -> SamplerConfig:
        """Sampler settings of the checkpoint's generation_config.json, else Hugging Face's defaults."""
        return SamplerConfig.of_checkpoint(self.assets, self.model)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 256,
        sampler: SamplerConfig | None = None,
        noise: Noise | None = None,
        seed: int | Sequence[int] = 0,
        observe: Callable[[Denoised], None] | None = None,
    ) -> Generation:
        """Generate whole canvases after [B, S] prompts (left padded by `attention_mask`).

        `sampler` None takes the checkpoint's settings. `noise` replaces the noise keyed by `seed`: an int keys row r by
        (seed, r); one int a row keys each row as if it were alone. `observe` sees every denoising step.
        """
        self.check_ids(input_ids)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens}; expected at least 1 (rounded up to whole canvases)")
        sampler = sampler or self.sampler_defaults
        sampler.check_ids(self.model.vocab_size)
        if noise is None:
            noise = KeyedNoise.for_rows(
                seed, input_ids.shape[0], self.model.canvas_length, self.model.vocab_size, device()
            )
        return generate(
            self,
            input_ids.to(device()),
            left_padding(input_ids, attention_mask),
            canvas_length=self.model.canvas_length,
            max_new_tokens=max_new_tokens,
            sampler=sampler,
            noise=noise,
            observe=observe,
        )

    def sampling_step(
        self,
        canvas: Tensor,
        cache: Cache | None,
        *,
        context: Tensor | None,
        first: tuple[int, ...],
        soft: Tensor | None,
        temperature: float,
        entropy_bound: float,
        uniforms: Tensor,
        replacements: Tensor,
        last: bool,
    ) -> Settled:
        """One denoising step and its sampling, as generation asks for it."""
        found, cache = self.denoising_step(
            canvas,
            cache,
            context=context,
            first=first,
            soft=soft,
            temperature=temperature,
            uniforms=uniforms,
            last=last,
        )
        assert found.sample_N is not None
        entropy = found.entropy_N.view(canvas.shape)
        accepted = accept(entropy, entropy_bound)
        canvas = torch.where(accepted, found.sample_N.view(canvas.shape), replacements)
        argmax = found.argmax_N.view(canvas.shape)
        return Settled(canvas, argmax, entropy, accepted, found.soft_embedding_NH, cache)

    def init_weights(self, seed: int) -> None:
        """Fill matrices with N(0, initializer_range), everything else with ones: a function of (seed, tensor name)."""
        initialise(self, seed)
