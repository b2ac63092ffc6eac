"""nemo_diffgemma: train, fine-tune, serve and export DiffusionGemma on NVIDIA clusters.

The public names load on first use: configuration and data need no Megatron, which takes seconds to import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_diffgemma.config import ModelConfig
    from nemo_diffgemma.diffusion.sampler_config import SamplerConfig
    from nemo_diffgemma.diffusion_gemma import DiffusionGemma
    from nemo_diffgemma.parallel.layout import ParallelLayout

__all__ = ["DiffusionGemma", "ModelConfig", "ParallelLayout", "SamplerConfig"]
_HOMES = {
    "DiffusionGemma": "diffusion_gemma",
    "ModelConfig": "config",
    "ParallelLayout": "parallel.layout",
    "SamplerConfig": "diffusion.sampler",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"nemo_diffgemma.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'nemo_diffgemma' has no attribute {name!r}")
