"""launch/bench_serve.py: every request counts once, and what it counts is what the server counts."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import image

from nemo_diffgemma.errors import UserError
from nemo_diffgemma.serving.bench import report
from nemo_diffgemma.serving.bench.calls import Call, FilePrompts, RandomPrompts
from nemo_diffgemma.serving.bench.client import Record, ask
from nemo_diffgemma.serving.bench.load import Load, Target, run
from tests import commands
from tests.serving import cases, served

ENGINE = dict(context_gb=0.02, typical_tokens=700, max_running=2)
QUICK = ("sampler.max_denoising_steps=3", "canvas_length=16", "max_tokens=40")
COUNTS = (
    "generated_tokens_total",
    "denoising_steps_total",
    "canvases_total",
    "requests_refused_total",
    "prompt_tokens_cached_total",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory, single):
    cases.network()
    checkpoint = served.write_checkpoint(tmp_path_factory.mktemp("bench") / "model")
    made = served.Split(checkpoint, 1, ENGINE, queue_limit=1)
    yield made.ready(1)
    made.close()


def bench(server: served.Server, folder: Path, *arguments: str) -> tuple[dict[str, Any], dict[str, float], str, int]:
    """The JSON line, how far the server's own counters went meanwhile, all output, exit code."""
    before = {name: server.metric(name) for name in COUNTS}
    found = commands.run("launch/bench_serve.py", f"url={server.url}", f"out={folder}", *QUICK, *arguments)
    counted = {name: server.metric(name) - before[name] for name in COUNTS}
    lines = found.stdout.splitlines()
    assert lines, found.stderr
    return json.loads(lines[-1]), counted, found.stdout, found.returncode


def test_counts_are_the_servers_own(server, tmp_path):
    """Three users are as many as have room; ten are not: the server says 429, and all are answered in the end."""
    arguments = ("concurrency=[3,10]", "rates=[40]", "requests=11", "prompt_tokens=300", "shared_tokens=256")
    found, counted, shown, code = bench(server, tmp_path, *arguments)
    three, ten, open_load = found["loads"]
    assert code == 0
    assert [row["answered"] for row in found["loads"]] == [11, 11, 11]
    assert [row["errors"] for row in found["loads"]] == [{}, {}, {}]
    assert three["refused"] == 0 < ten["refused"]
    assert counted["requests_refused_total"] == ten["refused"] + open_load["refused"]
    warm = 40  # tokens of the request before the first load
    assert counted["generated_tokens_total"] - warm <= sum(row["tokens"] for row in found["loads"])
    # which requests find the beginning in the cache is a matter of time: those that come together do not
    of_others = counted["prompt_tokens_cached_total"] - sum(row["cached_tokens"] for row in found["loads"])
    assert of_others in (0, 256), "the request before the first load found it or did not"
    for row in found["loads"]:
        assert row["canvases"] >= 11 and row["cached_tokens"] >= 256
        assert row["prompt_tokens"] == 11 * 300
        assert row["K"] == pytest.approx(row["steps"] / row["canvases"], abs=1e-3)
        assert row["tokens_per_forward"] == pytest.approx(row["tokens"] / row["steps"], abs=1e-3)
        assert row["first_canvas_s"]["p50"] <= row["latency_s"]["p50"] <= row["latency_s"]["p99"] <= row["seconds"]
    assert all(load in shown for load in ("3 at a time", "10 at a time", "40 a second"))
    assert json.loads((tmp_path / "load.json").read_text()) == found
    assert np.ptp(image.imread(found["plot"])[..., :3]) > 0.5


def test_conversations_of_a_file_and_what_the_server_refuses(server, tmp_path):
    """The second line is no conversation that the template takes: a third of the requests fails, by name."""
    good = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "left out"}]}
    bad = {"messages": [{"role": "wizard", "content": "Hi"}]}
    lines = [json.dumps(row) for row in (good, bad, {"prompt": "text"})]
    (tmp_path / "chat.jsonl").write_text("\n".join(lines) + "\n")
    arguments = (f"prompts={tmp_path / 'chat.jsonl'}", "concurrency=[2]", "requests=6")
    found, counted, shown, code = bench(server, tmp_path, *arguments)
    (row,) = found["loads"]
    assert code == 0 and row["answered"] == 4 and sum(row["errors"].values()) == 2
    (error,) = row["errors"]
    assert error.startswith("400: ") and error in shown
    ratio = counted["denoising_steps_total"] / counted["canvases_total"]
    assert 1 <= row["K"] <= 3 and 1 <= ratio <= 3


def test_where_no_server_is_the_error_says_what_to_give(tmp_path):
    found = commands.run("launch/bench_serve.py", "url=http://127.0.0.1:9", f"out={tmp_path}")
    assert found.returncode == 2 and "checkpoint=..." in found.stderr and not list(tmp_path.iterdir())


# -- one request -------------------------------------------------------------------------------------------------------

CANVAS = {"choices": [{"index": 0, "diffusion": {"token_ids": [3, 4], "steps": 5, "canvas": 0}}]}
USAGE = {"choices": [], "usage": {"prompt_tokens": 7, "prompt_tokens_details": {"cached_tokens": 2}}}


def stream(*chunks: dict[str, Any] | str) -> bytes:
    lines = [chunk if isinstance(chunk, str) else f"data: {json.dumps(chunk)}" for chunk in chunks]
    return "".join(f"{line}\n\n" for line in lines).encode()


def asked(*answers: httpx.Response, time_limit: float = 60.0) -> Record:
    left = iter(answers)

    async def one() -> Record:
        transport = httpx.MockTransport(lambda request: next(left))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
            return await ask(http, Call("/v1/completions", {}), Record(time.perf_counter()), time_limit)

    return asyncio.run(one())


def test_a_stream_is_read_to_its_end_and_drafts_are_no_canvases():
    draft = "event: diffusion.draft\n" + stream({"choices": [], "diffusion": {"draft": {}}}).decode().strip()
    record = asked(httpx.Response(200, content=stream(draft, CANVAS, draft, CANVAS, USAGE, "data: [DONE]")))
    assert record.error is None
    assert (len(record.canvases), record.steps, record.tokens) == (2, 10, 4)
    assert (record.prompt_tokens, record.cached_tokens) == (7, 2)


@pytest.mark.parametrize(
    "answer, error",
    [
        (httpx.Response(200, content=stream(CANVAS)), "before [DONE]"),
        (httpx.Response(200, content=stream(CANVAS, {"error": {"message": "lost"}})), "lost"),
        (httpx.Response(200, content=b"data: {no json\n\n"), "JSONDecodeError"),
        (httpx.Response(200, content=stream({"other": 1}, "data: [DONE]")), "KeyError"),
        (httpx.Response(500, content=b"<html>"), "JSONDecodeError"),
        (httpx.Response(404, json={"error": {"message": "no such model"}}), "404: no such model"),
    ],
)
def test_what_is_no_whole_answer_is_an_error(answer, error):
    assert error in str(asked(answer).error)


def test_after_a_429_it_comes_again_as_late_as_it_is_told():
    busy = [httpx.Response(429, headers={"Retry-After": "0.3"}), httpx.Response(429, headers={"Retry-After": "0"})]
    record = asked(*busy, httpx.Response(200, content=stream(CANVAS, "data: [DONE]")))
    assert record.error is None and record.refused == 2 and record.seconds >= 0.3


def test_a_request_has_a_time_limit_whatever_the_server_says():
    assert "0.2 s" in str(asked(httpx.Response(429, headers={"Retry-After": "60"}), time_limit=0.2).error)


# -- many --------------------------------------------------------------------------------------------------------------


def test_an_open_load_waits_for_nobody_and_a_closed_one_for_all(monkeypatch):
    """No answer before all eight have asked: users who wait would wait for ever. Then never more than three ask."""
    asking, most = [], 0

    async def held(http: Any, call: Call, record: Record, time_limit: float) -> Record:
        nonlocal most
        asking.append(call)
        most = max(most, len(asking))
        if hold:
            while len(asking) < 8:
                await asyncio.sleep(0.01)
        else:
            await asyncio.sleep(0.01)
            asking.remove(call)
        record.ended = time.perf_counter()
        return record

    monkeypatch.setattr("nemo_diffgemma.serving.bench.load.ask", held)
    target, prompts = Target("http://x", {"model": "m"}, {}, 60.0), RandomPrompts(4, 2, 50, seed=1)

    def measured(load: Load) -> list[Record]:
        return asyncio.run(asyncio.wait_for(run(target, load, prompts, 0, lambda: None), 60))

    hold = True
    assert len(measured(Load(8, rate=200.0))) == 8
    bodies = [call.body for call in asking]
    assert [body["seed"] for body in bodies] == list(range(8))
    assert len({tuple(body["prompt"][2:]) for body in bodies}) == 8 and all(b["prompt"][:2] == [8, 36] for b in bodies)
    hold, most = False, 0
    asking.clear()
    assert len(measured(Load(8, concurrency=3))) == 8 and most == 3


@given(
    st.lists(
        st.tuples(
            st.floats(0, 5),
            st.lists(st.floats(0.01, 3), max_size=4),
            st.integers(1, 9),
            st.sampled_from([None, "a", "b"]),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_figures_add_up(drawn):
    """Every request is answered or has an error; sums are of those that are answered."""
    records = []
    for began, waits, steps, error in drawn:
        times = list(began + np.cumsum(waits)) if waits else []
        end = (times or [began])[-1] + 0.1
        records.append(Record(began, times, steps * len(times), 10 * len(times), 5, 1, end, 0, error))
    row = report.figures(Load(len(records), concurrency=2), records)
    fine = [record for record in records if record.error is None]
    assert row["answered"] + sum(row["errors"].values()) == row["requests"] == len(records)
    assert row["tokens"] == 10 * row["canvases"] == 10 * sum(len(record.canvases) for record in fine)
    assert (row["K"] is None) == (row["canvases"] == 0)
    assert (row["latency_s"] is None) == (not fine)
    report.show([row], [Load(1, concurrency=2)], None)


def test_prompts_of_files(tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("one\n\nGrüße\n", encoding="utf-8")
    calls = iter(FilePrompts.of(str(file)))
    assert [next(calls).body["prompt"] for _ in range(3)] == ["one", "Grüße", "one"]
    for line in ('{"messages": []}', '{"text": 1}', '{"messages": "x"}', "[]", "[1, true]", "{", '{"prompt": ""}'):
        (tmp_path / "bad.jsonl").write_text('"fine"\n' + line + "\n")
        with pytest.raises(UserError, match="bad.jsonl:2"):
            FilePrompts.of(str(tmp_path / "bad.jsonl"))
    for content, what in ((b"", "no prompt"), (b"\xff", "cannot be read")):
        file.write_bytes(content)
        with pytest.raises(UserError, match=what):
            FilePrompts.of(str(file))


def test_the_client_needs_no_torch():
    modules = "nemo_diffgemma.serving.bench.load, nemo_diffgemma.serving.bench.report, nemo_diffgemma.serving.started"
    code = f"import {modules}, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_a_checkpoint_is_served_for_the_measurement(tmp_path, single):
    cases.network()
    checkpoint = served.write_checkpoint(tmp_path / "model")
    engine = [f"engine.{name}={value}" for name, value in ENGINE.items()]
    arguments = (f"checkpoint={checkpoint}", f"out={tmp_path}", "concurrency=[2]", "requests=3", *QUICK, *engine)
    found = commands.run("launch/bench_serve.py", *arguments)
    row = json.loads(found.stdout.splitlines()[-1])["loads"][0]
    assert found.returncode == 0 and row["answered"] == 3
    assert commands.run("launch/bench_serve.py", f"checkpoint={tmp_path}/none", f"out={tmp_path}").returncode == 2
