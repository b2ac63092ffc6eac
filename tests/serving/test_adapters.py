"""Adapters by name: several in one batch, and each request gets what the network with its adapter alone would give."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch

from nemo_diffgemma.checkpoint.tensor_files import CheckpointError
from nemo_diffgemma.errors import ConfigurationError, UserError
from nemo_diffgemma.lora import opening
from nemo_diffgemma.serving.engine import Engine
from nemo_diffgemma.serving.engine_config import EngineConfig
from nemo_diffgemma.serving.request import Request
from tests import commands
from tests.serving import adapted, cases, served

ROOMY = dict(context_gb=0.01, typical_tokens=700, max_running=6, tokens_per_pass=900)
QUICK = {"max_denoising_steps": 2}


@pytest.fixture(scope="module")
def paths(single, tmp_path_factory) -> dict[str, str]:
    return adapted.write(cases.network(), tmp_path_factory.mktemp("adapters"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_tokens_are_those_of_the_network_with_one_adapter(single, paths, dtype):
    """To the bit, beside requests with other adapters and with none."""
    assert adapted.differences({}, dtype, paths, 12, 3, ROOMY) == []


def test_tokens_are_those_of_the_network_with_one_adapter_in_a_layout(pool, paths):
    given = dict(layout=dict(tensor=2, expert=2), dtype=torch.float32, paths=paths, count=6, seed=5, config=ROOMY)
    assert pool(4).run("tests.serving.adapted:differences", **given) == [[]] * 4


def test_adapters_change_answers_and_prompts_are_not_shared_between_them(single, paths):
    network = cases.network()
    opening.load_beside(network, paths)
    engine, answers = Engine(network, EngineConfig(**ROOMY)), {}
    prompt = tuple(range(2, 490)) * 2
    for turn in range(2):
        for name in (None, *paths):
            heard = cases.serve(engine, [Request(f"{name}{turn}", prompt, 8, 8, adapter=name)], 0)
            answer, cached = heard.tokens[f"{name}{turn}"], heard.finished[f"{name}{turn}"].cached_tokens
            assert cached == (896 if turn else 0)
            assert answers.setdefault(name, answer) == answer
    assert len({tuple(answer) for answer in answers.values()}) == 4
    assert answers[None] == cases.alone(cases.network(), Request("", prompt, 8, 8))[0]


def test_passes_without_adapters_compute_nothing_for_them(single, paths, monkeypatch):
    network = cases.network()
    opening.load_beside(network, paths)
    engine = Engine(network, EngineConfig(**ROOMY))
    calls, adapter_pass = [], network._adapter_pass

    def seen(*given):
        calls.append(adapter_pass(*given))
        return calls[-1]

    monkeypatch.setattr(network, "_adapter_pass", seen)
    cases.serve(engine, [Request("a", (1, 2), 8, 8)], 0)
    assert calls and set(calls) == {None}
    calls.clear()
    cases.serve(engine, [Request("b", (1, 2), 8, 8, adapter="thin")], 0)
    assert calls and all(list(call.chosen) == [network.beside["thin"]] for call in calls)


def test_unknown_adapters_are_refused(single, paths):
    network = cases.network()
    opening.load_beside(network, paths)
    engine = Engine(network, EngineConfig(**ROOMY))
    with pytest.raises(UserError, match="no adapter 'other'; those that it has: everything, v1.2/shared, thin"):
        engine.add(Request("a", (1, 2), 8, 8, adapter="other"))
    with pytest.raises(UserError, match="no adapter 'other'; those that it has: none"):
        Engine(cases.network(), EngineConfig(**ROOMY)).add(Request("a", (1, 2), 8, 8, adapter="other"))


def test_the_name_of_an_adapter_is_that_of_a_model(single, paths, tmp_path):
    """As a user starts it: adapters=... of launch/serve.py, the openai package."""
    checkpoint = served.write_checkpoint(tmp_path / "model")
    given = ", ".join(f"{name}: {path}" for name, path in paths.items())
    server = served.launched(checkpoint, "engine.context_gb=0.02", "engine.typical_tokens=700", f"adapters={{{given}}}")
    networks = {"model": cases.network(), **{name: adapted.with_one(torch.float32, paths[name]) for name in paths}}
    try:
        client = server.wait().openai()
        assert [model.id for model in client.models.list()] == ["model", "default", *paths]
        assert client.models.retrieve("v1.2/shared").parent == "model"
        prompt, sampler = tuple(range(20, 320)), cases.network().sampler_defaults

        def ask(name: str) -> list[int]:
            settings = {"diffusion": {**QUICK, "canvas_length": 8}}
            asked = dict(model=name, prompt=list(prompt), max_tokens=8, seed=3, extra_body=settings)
            return client.completions.create(**asked).choices[0].diffusion["token_ids"]

        with ThreadPoolExecutor(4) as threads:
            answers = dict(zip(networks, threads.map(ask, networks), strict=True))
        request = Request("", prompt, 8, 8, sampler.with_overrides(QUICK), 3)
        assert answers == {name: cases.alone(network, request)[0] for name, network in networks.items()}
        with pytest.raises(openai.NotFoundError, match="no model 'other'; this server has 'model', 'default', "):
            ask("other")
    finally:
        server.close()


@pytest.mark.parametrize(
    "change, what",
    [
        (["adapters={model: a}"], "the model itself has that name"),
        (["adapters={default: a}"], "the model itself has that name"),
        (["adapters={a$: b}"], "expected a letter"),
        (["adapters={a: b}", "replicas=0", "address=tcp://127.0.0.1:1", "name=model"], "launch/replica.py instead"),
    ],
)
def test_adapters_that_could_not_be_asked_for_are_refused(change, what):
    done = commands.run("launch/serve.py", "checkpoint=some/model", *change)
    assert done.returncode == 2 and what in done.stderr


def test_what_is_no_adapter_of_the_network_is_refused(single, paths, tmp_path):
    network = cases.network()
    with pytest.raises(CheckpointError, match="is no adapter; give a directory with adapter_config.json"):
        opening.load_beside(network, {"a": str(tmp_path)})
    own = adapted.with_one(torch.float32, paths["thin"])
    with pytest.raises(ConfigurationError, match="the checkpoint is an adapter itself"):
        opening.load_beside(own, {"a": paths["thin"]})
