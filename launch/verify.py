"""Compare a checkpoint, in any layout, with transformers: states, logits, routing, tokens. Float32.

    python launch/verify.py checkpoint=<directory>
    python launch/verify.py checkpoint=<directory> parallel=tp2_ep2 prompt_lengths=[7,12]

transformers runs on rank 0 only. Tokens are compared under the same noise, on rows whose tokens transformers itself
keeps when its logits are disturbed by `probe` and by its negative: on the others rounding decides. Where it decides all
rows, other prompts and noise are tried; the verdict says if none was found.
The last line is JSON: differences (largest, absolute), agreement (shares), verdict. Exit code 1 beyond the tolerance.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from omegaconf import MISSING

from nemo_diffgemma.cli.output import Results, table
from nemo_diffgemma.cli.start import start
from nemo_diffgemma.repository import user_path
from nemo_diffgemma.schema import ParallelGroup
from nemo_diffgemma.scratch import scratch_directory

_TRIES = 8  # prompts and noise with which rows are looked for whose tokens can be compared


@dataclass
class VerifyConfig:
    """Configuration of `launch/verify.py`."""

    checkpoint: str = MISSING  # Hugging Face directory, sharded checkpoint or .nemo
    parallel: ParallelGroup = field(default_factory=ParallelGroup)
    prompt_lengths: list[int] | None = None  # null: half the sliding window, and a little more than it
    rows: int = 4
    canvases: int = 2  # generated after each prompt
    max_denoising_steps: int = 8
    tolerance: float = 1e-4  # of states and logits
    probe: float = 1e-5
    seed: int = 0


def verify(config: VerifyConfig, results: Results) -> dict[str, Any]:
    """Compare one checkpoint."""
    from nemo_diffgemma import DiffusionGemma
    from nemo_diffgemma.evaluation import comparison
    from nemo_diffgemma.parallel.agreement import on_rank_zero

    network = DiffusionGemma.from_checkpoint(config.checkpoint)
    # a converted checkpoint may be large: what a killed verification left is swept by the next one
    with ExitStack() as stack:
        scratch = scratch_directory(Path(tempfile.gettempdir()), "nemo_diffgemma-verify", private=True)
        folder = on_rank_zero(lambda: stack.enter_context(scratch))
        reference = load_reference(_released_format(config.checkpoint, network, folder))
        window = network.model_config.sliding_window
        lengths = config.prompt_lengths or [max(1, window // 2), window + 3]
        differences: dict[str, float] = {}
        routes: list[float] = []
        tokens: list[bool] = []

        def compare_tokens(length: int, seed: int) -> None:
            tokens.extend(
                comparison.compare_tokens(
                    network,
                    reference,
                    comparison.random_ids(network, config.rows, length, seed),
                    canvases=config.canvases,
                    max_denoising_steps=config.max_denoising_steps,
                    probe=config.probe,
                    seed=seed,
                )
            )

        canvas = comparison.random_ids(network, config.rows, network.model_config.canvas_length, config.seed)
        for length in lengths:
            prompts = comparison.random_ids(network, config.rows, length, config.seed)
            comparison.compare_passes(network, reference, prompts, canvas, differences, routes)
            compare_tokens(length, config.seed)
        for seed in range(config.seed + 1, config.seed + _TRIES):  # rounding may decide every row so far
            if tokens:
                break
            compare_tokens(lengths[0], seed)
    return _verdict(config, lengths, differences, sum(routes) / len(routes), tokens, results)


def _released_format(checkpoint: str, network: Any, folder: Path) -> Path:
    """A Hugging Face directory of the checkpoint, which transformers reads: itself, or one written below `folder`."""
    from nemo_diffgemma.checkpoint.open import format_of

    directory = user_path(checkpoint)
    if format_of(directory) != "huggingface":
        directory = folder / "huggingface"
        network.merge_adapters()
        network.save_huggingface(directory)
    return directory


def _verdict(
    config: VerifyConfig,
    lengths: list[int],
    differences: dict[str, float],
    same_experts: float,
    tokens: list[bool],
    results: Results,
) -> dict[str, Any]:
    equal = max(differences.values()) <= config.tolerance and all(tokens)
    results.exit_code = int(not equal)
    rows = [[name.replace("_", " "), f"{value:.2e}"] for name, value in differences.items()]
    rows += [["same experts", f"{same_experts:.4%}"], ["same tokens", f"{sum(tokens)} of {len(tokens)} rows"]]
    results.show(f"against transformers, prompts of {lengths} tokens\n{table(['compared', 'difference'], rows)}\n")
    verdict = "different" if not equal else "equal" if tokens else "equal, tokens not compared"
    agreement = {"router": same_experts, "tokens": sum(tokens) / len(tokens) if tokens else None}
    return {"differences": differences, "agreement": agreement, "verdict": verdict}


def load_reference(directory: Path) -> Any:
    """transformers' model on rank 0, None elsewhere."""
    from nemo_diffgemma.parallel.agreement import all_or_none, is_rank_zero

    with all_or_none():
        if is_rank_zero():
            from nemo_diffgemma.evaluation.reference import Reference

            return Reference(directory)
    return None


if __name__ == "__main__":
    start(verify, VerifyConfig, "verify", distributed=True)
