"""The pages "Serve" and "API extensions" are right: their lines are run against a small model, as they stand there."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore

from nemo_diffgemma.cli.configuration import register
from nemo_diffgemma.repository import CONF, ROOT
from nemo_diffgemma.schema import validate
from nemo_diffgemma.serving.api.fields import Diffusion
from nemo_diffgemma.serving.metrics import Metrics
from tests import commands
from tests.serving import served

SERVE, EXTENSIONS = ROOT / "docs/serve.md", ROOT / "docs/api_extensions.md"
URL = "http://localhost:8000"  # of the pages
# For a network of 100,000 weights on the CPU
SMALLER = ("port=0", "dtype=float32", "engine.context_gb=0.02", "engine.typical_tokens=700", "engine.max_running=4")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def typed(page: Path) -> list[str]:
    """Every command of a page, in its order; one may have several lines."""
    found: list[str] = []
    for block in blocks(page, "bash"):
        pending = ""
        for line in block.splitlines(keepends=True):
            pending += line
            if not pending.endswith("\\\n") and pending.count("'") % 2 == 0:
                found.append(pending.strip())
                pending = ""
        assert not pending, f"an unfinished command in {page.name}: {pending}"
    return found


def of_program(page: Path, program: str) -> list[str]:
    return [line for line in typed(page) if line.split()[0] == program]


CURLS = [line for page in (SERVE, EXTENSIONS) for line in of_program(page, "curl")]
PYTHONS = [block for page in (SERVE, EXTENSIONS) for block in blocks(page, "python")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, single) -> Path:
    return served.write_checkpoint(tmp_path_factory.mktemp("page") / "CKPT")


@pytest.fixture(scope="module")
def server(checkpoint) -> Iterator[served.Server]:
    """The first command of the page, with smaller numbers."""
    program, script, *arguments = shlex.split(typed(SERVE)[0])
    assert (program, script, arguments[0]) == ("python", "launch/serve.py", "checkpoint=CKPT")
    command = [sys.executable, str(ROOT / script), f"checkpoint={checkpoint}", *arguments[1:], *SMALLER]
    server = served.Server(command, checkpoint.parent)
    yield server.wait()
    server.close()


def replies(output: str) -> list[dict[str, Any]]:
    """JSON of a curl line: a reply, or the data of a stream."""
    if not output.startswith(("data: ", "event: ")):
        return [json.loads(output)]
    data = re.findall(r"^data: (.*)$", output, re.MULTILINE)
    assert data[-1] == "[DONE]"
    return [json.loads(one) for one in data[:-1]]


@pytest.mark.parametrize("line", CURLS, ids=range(len(CURLS)))
def test_curl_gets_an_answer(server, line):
    done = subprocess.run(
        ["bash", "-c", line.replace(URL, server.url)], capture_output=True, text=True, timeout=300, check=True
    )
    answered = replies(done.stdout)
    assert not [reply for reply in answered if "error" in reply], done.stdout
    if '"drafts": true' in line:
        drafts = [reply["diffusion"]["draft"] for reply in answered if not reply["choices"] and "diffusion" in reply]
        for name in re.findall(r"`(\w+)`", table(EXTENSIONS, "diffusion.draft.")):
            assert drafts and all(name in draft for draft in drafts), name
    elif "choices" in answered[0]:
        for name in ("token_ids", "steps", "canvases", "seed"):
            assert name in answered[0]["choices"][0]["diffusion"]
    else:
        assert answered[0].keys() == {"tokens", "count", "context_tokens"}


@pytest.mark.parametrize("block", PYTHONS, ids=range(len(PYTHONS)))
def test_python_runs(server, block, capsys):
    assert URL in block
    exec(compile(block.replace(URL, server.url), "page", "exec"), {"__name__": "page"})
    assert capsys.readouterr().out or "print" not in block


# -- what takes machines that are not here: its arguments are right ----------------------------------------------------


def module(script: str) -> ModuleType:
    """An entry point, without starting it."""
    specification = importlib.util.spec_from_file_location("page_" + Path(script).stem, ROOT / script)
    assert specification is not None and specification.loader is not None
    loaded = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = loaded
    specification.loader.exec_module(loaded)
    return loaded


SCHEMAS = {
    "launch/serve.py": ("ServeConfig", "serve"),
    "launch/replica.py": ("ReplicaConfig", "replica"),
    "export/build.py": ("BuildConfig", "export_build"),
}


def composed(script: str, arguments: list[str]) -> Any:
    """The configuration that these arguments make; raises what the command would say."""
    schema, name = SCHEMAS[script]
    kind, store = getattr(module(script), schema), ConfigStore.instance().repo.copy()
    try:
        register(kind, name)
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return validate(compose(name, arguments), kind)
    finally:
        ConfigStore.instance().repo = store


def calls() -> list[tuple[str, list[str]]]:
    """Every command that starts something: (script, its arguments)."""
    found = []
    for line in typed(SERVE):
        words = shlex.split(line)
        if words[0] == "curl":
            continue
        script = next(word for word in words if word.endswith((".py", ".sbatch")))
        arguments = words[words.index(script) + 1 :]
        if script != "slurm/serve.sbatch":
            found.append((script, arguments))
            continue
        of_replica, of_front = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
        found.append(("launch/replica.py", [*of_replica, "front=tcp://node0:5570"]))
        found.append(("launch/serve.py", [*of_front, "replicas=0", "address=tcp://0.0.0.0:5570"]))
    return found


def test_what_is_started_is_what_the_commands_take():
    started = calls()
    assert {script for script, _ in started} == set(SCHEMAS) and len(started) >= 9
    for script, arguments in started:
        config = composed(script, arguments)
        given = dict(argument.split("=", 1) for argument in arguments)
        for name in ("checkpoint", "bundle", "name", "replicas", "front"):
            if name in given:
                assert str(getattr(config, name)) == given[name]


@pytest.mark.slow  # a build traces two graphs
def test_a_bundle_is_built_and_served(checkpoint):
    build, serve = [shlex.split(line) for line in typed(SERVE) if "BUNDLE" in line]
    assert (build[1], serve[1]) == ("export/build.py", "launch/serve.py")
    bundle = checkpoint.parent / "BUNDLE"
    given = [word.replace("CKPT", str(checkpoint)).replace("BUNDLE", str(bundle)) for word in build[2:]]
    done = commands.run(build[1], *given, "graphs=[encode,step]")
    assert done.returncode == 0, done.stderr
    arguments = [word.replace("BUNDLE", str(bundle)) for word in serve[2:]]
    server = served.Server([sys.executable, str(ROOT / serve[1]), *arguments, "port=0"], checkpoint.parent)
    try:
        server.wait()
        body = {"model": "BUNDLE", "prompt": [5, 6], "max_tokens": 40, "seed": 3}
        first, again = (server.http.post("/v1/completions", json=body).json()["choices"][0] for _ in range(2))
        assert first["diffusion"]["token_ids"] == again["diffusion"]["token_ids"]
        refused = server.http.post("/v1/completions", json={**body, "diffusion": {"canvas_length": 8}})
        assert refused.status_code == 400 and "canvases of 32" in refused.json()["error"]["message"]
    finally:
        server.close()


# -- the tables are whole ----------------------------------------------------------------------------------------------


def table(page: Path, head: str) -> str:
    """The first columns of the tables whose first head this is."""
    lines = page.read_text().splitlines()
    begins = [
        index for index, line in enumerate(lines) if line.startswith(f"| `{head}`") or line == f"| {head} | what |"
    ]
    assert begins, f"{page.name} has no table of {head}"
    rows = []
    for begin in begins:
        for line in lines[begin + 2 :]:
            if not line.startswith("|"):
                break
            rows.append(line.split("|")[1])
    return " ".join(rows)


def test_every_setting_of_the_server_is_told():
    fields = {field.name for field in dataclasses.fields(module("launch/serve.py").ServeConfig)}
    told = set(re.findall(r"`(\w+)(?:\.[\w*]+)?`", table(SERVE, "setting"))) | {"checkpoint"}
    assert told == fields


def test_every_figure_is_told():
    names = {
        name
        for family in Metrics().registry.collect()
        for name in [family.name + ("_total" if family.type == "counter" else "")]
    }
    told = set(re.findall(r"`(\w+)(?:\{\w+\})?`", table(SERVE, "name")))
    assert {f"diffgemma_{name}" for name in told} == names


def test_every_field_of_a_request_is_told():
    assert set(re.findall(r"`(\w+)`", table(EXTENSIONS, "diffusion."))) >= set(Diffusion.model_fields)
