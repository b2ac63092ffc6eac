"""What a constraint costs: a denoising step with one against a step without, and compiling it.

    python benchmarks/constraints.py --tokenizer PATH/tokenizer.json    # of Gemma; without it, as many made-up words

The model and the canvas are those of `benchmarks/generate.py`: 256 tokens after a prompt of 512, 262144 ids, all steps.
A pair is one run of each, alternating; times are processor seconds, the ratio is the median over pairs.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 64},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"type": "string"}},
        "address": {"type": "object", "properties": {"city": {"type": "string"}, "zip": {"pattern": "^[0-9]{5}$"}}},
        "born": {"type": "string", "format": "date"},
    },
    "required": ["name", "age"],
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json")
    parser.add_argument("--only", nargs="*", help="of the constraints, by name")
    parser.add_argument("--vocabulary", type=int, default=262144)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    return parser.parse_args()


def words(options: argparse.Namespace) -> dict[int, bytes]:
    """The bytes of tokens, from a tokenizer or made up: all bytes, and words of letters, digits and JSON's marks."""
    from nemo_diffgemma.serving.constraints import bytes_of_tokens

    if options.tokenizer is not None:
        from tokenizers import Tokenizer

        return bytes_of_tokens(Tokenizer.from_file(str(options.tokenizer)))
    draw = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgkqjxz" * 4 + ' 0123456789éü你{}[]":,.\n'
    made = [bytes([byte]) for byte in range(256)]
    while len(made) < options.vocabulary - 256:
        made.append("".join(draw.choices(letters, k=min(12, 2 + int(draw.expovariate(0.3))))).encode())
    return dict(enumerate(made, 3))


def languages() -> dict[str, Any]:
    from nemo_diffgemma.serving.constraints import choice, json_object, json_of_schema, regex

    return {
        "date": regex("[0-9]{4}-[0-9]{2}-[0-9]{2}"),
        "choice of 100": choice([f"item number {number}" for number in range(100)]),
        "person": json_of_schema(PERSON),
        "any JSON object": json_object(),
        ".{0,200}": regex(".{0,200}"),
        "20 strings of 50": json_of_schema(
            {"type": "array", "items": {"type": "string", "maxLength": 50}, "maxItems": 20}
        ),
    }


def processor_seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def main() -> None:
    options = arguments()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    import torch

    from nemo_diffgemma import DiffusionGemma, ModelConfig, ParallelLayout, SamplerConfig
    from nemo_diffgemma.parallel import initialize
    from nemo_diffgemma.serving.constraints import Constraint, Vocabulary
    from nemo_diffgemma.serving.constraints.worker import Limits, Worker
    from nemo_diffgemma.serving.freed_memory import keep_freed_memory

    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as a replica does
    initialize(ParallelLayout())
    config = ModelConfig(
        vocab_size=options.vocabulary, hidden_size=options.hidden, intermediate_size=options.hidden,
        num_hidden_layers=options.layers, num_attention_heads=8, num_key_value_heads=4, head_dim=64,
        num_global_key_value_heads=2, global_head_dim=128, num_experts=32, top_k_experts=8, moe_intermediate_size=176,
        sliding_window=256, canvas_length=256, initializer_range=options.hidden**-0.5, eos_token_id=1,
    )  # fmt: skip
    model = DiffusionGemma(config).eval()
    model.init_weights(0)
    worker = Worker(Vocabulary(words(options), options.vocabulary, (1,)), Limits())
    prompt = torch.randint(3, options.vocabulary, (1, 512), generator=torch.Generator().manual_seed(0))
    # more steps of stability than there are: all steps run
    sampler = SamplerConfig(options.steps, stability_threshold=options.steps + 1, eos_token_id=1, pad_token_id=0)
    print("| constraint | compiling, s | states | classes | edges | a step without, s | with, s | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    known = languages()
    for name, language in ((name, known[name]) for name in options.only or known):
        start = time.process_time()
        automaton = worker.compile(language)
        compiling = time.process_time() - start
        times: list[list[float]] = [[], []]
        for pair in range(options.pairs + 1):
            for constraints, own in zip((None, [Constraint(automaton)]), times, strict=True):
                call = lambda constraints=constraints: model.generate(prompt, sampler=sampler, constraints=constraints)
                own.append(processor_seconds(call) / options.steps)
            print(f"{name}, pair {pair}: {times[0][-1]:.2f} and {times[1][-1]:.2f} s", file=sys.stderr)
        without, bound = (own[1:] for own in times)  # the first pair warms up
        ratio = statistics.median(b / a for a, b in zip(without, bound, strict=True))
        classes, states = automaton.following.shape
        print(
            f"| {name} | {compiling:.2f} | {states} | {classes} | {len(automaton.edges.source)} | "
            f"{statistics.median(without):.3f} | {statistics.median(bound):.3f} | {ratio:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
