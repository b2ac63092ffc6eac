"""Log-probabilities of settled tokens: those of the network's last step, whatever runs beside the request."""

from __future__ import annotations

import msgspec
import pytest
import torch

from nemo_diffgemma.diffusion.sampler_config import SamplerConfig
from nemo_diffgemma.errors import UserError
from nemo_diffgemma.model import vocabulary
from nemo_diffgemma.serving.engine import Engine
from nemo_diffgemma.serving.engine_config import EngineConfig
from nemo_diffgemma.serving.request import Request
from tests.serving import cases

ROOMY = dict(context_gb=0.01, typical_tokens=700, max_running=5, tokens_per_pass=600)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_scores_are_a_plain_log_softmax_of_the_last_step_of_each_canvas(single, dtype, monkeypatch):
    network = cases.network(dtype)
    engine, steps = Engine(network, EngineConfig(**ROOMY)), []
    table, statistics = network.embed_tokens, network.statistics

    def seen(hidden_NH, *given, **named):
        logits = vocabulary.logits(hidden_NH, table.weight, table.shard, network.model_config.final_logit_softcapping)
        steps.append(logits.log_softmax(-1))
        return statistics(hidden_NH, *given, **named)

    monkeypatch.setattr(network, "statistics", seen)
    for request in cases.requests(4, 11):
        steps.clear()
        asked = msgspec.structs.replace(request, logprobs=5)
        heard = cases.serve(engine, [asked], 0)
        scores, tokens = iter(heard.scores[request.id]), iter(heard.tokens[request.id])
        ends = torch.tensor(heard.steps[request.id]).cumsum(0) - 1
        for last in ends.tolist():
            best = steps[last].topk(5)
            for place in range(request.canvas_length):
                if (token := next(tokens, None)) is None:
                    break
                score = next(scores)
                assert score.logprob == pytest.approx(float(steps[last][place, token]), abs=1e-5)
                assert [value for _, value in score.top] == pytest.approx(best.values[place].tolist(), abs=1e-5)
                for id, value in score.top:
                    assert value == pytest.approx(float(steps[last][place, id]), abs=1e-5)
                assert score.top[0] == (token, score.logprob), "what nothing constrains is the most probable"
        assert next(scores, None) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_scores_are_those_of_each_request_alone_to_the_bit(single, dtype):
    engine = Engine(cases.network(dtype), EngineConfig(**ROOMY))
    asked = [
        msgspec.structs.replace(request, logprobs=[None, 0, 3, 20][index % 4])
        for index, request in enumerate(cases.requests(12, 7))
    ]
    heard = cases.serve(engine, asked, 7)
    for request in asked:
        alone = cases.serve(engine, [request], 0)
        assert alone.tokens[request.id] == heard.tokens[request.id]
        if request.logprobs is None:
            assert request.id not in heard.scores
        else:
            assert heard.scores[request.id] == alone.scores[request.id]
            assert len(heard.scores[request.id]) == len(heard.tokens[request.id])
            assert {len(score.top) for score in heard.scores[request.id]} == {request.logprobs}


def test_scores_of_a_layout_are_those_of_one_process(pool, single):
    """Of a first step, whose tokens do not hang on the last bits of a product."""
    asked = [
        Request(str(index), (4, 5, index), 16, 16, SamplerConfig(max_denoising_steps=1), seed=index, logprobs=20)
        for index in range(3)
    ]
    ours = cases.serve(Engine(cases.network(), EngineConfig(**ROOMY)), asked, 1)
    given = dict(layout=dict(tensor=2, expert=2), asked=asked, config=ROOMY)
    for theirs in pool(4).run("tests.serving.cases:scores_in_layout", **given):
        for request in asked:
            for own, other in zip(ours.scores[request.id], theirs[request.id], strict=True):
                assert other.logprob == pytest.approx(own.logprob, abs=1e-5)
                assert [v for _, v in other.top] == pytest.approx([v for _, v in own.top], abs=1e-5)
                assert {id for id, v in other.top if v > own.top[-1][1] + 1e-5} <= {id for id, _ in own.top}


@pytest.mark.parametrize("logprobs", [-1, 21])
def test_more_scores_than_there_are_to_have_are_refused(single, logprobs):
    engine = Engine(cases.network(), EngineConfig(**ROOMY))
    with pytest.raises(UserError, match=f"logprobs={logprobs}; expected 0 to 20"):
        engine.add(Request("a", (1,), 8, 8, logprobs=logprobs))
