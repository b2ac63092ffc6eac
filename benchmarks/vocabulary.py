"""Cost of the vocabulary sweep of one denoising step by chunk size, and of its parts.

    python benchmarks/vocabulary.py --vocabulary 262144

One sweep computes the product with the table, softcap, log-sum-exp, entropy, arg-max, a sample and the soft embedding
of 256 positions. "dense" is the same from full-size tensors, as a straightforward implementation does it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from nemo_diffgemma.model import vocabulary
from nemo_diffgemma.parallel import ParallelLayout, initialize, process_groups


def dense(hidden: Tensor, table: Tensor, uniforms: Tensor) -> None:
    """The same numbers from full-size tensors."""
    logits = 30 * torch.tanh(hidden @ table.T / 30) / 0.8
    log_probabilities = logits.log_softmax(-1)
    probabilities = log_probabilities.exp()
    -(probabilities * log_probabilities).sum(-1)
    logits.argmax(-1)
    (probabilities.cumsum(-1) > uniforms[:, None]).to(torch.int8).argmax(-1)
    probabilities @ table


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Median of `repeats` calls after one that warms up."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=262144)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    initialize(ParallelLayout())
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(256, options.hidden, generator=generator)
    table = torch.randn(options.vocabulary, options.hidden, generator=generator) * options.hidden**-0.5
    uniforms = torch.rand(256, generator=generator)
    shard = vocabulary.VocabularyShard.of(options.vocabulary, options.vocabulary, process_groups().tp)
    print(
        f"vocabulary {options.vocabulary}, hidden {options.hidden}, 256 positions, float32, {options.threads} threads"
    )
    print("| chunk | seconds |\n|---|---|")
    with torch.no_grad():
        for chunk in (256, 512, 1024, 2048, 4096, 8192, 32768, options.vocabulary):
            cost = seconds(
                lambda chunk=chunk: vocabulary.statistics(
                    hidden, table, shard, softcap=30.0, temperature=0.8, uniforms_N=uniforms, chunk=chunk
                ),
                options.repeats,
            )
            print(f"| {chunk} | {cost:.3f} |")
        print(f"| dense | {seconds(lambda: dense(hidden, table, uniforms), options.repeats):.3f} |")
        products = seconds(lambda: (hidden @ table.T) @ table, options.repeats)
        print(f"| the two products alone | {products:.3f} |")


if __name__ == "__main__":
    main()
