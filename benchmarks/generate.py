"""Tokens per second of `generate` against transformers' `generate`: same weights, same number of steps, one run.

    python benchmarks/generate.py --vocabulary 32768            # prints the row as it stands in benchmarks/README.md
    python benchmarks/generate.py --vocabulary 262144 --pairs 3

Both generate one canvas of 256 tokens after a prompt of 512, with stopping switched off, alternating; a pair is one run
of each, and the ratio is the median over pairs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    return parser.parse_args()


def build(options: argparse.Namespace, directory: Path) -> tuple[Any, Any]:
    """Our model and transformers', with the same random weights."""
    import torch
    from transformers.models.diffusion_gemma import DiffusionGemmaForBlockDiffusion

    from nemo_diffgemma import DiffusionGemma, ModelConfig, ParallelLayout
    from nemo_diffgemma.parallel import initialize

    initialize(ParallelLayout())
    config = ModelConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.hidden,
        intermediate_size=options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        num_global_key_value_heads=2,
        global_head_dim=128,
        num_experts=32,
        top_k_experts=8,
        moe_intermediate_size=176,
        sliding_window=256,
        canvas_length=256,
        initializer_range=options.hidden**-0.5,
        eos_token_id=1,
    )
    ours = DiffusionGemma(config)
    ours.init_weights(0)
    ours.eval().save_huggingface(directory / "model")
    theirs = DiffusionGemmaForBlockDiffusion.from_pretrained(
        directory / "model", dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    return ours, theirs


def runners(options: argparse.Namespace, ours: Any, theirs: Any) -> dict[str, Any]:
    """One call each that generates a canvas."""
    import torch
    from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
        DiffusionGemmaGenerationConfig,
        EntropyBoundSamplerConfig,
    )

    from nemo_diffgemma import SamplerConfig

    prompt = torch.randint(3, options.vocabulary, (1, options.prompt), generator=torch.Generator().manual_seed(0))
    never = options.steps + 1  # more steps of stability than there are: both run every step
    sampler = SamplerConfig(max_denoising_steps=options.steps, stability_threshold=never)
    generation = DiffusionGemmaGenerationConfig(
        max_new_tokens=256,
        max_denoising_steps=options.steps,
        sampler_config=EntropyBoundSamplerConfig(entropy_bound=0.1),
        t_min=0.4,
        t_max=0.8,
        stability_threshold=never,
        confidence_threshold=0.005,
        eos_token_id=None,
        pad_token_id=None,
    )
    return {
        "ours": lambda: ours.generate(prompt, sampler=sampler),
        "transformers": lambda: theirs.generate(
            prompt, attention_mask=torch.ones_like(prompt), generation_config=generation
        ),
    }


def main() -> None:
    options = arguments()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    import torch

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as directory:
        calls = runners(options, *build(options, Path(directory)))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for pair in range(options.pairs):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
            print(f"pair {pair + 1}/{options.pairs} {name}: {seconds[name][-1]:.1f} s", file=sys.stderr)
    ratio = statistics.median(b / a for a, b in zip(seconds["ours"], seconds["transformers"], strict=True))
    rate = {name: 256 / statistics.median(values) for name, values in seconds.items()}
    print("| vocabulary | steps | threads | ours, tokens/s | transformers, tokens/s | ratio (median of pairs) |")
    print("|---|---|---|---|---|---|")
    print(
        f"| {options.vocabulary} | {options.steps} | {options.threads} | {rate['ours']:.1f} | "
        f"{rate['transformers']:.1f} | {ratio:.1f} |"
    )


if __name__ == "__main__":
    main()
