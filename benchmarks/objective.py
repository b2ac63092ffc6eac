"""Cost and memory of a training step: against canvases, against length, and at the released vocabulary.

    python benchmarks/objective.py canvases      # forward + backward of one row, 1 to 32 canvases scored at once
    python benchmarks/objective.py length        # prompts of 1k to 16k tokens: all layers, and the five sliding ones
    python benchmarks/objective.py plot          # both, and benchmarks/objective.png
    python benchmarks/objective.py memory        # peak memory at vocabulary 262144, and of a plain computation

Hidden 256, 6 layers (the last one global), 16 experts top-4, canvas 64, window 128, float32, one row, one process.
Times are processor seconds, the least of `--rounds` steps, since others may use the machine: with one thread, what an
idle machine takes. The sliding layers' are the difference to a model of the global layer alone.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from nemo_diffgemma import DiffusionGemma, ModelConfig, ParallelLayout
from nemo_diffgemma.diffusion import objective as method
from nemo_diffgemma.diffusion.rows import Rows
from nemo_diffgemma.parallel import initialize

CANVAS = 64


def network(vocabulary: int, layers: int = 6) -> DiffusionGemma:
    """A model whose layers are all sliding but the last, which is always global."""
    config = ModelConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=layers,
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
        layer_types=("sliding_attention",) * layers,
        canvas_length=CANVAS,
    )
    model = DiffusionGemma(config)
    model.init_weights(0)
    return model.train()


def step(model: DiffusionGemma, prompt: int, canvases: int, scored: int, plain: bool = False) -> None:
    """Forward and backward of one row, as training runs them; `plain` as one graph."""
    length = prompt + canvases * CANVAS
    tokens = torch.randint(3, model.model_config.vocab_size, (length,), generator=torch.Generator().manual_seed(0))
    rows = Rows(tokens, [((prompt, length),)], [length], [0], fill_id=1)
    chosen = method.choose_canvases(rows, CANVAS, scored, seed=0)
    corrupted = method.corrupt(rows, chosen, CANVAS, model.model_config.vocab_size, seed=0)
    totals = method.count(rows, chosen, CANVAS)
    terms = (model, rows, chosen, corrupted, method.ObjectiveConfig(canvases_per_example=scored), 0, totals)
    if plain:
        method.objective(*terms).total.backward()
    else:
        passes = method.Scored(*terms)
        passes.backward_canvases()
        passes.backward_context()


def seconds(rounds: int, model: DiffusionGemma, *sizes: int) -> float:
    """The least of some steps after one that warms up."""
    times = []
    for _ in range(rounds + 1):
        model.zero_grad(set_to_none=True)
        start = time.process_time()
        step(model, *sizes)
        times.append(time.process_time() - start)
    return min(times[1:])


def canvases(rounds: int) -> dict[int, float]:
    model, costs = network(4096), {}
    print("| canvases scored of 32 | seconds a step | relative to one |\n|---|---|---|")
    for scored in (1, 2, 4, 8, 16, 32):
        costs[scored] = seconds(rounds, model, 256, 32, scored)
        print(f"| {scored} | {costs[scored]:.2f} | {costs[scored] / costs[1]:.2f} |", flush=True)
    return costs


def length(rounds: int) -> dict[int, tuple[float, float]]:
    """Seconds by prompt length: of all layers, and of the sliding ones."""
    models, costs = (network(4096), network(4096, layers=1)), {}
    print("| prompt tokens | seconds a step | of it sliding layers | microseconds a token, all | sliding layers |")
    print("|---|---|---|---|---|")
    for prompt in (1024, 2048, 4096, 8192, 16384):
        whole, last = (seconds(rounds, model, prompt, 1, 1) for model in models)
        costs[prompt] = whole, whole - last
        each = (f"{1e6 * cost / prompt:.0f}" for cost in costs[prompt])
        print(f"| {prompt} | {whole:.2f} | {whole - last:.2f} | {' | '.join(each)} |", flush=True)
    return costs


def plot(rounds: int) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    by_length, by_canvases = length(rounds), canvases(rounds)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    for index, name in enumerate(("all 6 layers", "the 5 sliding layers")):
        left.plot(list(by_length), [cost[index] for cost in by_length.values()], "o-", label=name)
    shortest, (_, sliding) = next(iter(by_length.items()))
    left.plot(list(by_length), [sliding * n / shortest for n in by_length], "--", color="gray", label="linear")
    left.set(xscale="log", yscale="log", xlabel="prompt tokens", ylabel="processor seconds a step", title="length")
    left.set_xticks(list(by_length), [f"{n // 1024}k" for n in by_length], minor=False)
    left.minorticks_off()
    right.plot(list(by_canvases), list(by_canvases.values()), "o-", label="measured")
    right.plot(list(by_canvases), [by_canvases[1] * n for n in by_canvases], "--", color="gray", label="one step each")
    right.set(xlabel="canvases scored of 32", ylabel="processor seconds a step", title="canvases")
    right.set_ylim(0, 2 * max(by_canvases.values()))
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


def memory(rounds: int) -> None:
    """Each variant in a process of its own: peak resident memory minus that of weights and gradients."""
    print("| vocabulary 262144, 1024 scored + 1279 next-token positions | peak above weights and gradients, GB |")
    print("|---|---|")
    for variant in ("ours", "plain"):
        out = subprocess.run(
            [sys.executable, __file__, f"memory-{variant}"], capture_output=True, text=True, check=True
        )
        print(f"| {variant} | {float(out.stdout.strip().splitlines()[-1]):.2f} |", flush=True)


def measure(variant: str) -> None:
    model = network(262144)
    for weight in model.parameters():
        gradient = torch.empty_like(weight).fill_(0.0)
        if variant == "ours":
            weight.main_grad = gradient  # type: ignore[attr-defined]  # as Megatron's DDP holds it
        else:
            weight.grad = gradient
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if variant == "plain":
        model.cross_entropy = lambda *args: _plain_cross_entropy(model, *args)  # type: ignore[method-assign]
    step(model, 256, 16, 16, plain=variant == "plain")
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6)


def _plain_cross_entropy(model: DiffusionGemma, hidden: Any, labels: Any, weights: Any) -> tuple[Any, Any]:
    """Full-size logits through autograd, as a straightforward implementation scores them."""
    logits = 30 * torch.tanh(hidden @ model.embed_tokens.weight.T / 30)
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return (losses * weights).sum(), losses


def main() -> None:
    what = {"canvases": canvases, "length": length, "plot": plot, "memory": memory}
    hidden = {"memory-ours": lambda _: measure("ours"), "memory-plain": lambda _: measure("plain")}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*what, *hidden], metavar="|".join(what))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    initialize(ParallelLayout())
    {**what, **hidden}[options.what](options.rounds)


if __name__ == "__main__":
    main()
