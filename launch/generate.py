"""Generate from a checkpoint.

    python launch/generate.py checkpoint=runs/demo/checkpoints/step-1300 prompt=1...4..3.2....1.
    python launch/generate.py checkpoint=google/... prompt_ids=[2,10,11] parallel=tp2_ep2 sampler.entropy_bound=0.3
    python launch/generate.py checkpoint=... prompt=... show=true       # watch the canvas settle, step by step

The last line is JSON: sequences (prompt and what follows), text (what follows; null without a tokenizer), forwards and
tokens_per_forward, one entry a row but text.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from omegaconf import MISSING

from nemo_diffgemma.cli.canvas_view import CanvasView
from nemo_diffgemma.cli.output import Results
from nemo_diffgemma.cli.processes import launch
from nemo_diffgemma.schema import ConfigurationError, ParallelGroup, SamplerGroup
from nemo_diffgemma.tokenizer import Text, tell


@dataclass
class GenerateConfig:
    """What `launch/generate.py` reads."""

    checkpoint: str = MISSING  # Hugging Face directory, sharded checkpoint or .nemo
    prompt: str | None = None
    prompt_ids: list[int] | None = None
    chat: bool = True  # wrap the prompt in the tokenizer's chat template, where it has one
    max_new_tokens: int | None = None  # rounded up to whole canvases; null: one canvas
    seed: int = 0
    dtype: str = "float32"  # or bfloat16
    show: bool = False  # print the canvas at every denoising step
    sampler: SamplerGroup = field(default_factory=SamplerGroup)
    parallel: ParallelGroup = field(default_factory=ParallelGroup)

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.prompt_ids is None):
            raise ConfigurationError("give one of prompt='some text' and prompt_ids=[2,10,11], not both or none")


def generate(config: GenerateConfig, results: Results) -> dict[str, Any]:
    """Generate after one prompt."""
    from nemo_diffgemma.checkpoint.contents import open_network

    network = open_network(config.checkpoint, config.dtype)
    text = Text(network.assets)
    prompt = text.encode(config.prompt, config.chat) if config.prompt is not None else config.prompt_ids
    found = network.generate(
        torch.tensor([prompt]),
        max_new_tokens=network.model.canvas_length if config.max_new_tokens is None else config.max_new_tokens,
        sampler=network.sampler_defaults.with_overrides(vars(config.sampler)),
        seed=config.seed,
        observe=CanvasView(results, text) if config.show else None,
    )
    return tell(found, prompt or (), text, results)


if __name__ == "__main__":
    launch(generate, GenerateConfig, "generate")
