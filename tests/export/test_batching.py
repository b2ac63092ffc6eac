"""Many requests over the graphs of a bundle: each gets what it gets alone; rounding changes no token here."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from export import open_bundle
from export.bundle.building import build_bundle
from export.bundle.format import Settings
from export.engine.batching import BundleEngine
from nemo_diffgemma import ParallelLayout, SamplerConfig
from nemo_diffgemma.errors import UserError
from nemo_diffgemma.serving.constraints import choice
from nemo_diffgemma.serving.engine_config import EngineConfig
from nemo_diffgemma.serving.request import Reason, Request
from tests.export import kit
from tests.serving import cases, served

EOS = (1, 50)
CANVAS = 4


@pytest.fixture(scope="module")
def path(checkpoint, single) -> Path:
    return kit.calm(checkpoint)


@pytest.fixture(scope="module")
def engine(path):
    return kit.engine(path, loop=None)


def decode(ids: list[int]) -> str:
    return "".join(chr(40 + id) for id in ids)


def serving(engine, **given) -> BundleEngine:
    return BundleEngine(engine, EngineConfig(**{**dict(max_running=5, tokens_per_pass=40), **given}), decode)


def requests(count: int, seed: int) -> list[Request]:
    """All settings differ; prompts are up to three chunks of `encode` long, answers up to the limit of context."""
    draw, made = random.Random(seed), []
    for index in range(count):
        sampler = SamplerConfig(
            max_denoising_steps=draw.choice([1, 3, 8]),
            entropy_bound=draw.choice([0.1, 5.0, 50.0]),
            t_min=draw.choice([0.2, 0.4]),
            t_max=draw.choice([0.8, 1.3]),
            confidence_threshold=draw.choice([0.0, 1.0, 5.0]),
            stability_threshold=draw.choice([0, 1, 2]),
            eos_token_id=EOS,
            pad_token_id=0,
        )
        prompt = tuple(draw.randrange(64) for _ in range(draw.choice([1, 5, 16, 17, 40])))
        most, key = draw.choice([1, 4, 7, 20]), draw.randrange(-1000, 1000)
        made.append(Request(str(index), prompt, most, CANVAS, sampler, key, drafts=index % 4 == 0))
    return made


def alone(model, request: Request) -> tuple[list[int], int]:
    """Tokens by itself, up to what ends the answer, and the steps of all canvases."""
    result = model.generate(
        torch.tensor([request.prompt]), max_new_tokens=request.max_tokens, sampler=request.sampler, seed=[request.seed]
    )
    tokens = result.sequences[0, len(request.prompt) :].tolist()
    ends = [index for index, id in enumerate(tokens) if id in request.sampler.eos_ids]
    return tokens[: ends[0] + 1 if ends else None][: request.max_tokens], int(result.forwards[0])


@pytest.mark.parametrize("seed", [1, 2])
def test_thirty_requests_get_what_they_get_alone(engine, path, seed):
    """Arrivals and cancellations at random moments. Alone: one after the other in the bundle, and in the network."""
    asked, ours = requests(30, seed), serving(engine)
    cancelled = {"3", "11", "20"}
    heard = cases.serve(ours, asked, seed, cancelled)
    assert heard.finished.keys() == {request.id for request in asked} and not ours.has_work
    whole = 0
    for request in asked:
        finished = heard.finished[request.id]
        if finished.reason is Reason.CANCELLED:
            assert request.id in cancelled
            continue
        tokens, steps = alone(engine, request)
        assert heard.tokens[request.id] == tokens and sum(heard.steps[request.id]) == steps, request
        assert alone(kit.network(path), request) == (tokens, steps)
        assert finished.reason is (Reason.STOP if tokens[-1] in EOS else Reason.LENGTH)
        assert (finished.prompt_tokens, finished.cached_tokens) == (len(request.prompt), 0)
        whole += 1
    assert whole >= 27
    assert ours.passes < sum(map(sum, heard.steps.values()))  # steps of several share a call


def test_the_rows_of_two_ranks_get_what_they_get_alone(path):
    engine = kit.engine(path, layout=ParallelLayout(tensor=2, expert=2))
    asked = requests(8, 4)
    heard = cases.serve(serving(engine), asked, 4)
    for request in asked:
        assert (heard.tokens[request.id], sum(heard.steps[request.id])) == alone(engine, request), request


def test_a_row_of_a_call_is_what_it_is_alone(engine):
    """Contexts of other lengths, temperatures and bounds beside it change no more than the last bits."""
    ours = serving(engine)
    asked = [r for r in requests(40, 9) if r.sampler.max_denoising_steps > 1][:6]
    for request in asked[:5]:
        ours.add(request)
    seen = []
    step = engine.sampling_step

    def watched(inputs, context):
        found = step(inputs, context)
        for row, length in enumerate(context.lengths):
            alone = type(inputs)(
                canvas=inputs.canvas[row : row + 1],
                uniforms=inputs.uniforms[row : row + 1],
                replacements=inputs.replacements[row : row + 1],
                temperature=float(inputs.temperature[row]),
                entropy_bound=float(inputs.entropy_bound[row]),
                soft=inputs.soft[row : row + 1],
            )
            own = {name: buffer[row : row + 1, :, -length:] for name, buffer in context.past[0].items()}
            once = step(alone, type(context)((0,), (length,), (own,)))
            torch.testing.assert_close(once.entropy[0], found.entropy[row], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(once.soft[0], found.soft[row], rtol=1e-5, atol=1e-5)
            seen.append((length, len(context.lengths)))
        return found

    engine.sampling_step = watched
    try:
        cases.serve(ours, asked[5:], 1)
    finally:
        del engine.sampling_step
    assert len({length for length, _ in seen}) > 3 and max(rows for _, rows in seen) > 3


def test_a_stop_string_ends_the_answer_with_the_token_that_completes_it(engine):
    request = Request("a", (5, 6), 16, CANVAS, SamplerConfig(max_denoising_steps=3, entropy_bound=5.0))
    text = decode(alone(engine, request)[0])
    ours, heard = serving(engine), cases.Heard()
    ours.add(Request("b", (5, 6), 16, CANVAS, request.sampler, stop=(text[6:8],)))
    while ours.has_work:
        heard.take(ours.step())
    assert heard.finished["b"].reason is Reason.STOP
    assert decode(heard.tokens["b"]) == text[: text.index(text[6:8]) + 2]


def test_drafts_show_every_step(engine):
    ours, heard = serving(engine), cases.Heard()
    sampler = SamplerConfig(max_denoising_steps=5, entropy_bound=5.0)
    ours.add(Request("quiet", (7,), 8, CANVAS, sampler))
    ours.add(Request("a", (5, 6), 8, CANVAS, sampler, drafts=True))
    while ours.has_work:
        heard.take(ours.step())
    drafts = heard.drafts["a"]
    assert heard.drafts.keys() == {"a"} and len(drafts) == sum(heard.steps["a"])
    assert [d.canvas for d in drafts] == sorted(d.canvas for d in drafts) and drafts[0].remaining == 4
    assert [d for d in drafts if d.canvas == 0][-1].tokens == heard.tokens["a"][:CANVAS]
    assert all(any(d.accepted) and len(d.entropy) == CANVAS for d in drafts)


def test_memory_for_one_answer_makes_the_others_wait(engine):
    asked = requests(6, 5)
    longest = max(request.most_context for request in asked)
    ours = serving(engine, context_gb=2 * serving(engine)._bytes(longest) / 1e9)
    most, heard = 0, cases.Heard()
    for request in asked:
        ours.add(request)
    while ours.has_work:
        heard.take(ours.step())
        most = max(most, ours.counts[0])
    assert most < 5
    for request in asked:
        assert heard.tokens[request.id] == alone(engine, request)[0]
    with pytest.raises(UserError, match="more engine.context_gb"):
        ours.add(Request("long", (3,) * (longest + 1), 1, CANVAS))
    with pytest.raises(UserError, match="no room for one token"):
        serving(engine, context_gb=1e-9)


def test_numbers_that_are_none_end_that_request_alone(engine):
    ours, heard = serving(engine), cases.Heard()
    sampler = SamplerConfig(max_denoising_steps=3, entropy_bound=5.0)
    ours.add(Request("good", (7, 8), 8, CANVAS, sampler))
    ours.add(Request("bad", (5, 6), 8, CANVAS, sampler))
    ours.step()
    (bad,) = [row for row in ours.running if row.request.id == "bad"]
    bad.state.soft.fill_(float("nan"))
    while ours.has_work:
        heard.take(ours.step())
    assert heard.finished["bad"].reason is Reason.ERROR and "NaN" in heard.finished["bad"].error
    assert heard.tokens["good"] == alone(engine, Request("", (7, 8), 8, CANVAS, sampler))[0]


@pytest.mark.parametrize(
    "change, what",
    [
        (dict(prompt=()), "no token"),
        (dict(canvas_length=3), "canvas_length=3: the engines of this bundle have canvases of 4"),
        (dict(prompt=(1,) * 62, max_tokens=9), "context of 70 tokens, and this bundle has 64.*max_context=70"),
        (dict(locked={0: 3}), "locked: the engines of a bundle cannot"),
        (dict(language=choice(["a"])), "language: the engines of a bundle cannot"),
        (dict(adapter="poet"), "adapter: the engines of a bundle cannot"),
        (dict(logprobs=0), "logprobs: the engines of a bundle cannot"),
    ],
)
def test_what_a_bundle_cannot_do_is_refused_by_name(engine, change, what):
    ours = serving(engine)
    with pytest.raises(UserError, match=what):
        ours.add(Request(**{**dict(id="a", prompt=(1, 2), max_tokens=8, canvas_length=4), **change}))
    assert not ours.has_work


def test_the_front_end_hears_what_the_bundle_takes(engine):
    facts = serving(engine, max_running=32).facts()
    assert (facts.max_running, facts.context_tokens, facts.canvas_length) == (8, 64, CANVAS)
    assert (facts.cached_tiles, facts.layout, facts.sampler) == (0, "bundle, one rank", engine.sampler_defaults)


def test_a_bundle_is_served(traces, tmp_path):
    """launch/replica.py bundle=..., and what it refuses as a client hears it."""
    bundle = tmp_path / "bundle"
    build_bundle(traces, bundle, Settings(graphs=("encode", "step"), limits=kit.LIMITS))
    split = served.Split(bundle, 1, {"max_running": 4}, kind="bundle")
    try:
        http = split.ready(1).http
        body = {"model": "tiny", "prompt": [5, 6], "max_tokens": 10, "seed": 3, "stop": None}
        choice = http.post("/v1/completions", json=body).json()["choices"][0]
        engine = open_bundle(bundle)
        request = Request("", (5, 6), 10, CANVAS, engine.sampler_defaults, 3)
        assert choice["diffusion"]["token_ids"] == alone(engine, request)[0]
        for more, what in [({"diffusion": {"canvas_length": 3}}, "canvases of 4"), ({"logprobs": 1}, "logprobs: ")]:
            refused = http.post("/v1/completions", json=body | more)
            assert refused.status_code == 400 and what in refused.json()["error"]["message"]
    finally:
        split.close()
