"""DiffusionGemma as users meet it: load, encode, denoise, generate, save. See the README's first example."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from nemo_diffgemma.checkpoint import huggingface
from nemo_diffgemma.config import ConfigError, ModelConfig
from nemo_diffgemma.diffusion.generate import Denoised, Generation, generate
from nemo_diffgemma.diffusion.noise import KeyedNoise, Noise
from nemo_diffgemma.diffusion.sampler import SamplerConfig
from nemo_diffgemma.model.initialisation import initialise
from nemo_diffgemma.model.network import Network, left_padding
from nemo_diffgemma.parallel.groups import agree_error, device
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
            model = cls(ModelConfig.from_pretrained(path), dtype)
        except (ConfigError, LayoutError, OSError) as found:
            error = found
        agree_error(error)
        huggingface.load(model, path)
        return model.eval()

    def save_huggingface(self, path: str | Path) -> huggingface.Written:
        """Write what `from_huggingface` reads: every tensor back, in the dtype of the file it came from."""
        return huggingface.save(self, path)

    @property
    def sampler_defaults(self) -> SamplerConfig:
        """Sampler settings of the checkpoint's generation_config.json, else Hugging Face's defaults."""
        file = None if self.assets is None else self.assets / "generation_config.json"
        found = json.loads(file.read_text()) if file is not None and file.is_file() else {}
        found.setdefault("eos_token_id", self.model.eos_token_id)
        found.setdefault("pad_token_id", self.model.pad_token_id)
        return SamplerConfig.from_mapping(found)

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

    def init_weights(self, seed: int) -> None:
        """Fill matrices with N(0, initializer_range), everything else with ones: a function of (seed, tensor name)."""
        initialise(self, seed)
