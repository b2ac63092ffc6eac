"""Unequal sequences in one pass against each alone: a denoising step, and a training step.

    python benchmarks/mixed.py             # prints the rows as they stand in benchmarks/README.md

The set: contexts of 32 to 1500 tokens, one canvas of 64 each in the denoising step, where two sequences have new
context of 64 tokens; responses of one to four canvases, all of them scored, in the training step. Together and alone
alternate; seconds are those of the processor, the least of all rounds, since others may use the machine: with one
thread, what an idle machine would take. The model is that of benchmarks/objective.py, vocabulary 4096.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from objective import CANVAS, network

from nemo_diffgemma import DiffusionGemma, ParallelLayout
from nemo_diffgemma.diffusion import objective as method
from nemo_diffgemma.diffusion.generate import StepInputs
from nemo_diffgemma.diffusion.rows import Rows
from nemo_diffgemma.parallel import initialize

CONTEXTS = (32, 100, 300, 700, 1500)
NEW = (0, CANVAS, 0, CANVAS, 0)
RESPONSES = (1, 2, 3, 4, 1)  # canvases
ALL = tuple(range(len(CONTEXTS)))


def denoising_step(model: DiffusionGemma, chosen: tuple[int, ...]) -> Callable[[], object]:
    """One step of the chosen sequences behind their caches."""
    generator = torch.Generator().manual_seed(0)

    def ids(tokens: int) -> torch.Tensor:
        return torch.randint(3, model.model_config.vocab_size, (tokens,), generator=generator)

    contexts = [CONTEXTS[index] for index in chosen]
    with torch.no_grad():
        start = model.start([0] * len(chosen))
        tokens = torch.cat([ids(length) for length in contexts])
        cache = model.run(tokens, model.stream(start.sequences, contexts)).cache.trimmed(model.model_config)
    canvas = torch.stack([ids(CANVAS) for _ in chosen])
    soft = torch.randn(*canvas.shape, model.model_config.hidden_size, generator=generator)
    inputs = StepInputs(canvas, torch.rand(canvas.shape), canvas, 0.6, 0.1, soft, [ids(NEW[index]) for index in chosen])
    return lambda: model.sampling_step(inputs, cache)


def training_step(model: DiffusionGemma, chosen: tuple[int, ...]) -> Callable[[], object]:
    """Forward and backward of the chosen rows."""
    prompts = [CONTEXTS[index] for index in chosen]
    lengths = [CONTEXTS[index] + RESPONSES[index] * CANVAS for index in chosen]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, model.model_config.vocab_size, (sum(lengths),), generator=generator)
    answers = [((prompt, length),) for prompt, length in zip(prompts, lengths, strict=True)]
    rows = Rows(tokens, answers, lengths, chosen, fill_id=1)
    canvases = method.choose_canvases(rows, CANVAS, 0, seed=0)
    corrupted = method.corrupt(rows, canvases, CANVAS, model.model_config.vocab_size, seed=0)
    config, totals = method.ObjectiveConfig(canvases_per_example=0), method.count(rows, canvases, CANVAS)

    def step() -> None:
        method.objective(model, rows, canvases, corrupted, config, 0, totals).total.backward()
        model.zero_grad(set_to_none=True)

    return step


def seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    initialize(ParallelLayout())
    model = network(4096)
    print("| step | together, s | sum of each alone, s | ratio |\n|---|---|---|---|")
    for make in (denoising_step, training_step):
        together, alone = make(model, ALL), [make(model, (index,)) for index in ALL]
        for call in (together, *alone):
            call()
        rounds = [(seconds(together), sum(map(seconds, alone))) for _ in range(options.rounds)]
        mixed, parts = (min(values) for values in zip(*rounds, strict=True))
        print(f"| {make.__name__.replace('_', ' ')} | {mixed:.2f} | {parts:.2f} | {mixed / parts:.2f} |")


if __name__ == "__main__":
    main()
