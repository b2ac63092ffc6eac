"""Requests of which some are held to a language, or have tokens locked in their places, and what each gets alone."""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import cache
from typing import Any

import msgspec
import torch

from nemo_diffgemma import ParallelLayout
from nemo_diffgemma.serving.constraints import (
    Language,
    Limits,
    Vocabulary,
    bytes_of_tokens,
    choice,
    json_of_schema,
    regex,
    tool_calls,
)
from nemo_diffgemma.serving.constraints.token_automaton import TokenAutomaton
from nemo_diffgemma.serving.constraints.worker import Worker
from nemo_diffgemma.serving.engine import Engine
from nemo_diffgemma.serving.engine_config import EngineConfig
from nemo_diffgemma.serving.request import Request
from nemo_diffgemma.serving.text import ServedText, files_of
from tests.serving import cases, gemma

LETTERS = regex("[a-z ]{20,}")
_WEATHER = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
_PERSON = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}}
LANGUAGES = (
    LETTERS,
    regex("[0-9]{4}-[0-9]{2}-[0-9]{2}"),
    choice(["yes", "no", "the year was 1912"]),
    json_of_schema({**_PERSON, "required": ["name", "age"], "additionalProperties": False}),
    regex("(?:é|你)*[.]"),
    tool_calls([{"type": "function", "function": {"name": "weather", "parameters": _WEATHER}}], parallel=True),
)


@cache
def text() -> ServedText:
    class Read:
        tokenizer = gemma.tokenizer()

    files = files_of(Read())
    assert files is not None
    return ServedText(files)


@cache
def worker() -> Worker:
    return Worker(Vocabulary(bytes_of_tokens(gemma.tokenizer()), cases.IDS, cases.EOS), Limits())


@cache
def automaton(language: Language) -> TokenAutomaton:
    return worker().compile(language)


def automata(asked: list[Request]) -> dict[str, TokenAutomaton]:
    """Those of the languages of requests, by their ids."""
    return {request.id: automaton(request.language) for request in asked if request.language is not None}


def locks(draw: random.Random, tokens: int, most: int) -> dict[int, int]:
    """Some places of an answer; the last of them may end it, and the same token before that ends nothing."""
    places = sorted(draw.sample(range(tokens), draw.randint(1, min(most, tokens))))
    return {place: draw.choice([*range(cases.IDS), *cases.EOS * 20]) for place in places}


def requests(count: int, seed: int) -> list[Request]:
    """As those of `cases`: a quarter free, a quarter with locked places, the others of a language, some with both."""
    draw, made = random.Random(seed), []
    for index, request in enumerate(cases.requests(count, seed)):
        if index % 4 == 1:
            request = msgspec.structs.replace(request, locked=locks(draw, request.max_tokens, 6))
        elif index % 4:
            language = draw.choice(LANGUAGES)
            found = automaton(language)
            tokens = int(found.distance[found.start]) + draw.choice([0, 1, 9, 40])
            letters = {draw.randrange(15): gemma.ids(draw.choice("abcxyz"))[0] for _ in range(2)}
            locked = letters if language == LETTERS and draw.random() < 0.7 else {}
            request = msgspec.structs.replace(request, language=language, max_tokens=tokens, locked=locked)
        made.append(request)
    return made


def problems(asked: list[Request], tokens: Mapping[str, list[int]]) -> list[str]:
    """Answers that are not of their language, or have something else in locked places."""
    found = []
    for request in asked:
        ids = tokens[request.id]
        if any(place >= len(ids) or ids[place] != id for place, id in request.locked.items()):
            found.append(f"{request.locked} is not in {ids}")
        if request.language is not None:
            ends = [place for place, id in enumerate(ids) if id in cases.EOS]
            request.language.check(text().decode_marked(ids[: ends[0]] if ends else ids))
    return found


def differences(layout: dict[str, int], dtype: torch.dtype, count: int, seed: int, config: dict[str, Any]) -> list[str]:
    """Requests that get something else in an engine of a layout than alone in it, or not what holds them."""
    model = cases.network(dtype, ParallelLayout(**layout))
    engine, asked = Engine(model, EngineConfig(**config)), requests(count, seed)
    known = automata(asked)
    heard = cases.serve(engine, asked, seed, automata=known)
    wrong = problems(asked, heard.tokens)
    for request in asked:
        tokens, steps = cases.alone(model, request, known.get(request.id))
        if heard.tokens[request.id] != tokens or sum(heard.steps[request.id]) != steps:
            wrong.append(f"{request}: {heard.tokens[request.id]} in {heard.steps[request.id]} steps, not {tokens}")
    return wrong
