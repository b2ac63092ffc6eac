"""Clients that nobody here wrote, each in an environment of its own, against launch/serve.py.

pip makes the environments once, below $NEMO_DIFFGEMMA_CLIENTS or the temporary directory; where it cannot, its test is
skipped. What these runs print is recorded in docs/serve_clients.md.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.serving import served

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]
TASK = """\
task: capitals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "Q: What is the capital of {{{{country}}}}? A:"
doc_to_target: "{{{{capital}}}}"
generation_kwargs: {{until: ["\\n", "Q:"], max_gen_toks: 24, temperature: 0, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
CAPITALS = {"France": "Paris", "Italy": "Rome", "Peru": "Lima", "Japan": "Tokyo", "Kenya": "Nairobi", "Norway": "Oslo"}
LITELLM = """\
import asyncio, json, sys
import litellm

litellm.suppress_debug_info = True
url, messages = sys.argv[1], [{"role": "user", "content": "Hello"}]
given = dict(api_base=url + "/v1", api_key="none", max_tokens=24, seed=7)
chat = dict(model="openai/model", messages=messages, **given)
found = {"chat": litellm.completion(temperature=0.2, **chat).choices[0].message.content}
chunks = list(litellm.completion(stream=True, stream_options={"include_usage": True}, **chat))
built = litellm.stream_chunk_builder(chunks, messages=messages)
found["stream"], found["usage"] = built.choices[0].message.content, built.usage.completion_tokens
found["async"] = asyncio.run(litellm.acompletion(**chat)).choices[0].message.content
found["text"] = litellm.text_completion(model="text-completion-openai/model", prompt="ab", **given).choices[0].text
for name, change in [("unknown", {"model": "openai/nobody"}), ("wrong", {"max_tokens": 10**9})]:
    try:
        litellm.completion(**{**chat, **change})
    except Exception as error:
        found[name] = type(error).__name__
print(json.dumps(found))
"""


def environment(requirement: str) -> Path:
    """`bin` of an environment that has a package in its pinned version."""
    below = Path(os.environ.get("NEMO_DIFFGEMMA_CLIENTS", Path(tempfile.gettempdir()) / "nemo_diffgemma_clients"))
    folder = below / requirement
    if not (folder / "complete").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        made = subprocess.run([folder / "bin/pip", "install", "-q", requirement], capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"{requirement} cannot be installed here: {made.stderr[-500:]}")
        (folder / "complete").touch()
    return folder / "bin"


def run(command: list[Any], folder: Path, timeout: float = 900, **variables: str) -> str:
    """Standard output of a client, which sees nothing of this repository."""
    hidden = {"PYTHONPATH", "CUDA_VISIBLE_DEVICES"}
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"NO_COLOR": "1", "HOME": str(folder), **variables}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout)
    print(done.stdout[-6000:])
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def server(tmp_path_factory, single):
    checkpoint = served.write_checkpoint(tmp_path_factory.mktemp("clients") / "model")
    arguments = ("engine.context_gb=0.05", "engine.typical_tokens=700", "default_max_tokens=32")
    made = served.launched(checkpoint, *arguments).wait()
    made.checkpoint = checkpoint
    yield made
    made.close()


def chat(server: served.Server, content: str, **given: Any) -> str:
    """What the server says to a message."""
    body = {"model": "model", "messages": [{"role": "user", "content": content}], "max_tokens": 24, **given}
    return server.http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]


def test_lm_eval(server, tmp_path):
    """A generative task: answers are those that the server gives by itself for its seed."""
    data = tmp_path / "capitals.jsonl"
    data.write_text("".join(json.dumps({"country": a, "capital": b}) + "\n" for a, b in CAPITALS.items()))
    (tmp_path / "capitals.yaml").write_text(TASK.format(data=data))
    arguments = f"model=model,base_url={server.url}/v1/chat/completions,num_concurrent=3,max_retries=1"
    command = [environment("lm_eval[api]==0.4.13") / "lm_eval", "run", "--model", "local-chat-completions"]
    command += ["--model_args", arguments, "--tasks", "capitals", "--include_path", tmp_path, "--apply_chat_template"]
    said = run(
        [*command, "--output_path", tmp_path / "out", "--log_samples"],
        tmp_path,
        HF_HUB_OFFLINE="1",
        HF_DATASETS_OFFLINE="1",
    )
    assert "exact_match" in said
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    found = [json.loads(line) for line in samples.read_text().splitlines()]
    assert {one["doc"]["country"] for one in found} == CAPITALS.keys()
    for one in found:
        question = f"Q: What is the capital of {one['doc']['country']}? A:"
        assert one["resps"] == [[chat(server, question, seed=1234, stop=["\n", "Q:"])]]


def test_litellm(server, tmp_path):
    said = run([environment("litellm==1.110.2") / "python", "-c", LITELLM, server.url], tmp_path)
    found = json.loads(said.splitlines()[-1])
    expected = chat(server, "Hello", seed=7)
    assert found["chat"] == found["stream"] == found["async"] == expected and found["usage"] == 24
    text = server.http.post("/v1/completions", json={"model": "model", "prompt": "ab", "max_tokens": 24, "seed": 7})
    assert found["text"] == text.json()["choices"][0]["text"]
    assert (found["unknown"], found["wrong"]) == ("NotFoundError", "BadRequestError")


@pytest.mark.parametrize("kind", ["chat", "completions"])
def test_aiperf(server, tmp_path, kind):
    """A load run: every request is answered, and as many tokens are counted there as here."""
    tokens = server.metric("generated_tokens_total")
    command = [environment("aiperf==0.13.0") / "aiperf", "profile", "--model", "model", "--url", server.url]
    command += ["--endpoint-type", kind, "--streaming", "--tokenizer", server.checkpoint, "--artifact-dir", "out"]
    command += ["--concurrency", "4", "--request-count", "24", "--isl", "60", "--osl", "24", "--random-seed", "1"]
    command += ["--ui", "none", "--no-gpu-telemetry", "--use-server-token-count"]
    # an answer of no text, which a random network gives now and then, is an error there
    command += ["--extra-inputs", json.dumps({"diffusion": {"regex": "[a-z ]{2,}"}})]
    run(command, tmp_path)
    (result,) = (tmp_path / "out").rglob("profile_export_aiperf.json")
    figures = json.loads(result.read_text())
    assert figures["request_count"]["avg"] == 24 and not figures.get("error_summary")
    counted = figures["total_output_tokens"]["avg"]
    assert 0 < counted <= server.metric("generated_tokens_total") - tokens


HOOKS = """\
import schemathesis


@schemathesis.hook
def map_body(context, body):
    if isinstance(body, dict) and isinstance(body.get("model"), str):
        body["model"] = "model"  # or nearly all would get 404
    return body
"""


def test_schemathesis(server, tmp_path):
    """Requests made of the OpenAPI schema, right and wrong ones: no 500, and every answer is as the schema has it.

    Not every body that is right by the schema can be answered: prompts have a limit, and settings depend on another.
    """
    (tmp_path / "hooks.py").write_text(HOOKS)
    command = [environment("schemathesis==4.32.5") / "st", "run", f"{server.url}/openapi.json", "--seed", "1"]
    command += ["--max-examples", "50", "--request-timeout", "120", "--checks", "all"]
    command += ["--exclude-checks", "positive_data_acceptance", "--continue-on-failure"]
    said = run(command, tmp_path, timeout=2500, SCHEMATHESIS_HOOKS="hooks")
    counted = re.search(r"(\d+) generated, (\d+) passed", said)
    assert counted and counted[1] == counted[2]
    log = server.log.read_text()
    assert "a defect" not in log and "Traceback" not in log
