"""Cost and memory of the training objective: against canvases, against length, and at the released vocabulary.

    python benchmarks/objective.py canvases      # forward + backward of one row, 1 to 16 canvases scored at once
    python benchmarks/objective.py length        # prompt of 512 to 8192 tokens, sliding layers only but for the last
    python benchmarks/objective.py memory        # peak memory at vocabulary 262144, and of a plain computation

Hidden 256, 6 layers, 16 experts top-4, canvas 64, window 128, float32, one process.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import torch

from nemo_diffgemma import DiffusionGemma, ModelConfig, ParallelLayout
from nemo_diffgemma.diffusion import objective as method
from nemo_diffgemma.diffusion.rows import Rows
from nemo_diffgemma.parallel import initialize

CANVAS = 64


def network(vocabulary: int) -> DiffusionGemma:
    """A model whose layers are all sliding but the last, which is always global."""
    config = ModelConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_global_key_value_heads=2,
        global_head_dim=64,
        num_experts=16,
        top_k_experts=4,
        moe_intermediate_size=128,
        sliding_window=128,
        initializer_range=256**-0.5,
        layer_types=("sliding_attention",) * 6,
        canvas_length=CANVAS,
    )
    model = DiffusionGemma(config)
    model.init_weights(0)
    return model.train()


def step(model: DiffusionGemma, prompt: int, canvases: int, scored: int) -> None:
    """Forward and backward of one row."""
    length = prompt + canvases * CANVAS
    tokens = torch.randint(3, model.model_config.vocab_size, (length,), generator=torch.Generator().manual_seed(0))
    rows = Rows(tokens, [((prompt, length),)], [length], [0], fill_id=1)
    config = method.ObjectiveConfig(canvases_per_example=scored)
    canvases = method.choose_canvases(rows, CANVAS, scored, seed=0)
    corrupted = method.corrupt(rows, canvases, CANVAS, model.model_config.vocab_size, seed=0)
    totals = method.count(rows, canvases, CANVAS)
    method.objective(model, rows, canvases, corrupted, config, 0, totals).total.backward()
    model.zero_grad(set_to_none=True)


def seconds(*args: Any) -> float:
    """Median of three steps after one that warms up."""
    step(*args)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        step(*args)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def canvases() -> None:
    model = network(4096)
    print("| canvases scored of 16 | seconds a step | relative to one |\n|---|---|---|")
    first = None
    for scored in (1, 2, 4, 8, 16):
        cost = seconds(model, 256, 16, scored)
        first = first or cost
        print(f"| {scored} | {cost:.2f} | {cost / first:.2f} |")


def length() -> None:
    model = network(4096)
    print("| prompt tokens | seconds a step, all layers | microseconds a token |\n|---|---|---|")
    for prompt in (512, 1024, 2048, 4096, 8192):
        cost = seconds(model, prompt, 1, 1)
        print(f"| {prompt} | {cost:.2f} | {1e6 * cost / prompt:.0f} |")


def memory() -> None:
    """Each variant in a process of its own: peak resident memory minus that before the step."""
    print("| vocabulary 262144, 1024 scored + 1279 next-token positions | peak above the weights, GB |\n|---|---|")
    for variant in ("ours", "plain"):
        out = subprocess.run(
            [sys.executable, __file__, f"memory-{variant}"], capture_output=True, text=True, check=True
        )
        print(f"| {variant} | {float(out.stdout.strip().splitlines()[-1]):.2f} |")


def measure(variant: str) -> None:
    model = network(262144)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if variant == "plain":
        model.cross_entropy = lambda *args: _plain_cross_entropy(model, *args)  # type: ignore[method-assign]
    step(model, 256, 16, 16)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6)


def _plain_cross_entropy(model: DiffusionGemma, hidden: Any, labels: Any, weights: Any) -> tuple[Any, Any]:
    """Full-size logits through autograd, as a straightforward implementation scores them."""
    logits = 30 * torch.tanh(hidden @ model.embed_tokens.weight.T / 30)
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return (losses * weights).sum(), losses


def main() -> None:
    what = {"canvases": canvases, "length": length, "memory": memory}
    hidden = {"memory-ours": lambda: measure("ours"), "memory-plain": lambda: measure("plain")}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*what, *hidden], metavar="|".join(what))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    initialize(ParallelLayout())
    {**what, **hidden}[options.what]()


if __name__ == "__main__":
    main()
