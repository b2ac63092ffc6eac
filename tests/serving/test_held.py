"""Answers that are held to a language or have tokens in their places, beside others in one engine."""

from __future__ import annotations

import random

import pytest
import torch

from nemo_diffgemma.diffusion.sampler import accept
from nemo_diffgemma.diffusion.sampler_config import SamplerConfig
from nemo_diffgemma.errors import UserError
from nemo_diffgemma.serving.constraints import regex
from nemo_diffgemma.serving.engine import Engine
from nemo_diffgemma.serving.engine_config import EngineConfig
from nemo_diffgemma.serving.request import Reason, Request
from tests.parity.fixed import fixed
from tests.serving import cases, held
from tests.serving.test_engine import ROOMY, TIGHT

WIDE = dict(context_gb=0.05, typical_tokens=700, max_running=32, tokens_per_pass=2000)


@pytest.fixture(scope="module")
def network(single):
    return cases.network()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("config", [ROOMY, TIGHT], ids=["roomy", "tight"])
@pytest.mark.parametrize("count", [8, pytest.param(100, marks=pytest.mark.slow)])
def test_each_request_gets_what_it_gets_alone(single, dtype, config, count):
    assert held.differences({}, dtype, count, count, config) == []


def test_each_request_gets_what_it_gets_alone_in_a_layout(pool):
    given = dict(layout=dict(tensor=2, expert=2), dtype=torch.float32, count=8, seed=5, config=ROOMY)
    assert pool(4).run("tests.serving.held:differences", **given) == [[]] * 4


def infills(count: int, seed: int) -> list[Request]:
    draw, made = random.Random(seed), []
    for index in range(count):
        tokens = draw.randint(1, 40)
        sampler = SamplerConfig(draw.randint(1, 3), entropy_bound=draw.choice([0.1, 20.0]), eos_token_id=cases.EOS,
                                confidence_threshold=draw.choice([0.005, 6.0]))  # fmt: skip
        locked, length = held.locks(draw, tokens, 40), draw.choice([8, 16, 32])
        prompt = (3, draw.randrange(cases.IDS))
        made.append(Request(f"{index}", prompt, tokens, length, sampler, index, drafts=True, locked=locked))
    return made


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_infills_keep_what_is_locked_at_every_step(network, count):
    asked, engine = infills(count, count), Engine(network, EngineConfig(**WIDE))
    heard = cases.serve(engine, asked, 0)
    assert held.problems(asked, heard.tokens) == []
    for request in asked:
        for draft in heard.drafts[request.id]:
            length = request.canvas_length
            begin = draft.canvas * length
            cells = {place - begin: id for place, id in request.locked.items() if 0 <= place - begin < length}
            for cell, id in cells.items():
                assert (draft.tokens[cell], draft.accepted[cell], draft.entropy[cell]) == (id, True, 0.0)
            # free cells have the whole bound for themselves
            free = [cell for cell in range(length) if cell not in cells]
            expected = accept(torch.tensor(draft.entropy)[free][None], request.sampler.entropy_bound)[0].tolist()
            if free:
                assert [draft.accepted[cell] for cell in free] == expected


def test_both_sides_of_a_hole_are_used(network):
    """What is locked behind a hole changes what settles in it: the canvas is attended as a whole, at every step."""
    sampler = SamplerConfig(3, entropy_bound=20.0)
    one, other = (
        network.generate(
            torch.tensor([[3, 4]]), max_new_tokens=16, canvas_length=16, sampler=sampler, locked=[{12: id, 13: id}]
        ).sequences[0, 2:14]
        for id in (5, 200)
    )
    assert not torch.equal(one, other)


def test_every_step_is_given_what_is_locked(network):
    locked, seen = {2: 77, 9: 78, 17: 79}, []
    step = network.sampling_step

    def spy(inputs, cache):
        seen.append(inputs)
        return step(inputs, cache)

    asked = dict(max_new_tokens=24, canvas_length=8, sampler=SamplerConfig(4, confidence_threshold=0.0))
    free = network.generate(torch.tensor([[3, 4]] * 2), **asked)
    network.sampling_step = spy
    try:
        result = network.generate(torch.tensor([[3, 4]] * 2), **asked, locked=[locked, None])
    finally:
        del network.sampling_step
    assert torch.equal(result.sequences[1], free.sequences[1])  # a neighbour does not notice
    assert [result.sequences[0, 2 + place] for place in locked] == list(locked.values())
    table = network.embed_tokens.weight
    for index, inputs in enumerate(seen):
        canvas, number = divmod(index, 4)
        cells = {place - 8 * canvas: id for place, id in locked.items() if 0 <= place - 8 * canvas < 8}
        for cell, id in cells.items():
            assert inputs.canvas[0, cell] == id
            if number:
                assert torch.equal(inputs.soft[0, cell], table[id])
        assert bool(number) == (inputs.soft is not None)
    assert len(seen) == 12


def test_recorded_steps_are_the_steps(network):
    """A canvas with locked places, one without, and another with: buffers are not those of before."""
    given = dict(input_ids=torch.tensor([[3, 4], [5, 6]]), max_new_tokens=32, canvas_length=8, seed=[1, 2])
    given |= dict(sampler=SamplerConfig(4, confidence_threshold=0.0), locked=[{1: 9, 20: 8}, {2: 17}])
    plain = network.generate(**given)
    recorder = fixed(network)
    try:
        recorded = network.generate(**given)
    finally:
        network.fixed_steps = None
    assert recorder.replayed > 2 and torch.equal(plain.sequences, recorded.sequences)


def test_an_end_before_the_last_locked_place_ends_nothing(network):
    """Every token ends an answer: the first that may is the last that is locked."""
    sampler = SamplerConfig(1, eos_token_id=tuple(id for id in range(cases.IDS) if id not in (20, 21)), pad_token_id=0)
    request = Request("a", (3, 4), 64, 16, sampler, locked={3: 20, 21: 21})
    tokens, _ = cases.alone(network, request)
    assert len(tokens) > 21 and (tokens[3], tokens[21]) == (20, 21)
    engine = Engine(network, EngineConfig(**ROOMY))
    heard = cases.serve(engine, [request], 0)
    assert heard.tokens["a"] == tokens and heard.finished["a"].reason is Reason.STOP
    whole = network.generate(torch.tensor([[3, 4]]), max_new_tokens=64, canvas_length=16, sampler=sampler, seed=[0],
                             locked=[request.locked]).sequences[0, 2:]  # fmt: skip
    assert whole[: len(tokens)].tolist() == tokens and (whole[len(tokens) :] == 0).all()


def test_a_whole_answer_has_stopped(network):
    """It fills max_tokens and no token ends it; still nothing of it is missing."""
    language = regex("[0-9]{4}")
    request = Request("a", (3, 4), 4, 8, SamplerConfig(2, eos_token_id=cases.EOS), language=language)
    heard = cases.serve(Engine(network, EngineConfig(**ROOMY)), [request], 0, automata=held.automata([request]))
    assert held.problems([request], heard.tokens) == [] and len(heard.tokens["a"]) == 4
    assert heard.finished["a"].reason is Reason.STOP


@pytest.mark.parametrize(
    "change, what",
    [
        (dict(locked={8: 3}), "locked position 8; expected 0 to 7"),
        (dict(locked={-1: 3}), "locked position -1; expected 0 to 7"),
        (dict(locked={1: 500}), "has id 500; expected an id from 0 to 499"),
        (dict(locked={1: -1}), "has id -1"),
        (dict(language=held.LETTERS), "shortest text .* has 20 tokens; max_tokens=8"),
        (dict(language=regex("a*"), stop=("a",)), "stop='a' would cut an answer with a language .regex."),
        (dict(locked={1: 3}, stop=("a",)), "stop='a' would cut an answer with locked places"),
        (dict(language=regex("a*"), locked={2: 40}), "no text of at most 8 tokens has the locked tokens"),
        (dict(language=regex("a*"), sampler=SamplerConfig(eos_token_id=5)), "end with one of .1, 7, 9.; sampler"),
    ],
)
def test_what_can_never_be_held_is_refused(network, change, what):
    engine = Engine(network, EngineConfig(**ROOMY))
    given = dict(id="a", prompt=(1, 2), max_tokens=8, canvas_length=8, sampler=SamplerConfig(eos_token_id=cases.EOS))
    request = Request(**{**given, **change})
    with pytest.raises(UserError, match=what):
        engine.add(request, held.automata([request]).get("a"))
    assert not engine.has_work
    if not request.language and not request.stop:
        with pytest.raises(UserError, match=what):
            network.generate(torch.tensor([[1, 2]]), max_new_tokens=8, sampler=request.sampler, locked=[request.locked])


def test_a_language_without_its_automaton_is_refused(network):
    with pytest.raises(UserError, match="compile it first"):
        Engine(network, EngineConfig(**ROOMY)).add(Request("a", (1,), 8, 8, language=regex("a*")))
    with pytest.raises(UserError, match="2 entries for 1 rows"):
        network.generate(torch.tensor([[1]]), locked=[None, None])
