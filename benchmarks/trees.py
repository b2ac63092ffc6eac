"""`generate` and the training objective on equal lengths: this tree against another one of the repository, alternating.

    git worktree add --detach /tmp/before <commit>
    python benchmarks/trees.py --before /tmp/before --rounds 3     # prints the rows of benchmarks/README.md
    python benchmarks/trees.py --before /tmp/before --only vocabulary

The sizes of the cases with a vocabulary are those of benchmarks/generate.py, with fewer denoising steps. Each round
starts a process in either tree, which times every case in turn after a call that warms up. One thread; seconds are
those of the processor, the least of all calls, since others may use the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]


def cases(only: str) -> Iterator[tuple[str, Callable[[], object], int]]:
    """(name, call, repetitions) of the names with `only` in them; models of the sizes of demo and other benchmarks."""
    for name, make, repetitions in makers():
        if only in name:
            yield name, make(), repetitions


def makers() -> Iterator[tuple[str, Callable[[], Callable[[], object]], int]]:
    import torch

    from nemo_diffgemma import ParallelLayout, SamplerConfig
    from nemo_diffgemma.parallel import initialize

    torch.set_num_threads(1)
    initialize(ParallelLayout())
    generator = torch.Generator().manual_seed(0)
    sampler = SamplerConfig(max_denoising_steps=8, stability_threshold=9)

    def ids(*shape: int) -> torch.Tensor:
        return torch.randint(3, 64, shape, generator=generator)

    def small() -> Any:
        return network(vocab_size=64, hidden_size=64, num_hidden_layers=4, canvas_length=16, sliding_window=64)

    def large() -> Any:
        return network(vocab_size=4096, hidden_size=256, num_hidden_layers=6, canvas_length=64, sliding_window=128)

    def generation(model: Any, prompts: torch.Tensor, tokens: int) -> Callable[[], object]:
        return lambda: model.generate(prompts, None, tokens, sampler)

    yield "training step, 64 rows of 98 tokens, 1 canvas of 16", lambda: training_step(small(), ids(64, 98), 82, 1), 4
    yield "training step, 16 rows of 82 tokens, 4 canvases of 16", lambda: training_step(small(), ids(16, 82), 18, 4), 4
    yield "generate, 200 rows, prompt 82, 1 canvas of 16", lambda: generation(small(), ids(200, 82), 16), 2
    yield "generate, 8 rows, prompt 82, 4 canvases of 16", lambda: generation(small(), ids(8, 82), 64), 2
    for count in (16, 1):
        name = f"training step, 1 row of 1280 tokens, {count} canvas{'es' if count > 1 else ''} of 64"
        yield name, lambda count=count: training_step(large(), ids(1, 1280), 256, count), 2
    yield "generate, 1 row, prompt 512, 2 canvases of 64", lambda: generation(large(), ids(1, 512), 128), 3
    for vocabulary in (32768, 262144):
        name = f"generate, vocabulary {vocabulary}, prompt 512, 1 canvas of 256, 8 steps"
        yield name, lambda vocabulary=vocabulary: generation(released(vocabulary), ids(1, 512), 256), 2


def released(vocabulary: int) -> Any:
    """The model of benchmarks/generate.py."""
    from nemo_diffgemma import DiffusionGemma, ModelConfig

    config = ModelConfig(
        vocab_size=vocabulary,
        hidden_size=512,
        intermediate_size=512,
        num_hidden_layers=6,
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
        initializer_range=512**-0.5,
        eos_token_id=1,
    )
    model = DiffusionGemma(config)
    model.init_weights(0)
    return model.eval()


def network(**sizes: Any) -> Any:
    from nemo_diffgemma import DiffusionGemma, ModelConfig

    hidden = sizes["hidden_size"]
    config = ModelConfig(
        **sizes,
        intermediate_size=2 * hidden,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        num_global_key_value_heads=2,
        global_head_dim=hidden // 4,
        num_experts=8,
        top_k_experts=2,
        moe_intermediate_size=hidden // 2,
        eos_token_id=1,
    )
    model = DiffusionGemma(config)
    model.init_weights(0)
    return model


def training_step(model: Any, tokens: Any, prompt: int, scored: int) -> Callable[[], object]:
    """Forward and backward of rows of equal length."""
    from nemo_diffgemma.diffusion import objective as method

    rows, columns = tokens.shape
    keys = ([columns] * rows, list(range(rows)))
    try:
        from nemo_diffgemma.diffusion.rows import Rows

        if "answers" in Rows.__dataclass_fields__:
            batch = Rows(tokens.flatten(), [((prompt, columns),)] * rows, *keys, fill_id=1)
        else:  # trees before answers were spans
            batch = Rows(tokens.flatten(), [prompt] * rows, *keys)  # type: ignore[call-arg,arg-type]
    except ImportError:  # trees before 26 Nov 2026 have rectangles
        batch = method.Rows(tokens, [prompt] * rows, *keys)  # type: ignore[call-arg]
    sizes = getattr(model, "model_config", None) or model.model  # its name in older trees
    length, vocabulary = sizes.canvas_length, sizes.vocab_size
    canvases = method.choose_canvases(batch, length, scored, seed=0)
    corrupted = method.corrupt(batch, canvases, length, vocabulary, seed=0)
    config, totals = method.ObjectiveConfig(canvases_per_example=scored), method.count(batch, canvases, length)

    def step() -> None:
        terms = (model, batch, canvases, corrupted, config, 0, totals)
        if hasattr(method, "Scored"):  # what training runs
            scored = method.Scored(*terms)
            scored.backward_canvases()
            scored.backward_context()
        else:  # trees before 26 Nov 2026 have one backward pass
            method.objective(*terms).total.backward()
        model.zero_grad(set_to_none=True)

    return step


def measure(only: str) -> None:
    """In one tree: the least processor seconds of each case, as JSON."""
    found = {}
    for name, call, repetitions in cases(only):
        call()
        seconds = []
        for _ in range(repetitions):
            start = time.process_time()
            call()
            seconds.append(time.process_time() - start)
        found[name] = min(seconds)
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="the other tree")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="cases with this in their name")
    options = parser.parse_args()
    if options.before is None:
        return measure(options.only)
    least: dict[tuple[Path, str], float] = {}
    for _ in range(options.rounds):
        for tree in (options.before.resolve(), HERE):
            environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
            output = subprocess.run(
                [sys.executable, __file__, "--only", options.only],
                env=environment,
                capture_output=True,
                text=True,
                check=True,
            )
            for name, seconds in json.loads(output.stdout.splitlines()[-1]).items():
                least[tree, name] = min(seconds, least.get((tree, name), seconds))
    print("| case | before, s | after, s | ratio |\n|---|---|---|---|")
    for name in dict.fromkeys(name for _, name in least):
        before, after = least[options.before.resolve(), name], least[HERE, name]
        print(f"| {name} | {before:.3f} | {after:.3f} | {after / before:.2f} |")


if __name__ == "__main__":
    main()
