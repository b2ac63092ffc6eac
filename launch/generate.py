"""Generate from a checkpoint.

    python launch/generate.py checkpoint=runs/demo/checkpoints/step-1300 prompt=1...4..3.2....1.
    python launch/generate.py checkpoint=google/... prompt_ids=[2,10,11] parallel=tp2_ep2 sampler.entropy_bound=0.3
    python launch/generate.py checkpoint=... prompt_file=story.txt      # or prompt=- : from standard input
    python launch/generate.py checkpoint=... prompt=... show=true       # watch the canvas settle, step by step

Prompts and paths are taken literally, whatever they hold; with --multirun a comma between texts makes a sweep.
The last line is JSON: sequences (prompt and what follows), text (what follows; null without a tokenizer), forwards and
tokens_per_forward, one entry a row but text.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from omegaconf import MISSING

from nemo_diffgemma.cli.output import Results
from nemo_diffgemma.cli.prompt import PromptOptions, generate_after_prompt
from nemo_diffgemma.cli.start import start
from nemo_diffgemma.schema import ParallelGroup


@dataclass
class GenerateConfig(PromptOptions):
    """Configuration of `launch/generate.py`."""

    checkpoint: str = MISSING  # Hugging Face directory, sharded checkpoint, .nemo, or an adapter: with its base
    dtype: str = "float32"  # or bfloat16
    parallel: ParallelGroup = field(default_factory=ParallelGroup)


def generate(config: GenerateConfig, results: Results) -> dict[str, Any]:
    """Generate after one prompt."""
    from nemo_diffgemma import DiffusionGemma
    from nemo_diffgemma.checkpoint.open import dtype_of

    network = DiffusionGemma.from_checkpoint(config.checkpoint, dtype_of(config.dtype))
    return generate_after_prompt(network, network.model_config.canvas_length, config, results)[0]


if __name__ == "__main__":
    start(generate, GenerateConfig, "generate", distributed=True)
