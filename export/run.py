"""Generate with the engines of a bundle.

    python export/run.py bundle=bundles/mine prompt=1...4..3.2....1.                          # on the CPU
    python export/run.py bundle=bundles/mine provider=tensorrt prompt="Tell me a story." show=true
    torchrun --nproc-per-node 8 export/run.py bundle=bundles/tp8 provider=tensorrt prompt_ids=[2,10,11]

The last line is JSON: sequences, text, forwards, tokens_per_forward, as launch/generate.py gives them, and seconds.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from nemo_diffgemma.cli.canvas_view import CanvasView
from nemo_diffgemma.cli.entry import start
from nemo_diffgemma.cli.output import Results
from nemo_diffgemma.schema import ConfigurationError, SamplerGroup
from nemo_diffgemma.tokenizer import Text, tell


@dataclass
class RunConfig:
    """What `export/run.py` reads."""

    bundle: str = "???"
    provider: str = "onnxruntime"  # tensorrt_rtx, tensorrt, tensorrt_llm
    device: int | None = None  # CUDA device of this process; null: LOCAL_RANK's, or the only one
    prompt: str | None = None
    prompt_ids: list[int] | None = None
    chat: bool = True  # wrap the prompt in the tokenizer's chat template, where it has one
    max_new_tokens: int | None = None  # rounded up to whole canvases; null: one canvas
    seed: int = 0
    show: bool = False  # print the canvas at every denoising step
    sampler: SamplerGroup = field(default_factory=SamplerGroup)

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.prompt_ids is None):
            raise ConfigurationError("give one of prompt='some text' and prompt_ids=[2,10,11], not both or none")


def run(config: RunConfig, results: Results) -> dict[str, Any]:
    """Generate after one prompt."""
    from export import open_bundle

    engine = open_bundle(config.bundle, config.provider, config.device)
    text = Text(engine.assets)
    prompt = text.encode(config.prompt, config.chat) if config.prompt is not None else config.prompt_ids
    began = time.perf_counter()
    found = engine.generate(
        torch.tensor([prompt]),
        max_new_tokens=engine.config.canvas_length if config.max_new_tokens is None else config.max_new_tokens,
        sampler=engine.sampler_defaults.with_overrides(vars(config.sampler)),
        seed=config.seed,
        observe=CanvasView(results, text) if config.show else None,
    )
    seconds = time.perf_counter() - began
    return {**tell(found, prompt or (), text, results), "seconds": round(seconds, 4)}


if __name__ == "__main__":
    start(run, RunConfig, "export_run")
