"""A small model over the tokens of `examples`, and what ranks do with it."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import torch
from torch import Tensor

from nemo_diffgemma.serving.constraints import Constraint, Language, Limits, Vocabulary, json_of_schema, regex
from nemo_diffgemma.serving.constraints.worker import Worker
from tests.serving import examples

LENGTH = 16
LONGEST = 96  # tokens of the shortest text of a random constraint


@cache
def worker() -> Worker:
    return Worker(Vocabulary(examples.tokens(), examples.vocab_size(), (examples.EOS,)), Limits())


def model(layout: dict[str, int]) -> Any:
    """Random weights, the same in every layout."""
    from nemo_diffgemma import DiffusionGemma, ModelConfig, ParallelLayout
    from nemo_diffgemma.parallel import initialize

    initialize(ParallelLayout(**layout))
    config = ModelConfig(
        vocab_size=examples.vocab_size(), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_global_key_value_heads=2, global_head_dim=32,
        num_experts=4, top_k_experts=2, moe_intermediate_size=24, sliding_window=8, canvas_length=LENGTH,
        initializer_range=0.3, eos_token_id=examples.EOS, pad_token_id=examples.PAD,
    )  # fmt: skip
    made = DiffusionGemma(config).eval()
    made.init_weights(0)
    return made


def constrained(seed: int, many: int) -> list[tuple[Language, Constraint]]:
    """Random constraints, half of them regexes and half schemas; for many of them hardly any text is short enough."""
    draw, found = random.Random(seed), []
    while len(found) < many:
        depth = draw.randint(1, 3)
        language = regex(examples.random_regex(draw)) if draw.random() < 0.5 else json_of_schema(
            examples.random_schema(draw, depth)
        )  # fmt: skip
        automaton = worker().compile(language)
        shortest = int(automaton.distance[automaton.start])
        if shortest <= LONGEST:
            tokens = max(1, shortest + draw.choice([0, 0, 1, 5, 40]))
            found.append((language, Constraint(automaton, tokens)))
    return found


def generated(layout: dict[str, int], seed: int, many: int, steps: int) -> Tensor:
    """Answers [many + 1, tokens] to random constraints; the last row has none."""
    from nemo_diffgemma import SamplerConfig

    made = model(layout)
    sampler = SamplerConfig(max_denoising_steps=steps, eos_token_id=examples.EOS, pad_token_id=examples.PAD)
    prompts = torch.randint(4, examples.vocab_size(), (many + 1, 5), generator=torch.Generator().manual_seed(seed))
    constraints = [constraint for _, constraint in constrained(seed, many)]
    longest = max(constraint.max_tokens for constraint in constraints)
    result = made.generate(
        prompts, max_new_tokens=longest, sampler=sampler, seed=seed, constraints=[*constraints, None]
    )
    return result.sequences[:, 5:].cpu()


def served(layout: dict[str, int], seed: int, many: int, steps: int) -> dict[str, list[int]]:
    """Answers to the same constraints from an engine in which many run at a time, some of them without one, by id."""
    from nemo_diffgemma import SamplerConfig
    from nemo_diffgemma.serving.engine import Engine
    from nemo_diffgemma.serving.engine_config import EngineConfig
    from nemo_diffgemma.serving.request import Request
    from tests.serving.cases import serve

    made, draw = model(layout), random.Random(seed)
    engine = Engine(made, EngineConfig(context_gb=0.05, typical_tokens=300, max_running=24, tokens_per_pass=1024))
    sampler = SamplerConfig(max_denoising_steps=steps, eos_token_id=examples.EOS, pad_token_id=examples.PAD)
    asked, automata = [], {}
    for index, (language, constraint) in enumerate(constrained(seed, many)):
        prompt = tuple(draw.randrange(4, examples.vocab_size()) for _ in range(draw.randint(1, 9)))
        given = (prompt, constraint.max_tokens, draw.choice([4, LENGTH]), sampler, index)
        asked.append(Request(str(index), *given, language=language))
        automata[str(index)] = constraint.automaton
        if index % 5 == 0:
            asked.append(Request(f"free {index}", *given))
    return serve(engine, asked, seed, automata=automata).tokens
