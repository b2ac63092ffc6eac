"""Generate with the engines of a bundle.

    python export/run.py bundle=bundles/mine prompt=1...4..3.2....1.                          # on the CPU
    python export/run.py bundle=bundles/mine prompt_file=story.txt      # or prompt=- : from standard input
    python export/run.py bundle=bundles/mine provider=tensorrt prompt="Tell me a story." show=true
    torchrun --nproc-per-node 8 export/run.py bundle=bundles/tp8 provider=tensorrt prompt_ids=[2,10,11]

Prompts and paths are taken literally, whatever they hold; with --multirun a comma between texts makes a sweep.
The last line is JSON: sequences, text, forwards, tokens_per_forward, as launch/generate.py gives them, and seconds.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nemo_diffgemma.cli.output import Results
from nemo_diffgemma.cli.prompt import PromptOptions, generate_after_prompt
from nemo_diffgemma.cli.start import start


@dataclass
class RunConfig(PromptOptions):
    """Configuration of `export/run.py`."""

    bundle: str = "???"
    provider: str = "onnxruntime"  # tensorrt_rtx, tensorrt, tensorrt_llm
    device: int | None = None  # CUDA device of this process; null: LOCAL_RANK's, or the only one


def run(config: RunConfig, results: Results) -> dict[str, Any]:
    """Generate after one prompt."""
    from export import open_bundle

    engine = open_bundle(config.bundle, config.provider, config.device)
    json, seconds = generate_after_prompt(engine, engine.model_config.canvas_length, config, results)
    return {**json, "seconds": round(seconds, 4)}


if __name__ == "__main__":
    start(run, RunConfig, "export_run")
