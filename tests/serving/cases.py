"""Requests for an engine, and what each of them gets alone."""

from __future__ import annotations

import random
from collections.abc import Mapping, Set
from typing import Any

import torch

from nemo_diffgemma import DiffusionGemma, ModelConfig, ParallelLayout, SamplerConfig
from nemo_diffgemma.parallel import initialize
from nemo_diffgemma.serving.constraints import Constraint
from nemo_diffgemma.serving.constraints.token_automaton import TokenAutomaton
from nemo_diffgemma.serving.engine import Engine
from nemo_diffgemma.serving.engine_config import EngineConfig
from nemo_diffgemma.serving.request import Draft, Finished, Reason, Request, Scores, Settled

EOS = (1, 7, 9)
IDS, CANVAS = 500, 32
SIZES: dict[str, Any] = dict(
    vocab_size=IDS,
    hidden_size=64,
    intermediate_size=96,
    moe_intermediate_size=16,
    num_experts=8,
    top_k_experts=2,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    global_head_dim=32,
    num_global_key_value_heads=1,
    sliding_window=64,
    canvas_length=CANVAS,
    max_position_embeddings=4096,
    eos_token_id=list(EOS),
)


def network(dtype: torch.dtype = torch.float32, layout: ParallelLayout | None = None) -> DiffusionGemma:
    """A network with random weights, the same in every layout."""
    initialize(layout or ParallelLayout())
    model = DiffusionGemma(ModelConfig(**SIZES), dtype)
    model.init_weights(0)
    return model.eval()


def requests(count: int, seed: int) -> list[Request]:
    """Prompts of all kinds of lengths, a third with a beginning in common; all settings differ."""
    draw = random.Random(seed)
    ids = lambda length: tuple(draw.randrange(IDS) for _ in range(length))
    shared, made = ids(600), []
    for index in range(count):
        prompt = ids(draw.choice([1, 5, 40, 255, 256, 300, 513]))
        if index % 3 == 0:
            prompt = shared[: draw.choice([256, 512, 600])] + prompt[:60]
        sampler = SamplerConfig(
            max_denoising_steps=draw.choice([1, 3, 6]),
            entropy_bound=draw.choice([0.1, 2.0, 50.0]),
            t_min=draw.choice([0.2, 0.4]),
            confidence_threshold=draw.choice([0.005, 6.0]),
            stability_threshold=draw.choice([0, 1, 2]),
            eos_token_id=EOS,
            pad_token_id=0,
        )
        length = draw.choice([1, 3, 7, 8, 16, CANVAS])
        most, key = min(draw.choice([3, 16, 50, 70]), 7 * length), draw.randrange(-1000, 1000)
        made.append(Request(str(index), prompt, most, length, sampler, key, drafts=index % 5 == 0))
    return made


def alone(model: DiffusionGemma, request: Request, automaton: TokenAutomaton | None = None) -> tuple[list[int], int]:
    """Tokens that a request gets by itself, up to what ends its answer, and the steps of all its canvases."""
    constraints = None if automaton is None else [Constraint(automaton, request.max_tokens)]
    result = model.generate(
        torch.tensor([request.prompt]),
        max_new_tokens=request.max_tokens,
        canvas_length=request.canvas_length,
        sampler=request.sampler,
        seed=[request.seed],
        constraints=constraints,
        locked=[request.locked],
    )
    tokens = result.sequences[0, len(request.prompt) :].tolist()
    first = max(request.locked, default=0)
    ends = [index for index, id in enumerate(tokens) if id in request.sampler.eos_ids and index >= first]
    return tokens[: ends[0] + 1 if ends else None][: request.max_tokens], int(result.forwards[0])


class Heard:
    """What was heard of requests."""

    def __init__(self) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.steps: dict[str, list[int]] = {}
        self.scores: dict[str, list[Scores]] = {}
        self.drafts: dict[str, list[Draft]] = {}
        self.finished: dict[str, Finished] = {}

    def take(self, events: list[Any]) -> None:
        for event in events:
            assert event.id not in self.finished, "nothing is heard of a request that is over"
            if isinstance(event, Settled):
                self.tokens.setdefault(event.id, []).extend(event.tokens)
                self.steps.setdefault(event.id, []).append(event.steps)
                shown = [draft for draft in self.drafts.get(event.id, []) if draft.canvas == event.canvas]
                assert not shown or event.accepted == sum(sum(draft.accepted) for draft in shown)
                if event.scores is not None:
                    self.scores.setdefault(event.id, []).extend(event.scores)
            elif isinstance(event, Draft):
                self.drafts.setdefault(event.id, []).append(event)
            else:
                self.finished[event.id] = event


def serve(
    engine: Engine,
    asked: list[Request],
    seed: int,
    cancelled: Set[str] = frozenset(),
    automata: Mapping[str, TokenAutomaton] = {},
) -> Heard:
    """Run an engine until all is answered. Requests arrive and are cancelled at random moments."""
    draw, todo, heard = random.Random(seed), list(asked), Heard()
    while todo or engine.has_work:
        for _ in range(draw.choice([0, 0, 1, 3])):
            if todo:
                engine.add(todo[0], automata.get(todo.pop(0).id))
        for id in sorted(cancelled - heard.finished.keys()):
            if draw.random() < 0.2:
                heard.take(engine.cancel(id))
        heard.take(engine.step())
    return heard


def differences(
    layout: dict[str, int], dtype: torch.dtype, count: int, seed: int, config: dict[str, Any], cancel: int = 0
) -> list[str]:
    """Requests that get something else in an engine of a layout than alone in it. So many of them are cancelled: what
    they had by then is the beginning of what they get alone."""
    model = network(dtype, ParallelLayout(**layout))
    engine, asked = Engine(model, EngineConfig(**config)), requests(count, seed)
    cancelled = {request.id for request in random.Random(seed).sample(asked, cancel)}
    heard, wrong = serve(engine, asked, seed, cancelled), []
    assert heard.finished.keys() == {request.id for request in asked}
    for request in asked:
        (tokens, steps), found = alone(model, request), heard.tokens.get(request.id, [])
        is_whole = heard.finished[request.id].reason is not Reason.CANCELLED
        same = (found, sum(heard.steps[request.id])) == (tokens, steps) if is_whole else found == tokens[: len(found)]
        if not same:
            wrong.append(f"{request}: {found} in {heard.steps.get(request.id)} steps, not {tokens} in {steps}")
    return wrong


def scores_in_layout(layout: dict[str, int], asked: list[Request], config: dict[str, Any]) -> dict[str, list[Scores]]:
    """Scores that requests get in an engine of a layout."""
    model = network(layout=ParallelLayout(**layout))
    return serve(Engine(model, EngineConfig(**config)), asked, 1).scores
