"""Sequences that have nothing in common but the pass they run in: of one token to three windows, with and without
cached context, at different first positions, with none to four canvases. Here, in every layout and in benchmarks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemo_diffgemma.diffusion.generate import StepInputs
from nemo_diffgemma.model import vocabulary
from nemo_diffgemma.model.cache import Cache
from nemo_diffgemma.parallel import device
from tests.reference import SIZES

TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True)
class Member:
    """One sequence: cached ids, new ids, and canvases [m, C] that start at the positions `starts`.

    Some canvases have a signal. The position of the first token is `first`.
    """

    first: int
    cached: Tensor
    new: Tensor
    starts: tuple[int, ...]
    canvases: Tensor
    soft: Tensor  # [m, C, H], zero where there is none


_PLAN = (
    # first position, cached, new, starts of canvases counted from `first`
    (0, 0, 1, (1,)),
    (0, 5, 0, (5,)),
    (3, 9, 4, (9, 11, 13)),
    (0, 0, 24, (2, 8, 9, 24)),
    (5, 17, 7, (20, 24)),
)
"""For a window of 8. A canvas starts behind the cached context, as far as that was trimmed."""


def members(size: str = "base", seed: int = 0) -> list[Member]:
    vocabulary_size, length = SIZES[size]["vocab_size"], SIZES[size]["canvas_length"]
    generator = torch.Generator().manual_seed(seed)

    def ids(*shape: int) -> Tensor:
        return torch.randint(vocabulary_size, shape, generator=generator)

    made = []
    for index, (first, cached, new, starts) in enumerate(_PLAN):
        soft = torch.randn(len(starts), length, SIZES[size]["hidden_size"], generator=generator)
        soft[index % 2 :: 2] = 0.0
        places = tuple(first + start for start in starts)
        made.append(Member(first, ids(cached), ids(new), places, ids(len(starts), length), soft))
    return made


class Outcome(NamedTuple):
    """Of one member: states of its canvases [m, C, H] and of its new context [S, H], and its keys and values."""

    canvas_hidden: Tensor
    context_hidden: Tensor
    keys_values: list[tuple[Tensor, Tensor]]


def encoded(model: Any, chosen: Sequence[Member]) -> Cache:
    """The cached parts in one pass, kept whole: with gradient where it is enabled."""
    cache = Cache.empty(member.first for member in chosen)
    lengths = [len(member.cached) for member in chosen]
    if not any(lengths):
        return cache
    tokens = torch.cat([member.cached for member in chosen]).to(device())
    return model.run(tokens, model.stream(cache.sequences, lengths)).cache


def pass_of(model: Any, chosen: Sequence[Member], cache: Cache) -> list[Outcome]:
    """New context and canvases of all of them in one pass behind their caches."""
    places = [(index, start) for index, member in enumerate(chosen) for start in member.starts]
    stream = model.stream(cache.sequences, [len(member.new) for member in chosen], places)
    tokens = torch.cat([*(member.new for member in chosen), *(member.canvases.flatten() for member in chosen)])
    soft = torch.cat([member.soft for member in chosen]).to(device())
    result = model.run(tokens.to(device()), stream, cache=cache, soft=soft, need_context_hidden=True)
    canvases = result.canvas_hidden.view(*soft.shape).split([len(member.starts) for member in chosen])
    contexts = result.context_hidden.split([len(member.new) for member in chosen])
    return [
        Outcome(canvas, context, [layer.of(index) for layer in result.cache.layers])
        for index, (canvas, context) in enumerate(zip(canvases, contexts, strict=True))
    ]


def loss_of(outcomes: Sequence[Outcome], chosen: Sequence[Member]) -> Tensor:
    """Something that every state, key and value of a member enters, with weights that are its own."""
    total = torch.zeros((), device=device())
    for outcome, member in zip(outcomes, chosen, strict=True):
        generator = torch.Generator().manual_seed(member.first + 10 * len(member.new) + len(member.cached))
        for tensor in (outcome.canvas_hidden, outcome.context_hidden):
            total = total + (tensor * torch.randn(tensor.shape, generator=generator).to(device())).sum()
    return total


def logits_of(model: Any, outcome: Outcome) -> Tensor:
    """Of the member's canvases, [m*C, V]."""
    hidden, table = outcome.canvas_hidden.flatten(0, 1), model.embed_tokens
    return vocabulary.logits(hidden, table.weight, table.shard, model.model_config.final_logit_softcapping).cpu()


def step_of(chosen: Sequence[Member], seed: int = 1) -> StepInputs:
    """A denoising step of the members' last canvases, each behind its new context: some have begun, some begin."""
    generator = torch.Generator().manual_seed(seed)
    uniforms = {member.first + len(member.new): torch.rand(4, generator=generator) for member in members()}
    return StepInputs(
        canvas=torch.stack([member.canvases[-1] for member in chosen]).to(device()),
        uniforms=torch.stack([uniforms[member.first + len(member.new)] for member in chosen]).to(device()),
        replacements=torch.stack([member.canvases[0] for member in chosen]).to(device()),
        temperature=0.7,
        entropy_bound=5.0,
        soft=torch.stack([member.soft[-1] for member in chosen]).to(device()),
        context=[member.new.to(device()) for member in chosen],
    )
