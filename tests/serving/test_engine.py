"""The engine: whatever runs beside a request, it gets what it would get alone."""

from __future__ import annotations

import itertools

import msgspec
import pytest
import torch

from nemo_diffgemma.config import GLOBAL, SLIDING
from nemo_diffgemma.diffusion.sampler_config import SamplerConfig
from nemo_diffgemma.errors import UserError
from nemo_diffgemma.model.visibility import TILE
from nemo_diffgemma.serving.blocks import Blocks
from nemo_diffgemma.serving.context_memory import ContextMemory
from nemo_diffgemma.serving.engine import Engine
from nemo_diffgemma.serving.engine_config import EngineConfig
from nemo_diffgemma.serving.markers import Markers
from nemo_diffgemma.serving.prefix_cache import BLOCKS_OF_TILE, PrefixCache
from nemo_diffgemma.serving.prefix_keys import keys_of
from nemo_diffgemma.serving.request import Reason, Request
from tests.serving import cases

ROOMY = dict(context_gb=0.01, typical_tokens=700, max_running=5, tokens_per_pass=600)
TIGHT = dict(context_gb=0.0022, typical_tokens=700, max_running=5, tokens_per_pass=300)


@pytest.fixture
def engine(single):
    return Engine(cases.network(), EngineConfig(**ROOMY), decode=lambda ids: "".join(chr(97 + id % 26) for id in ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("config", [ROOMY, TIGHT], ids=["roomy", "tight"])
def test_tokens_are_those_of_each_request_alone(single, dtype, config):
    """To the bit: these networks multiply the smallest difference until tokens differ."""
    assert cases.differences({}, dtype, 16, 3, config) == []


@pytest.mark.slow  # threads wait for each other where cores are busy
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("count", [2, 3])
def test_tokens_are_those_of_each_request_alone_in_several_threads(single, threads, dtype, count):
    threads(count)
    assert cases.differences({}, dtype, 12, 4, ROOMY) == []


def test_tokens_are_those_of_each_request_alone_in_a_layout(pool):
    found = pool(4).run(
        "tests.serving.cases:differences",
        layout=dict(tensor=2, expert=2),
        dtype=torch.float32,
        count=8,
        seed=5,
        config=ROOMY,
    )
    assert found == [[]] * 4


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("config", [ROOMY, TIGHT], ids=["roomy", "tight"])
def test_300_requests_some_of_them_cancelled(single, dtype, config):
    assert cases.differences({}, dtype, 300, 11, config, cancel=60) == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("config", [ROOMY, TIGHT], ids=["roomy", "tight"])
def test_300_requests_some_of_them_cancelled_in_a_layout(pool, config):
    given = dict(layout=dict(tensor=2, expert=2), dtype=torch.float32, count=300, seed=12, config=config, cancel=60)
    assert pool(4).run("tests.serving.cases:differences", timeout=3000, **given) == [[]] * 4


def test_whoever_is_moved_out_goes_on_as_if_nothing_had_happened(single):
    """Memory for three of five answers: the youngest give way and come back, and all blocks are free in the end."""
    engine, moved, heard = Engine(cases.network(), EngineConfig(**TIGHT)), set(), cases.Heard()
    sampler = SamplerConfig(max_denoising_steps=2, entropy_bound=20.0)
    asked = [Request(str(key), (3, 4, key), 600, 32, sampler, seed=key) for key in range(5)]
    for request in asked:
        engine.add(request)
    while engine.has_work:
        heard.take(engine.step())
        moved |= {sequence.request.id for sequence in engine.moved_out}
    assert len(moved) > 1
    for request in asked:
        assert heard.tokens[request.id] == cases.alone(engine.network, request)[0]
    for kind, blocks in engine.memory.blocks.items():
        engine.memory.prefixes.give_up(kind, blocks.count)
        assert blocks.free == blocks.count


def test_of_tiles_that_were_given_up_nothing_is_kept():
    blocks = {kind: Blocks(4 * BLOCKS_OF_TILE) for kind in (GLOBAL, SLIDING)}
    prefixes, keys = PrefixCache(blocks, window=2 * TILE), keys_of(range(3 * TILE), TILE)
    for index, kind in itertools.product(range(3), blocks):
        taken = blocks[kind].take(BLOCKS_OF_TILE)
        prefixes.remember(keys, index, kind, taken)
        blocks[kind].release(taken)
    assert (len(prefixes), prefixes.longest(keys)) == (3, 3)
    for kind, held in blocks.items():
        prefixes.give_up(kind, held.count)
    assert (len(prefixes), prefixes.longest(keys)) == (0, 0)


@pytest.mark.parametrize("tiles_of_pass", [1, 2, 6])
def test_the_beginning_of_a_prompt_stays_longest(single, tiles_of_pass):
    """What stands behind a tile that is gone is of no use, so a prompt's last tiles are given up first."""
    memory, tiles = ContextMemory(cases.network(), 0.01, 2000, tiles_of_pass * TILE), 6
    prefixes, keys = memory.prefixes, keys_of(range(tiles * TILE), TILE)
    held = memory.open(keys)
    for _ in range(tiles // tiles_of_pass):
        assert memory.reserve(held, tiles_of_pass * TILE)
        memory.extend(held, tiles_of_pass * TILE)
    memory.close(held)
    for gone in range(tiles + 1):
        assert prefixes.longest(keys) == tiles - gone
        prefixes.give_up(GLOBAL, memory.blocks[GLOBAL].free + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_hidden_states_do_not_depend_on_what_else_a_pass_has(single, threads, dtype, count):
    """To the bit: a canvas alone and beside two others, of lengths with which experts get any number of rows."""
    threads(count)
    model, draw = cases.network(dtype), torch.Generator().manual_seed(0)
    with torch.no_grad():
        cache = model.encode(torch.randint(cases.IDS, (3, 40), generator=draw))
        for length in (1, 3, 7, 9, 10, 11, 16, 29, 32):
            tokens = torch.randint(cases.IDS, (3, length), generator=draw)

            def hidden(rows, tokens=tokens, length=length):
                canvases = [(row, 40) for row in rows]
                stream = model.stream(cache.sequences, canvases=canvases, lengths=[length] * len(rows))
                return model.run(tokens[rows].flatten(), stream, cache=cache).canvas_hidden.view(len(rows), length, -1)

            beside = hidden([0, 1, 2])
            for row in range(3):
                assert torch.equal(hidden([row])[0], beside[row]), length


def test_a_cancelled_request_leaves_at_once_and_changes_nothing(engine):
    asked = cases.requests(9, 2)
    heard = cases.serve(engine, asked, 2, cancelled={"1", "4", "6"})
    assert heard.finished.keys() == {request.id for request in asked}
    for request in asked:
        if heard.finished[request.id].reason is not Reason.CANCELLED:
            assert heard.tokens[request.id] == cases.alone(engine.network, request)[0]
    assert not engine.has_work and len(engine._free_slots) == ROOMY["max_running"]


def test_a_shared_beginning_is_encoded_once(engine):
    prompt = tuple(range(2, 490)) * 2
    for index in range(3):
        engine.add(Request(str(index), prompt + (index,), 8, 8, seed=index))
    first = engine.step()
    heard = cases.Heard()
    heard.take(first)
    while engine.has_work:
        heard.take(engine.step())
    engine.add(Request("later", prompt, 8, 8))
    while engine.has_work:
        heard.take(engine.step())
    assert heard.finished["later"].cached_tokens == 896
    assert heard.tokens["later"] == cases.alone(engine.network, Request("", prompt, 8, 8))[0]


def test_a_canvas_that_settles_costs_no_pass_of_its_own(engine):
    """K passes a canvas: what has settled becomes context in the pass that begins the next canvas."""
    request = Request("a", (5, 6), 24, 8, cases.requests(1, 0)[0].sampler.with_overrides({"max_denoising_steps": 3}))
    engine.add(request)
    heard = cases.Heard()
    while engine.has_work:
        heard.take(engine.step())
    assert engine.passes == sum(heard.steps["a"])


def test_drafts_show_every_step(engine):
    request = Request("a", (5, 6), 16, 8, drafts=True)
    engine.add(request)
    heard = cases.Heard()
    while engine.has_work:
        heard.take(engine.step())
    drafts = heard.drafts["a"]
    assert [draft.canvas for draft in drafts] == sorted(draft.canvas for draft in drafts)
    assert len(drafts) == sum(heard.steps["a"])
    last = [draft for draft in drafts if draft.canvas == 0][-1]
    assert last.tokens == heard.tokens["a"][:8] and len(last.entropy) == len(last.accepted) == 8


def test_a_stop_string_ends_the_answer_with_the_token_that_completes_it(engine):
    request = Request("a", (5, 6), 64, 8)
    whole, _ = cases.alone(engine.network, request)
    text = engine.decode(whole)
    engine.add(Request("b", (5, 6), 64, 8, stop=(text[10:12],)))
    heard = cases.Heard()
    while engine.has_work:
        heard.take(engine.step())
    assert heard.finished["b"].reason is Reason.STOP
    assert engine.decode(heard.tokens["b"]) == text[: text.index(text[10:12]) + 2]


def test_a_stop_string_in_a_thought_of_a_chat_ends_nothing(single):
    decode = lambda ids: "".join(chr(97 + id % 26) for id in ids)
    request = Request("a", (5, 6), 64, 8, stop=(), chat=True)
    whole = cases.alone(cases.network(), request)[0]
    place = next(index for index in range(3, 9) if whole.index(whole[index]) == index)
    stop = (decode(whole[10:14]),)
    end = decode(whole).index(stop[0]) + 4
    assert end > place + 4
    thought, call = Markers(thought=whole[place]), Markers(call=whole[place])
    for markers, length in ((Markers(), end), (thought, len(whole)), (call, len(whole))):
        engine, heard = Engine(cases.network(), EngineConfig(**ROOMY), decode, markers), cases.Heard()
        engine.add(msgspec.structs.replace(request, stop=stop))
        while engine.has_work:
            heard.take(engine.step())
        assert heard.tokens["a"] == whole[:length]


@pytest.mark.parametrize(
    "change, what",
    [
        (dict(prompt=()), "no token"),
        (dict(prompt=(500,)), "range from 500"),
        (dict(prompt=(-1, 3)), "range from -1"),
        (dict(max_tokens=0), "max_tokens=0"),
        (dict(canvas_length=33), "canvas_length=33; expected 1 to 32"),
        (dict(seed=1 << 63), "seed="),
        (dict(prompt=(1,) * 100_000), "more context memory"),
    ],
)
def test_what_can_never_be_answered_is_refused(engine, change, what):
    with pytest.raises(UserError, match=what):
        engine.add(Request(**{**dict(id="a", prompt=(1, 2), max_tokens=8, canvas_length=8), **change}))
    assert not engine.has_work


def test_memory_for_not_one_request_is_refused(single):
    with pytest.raises(UserError, match="give more"):
        Engine(cases.network(), EngineConfig(context_gb=1e-6))
