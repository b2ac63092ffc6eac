"""`launch/serve.py` as a user starts it: from the first line to the end by SIGTERM."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nemo_diffgemma.serving.request import Request
from tests import commands
from tests.serving import cases, served

ENGINE = ("engine.context_gb=0.02", "engine.typical_tokens=700", "engine.max_running=4")
SLOW = {"diffusion": {"max_denoising_steps": 6, "confidence_threshold": 0.0, "canvas_length": 16}}


@pytest.fixture(scope="module")
def network(single):
    return cases.network()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, network) -> Path:
    return served.write_checkpoint(tmp_path_factory.mktemp("launched") / "model")


def test_the_replica_is_started_again_and_a_signal_drains(checkpoint, network):
    """kill -9 of the only replica under load: its requests wait for the next one, and get what they would have got."""
    sampler = network.sampler_defaults.with_overrides({"max_denoising_steps": 6, "confidence_threshold": 0.0})
    server = served.launched(checkpoint, *ENGINE).wait()
    try:
        assert server.facts == {"url": server.url, "model": "model", "replicas": 1}
        client = server.openai()
        begun = threading.Semaphore(0)

        def ask(seed: int) -> list[int]:
            given = dict(model="model", prompt=[9, 9], seed=seed, max_tokens=480, extra_body=SLOW)
            return served.streamed(client, begun, **given)

        def expected(seed: int) -> list[int]:
            return cases.alone(network, Request("", (9, 9), 480, 16, sampler, seed))[0]

        with ThreadPoolExecutor(4) as threads:
            answers = [threads.submit(ask, seed) for seed in range(4)]
            begun.acquire(timeout=300)
            (pid,) = server.children()
            os.kill(pid, signal.SIGKILL)
            assert [answer.result() for answer in answers] == [expected(seed) for seed in range(4)]
            assert server.metric("requests_replayed_total") > 0

            while begun.acquire(blocking=False):
                pass
            answers = [threads.submit(ask, seed) for seed in range(2)]
            for _ in answers:
                begun.acquire(timeout=300)
            (pid,) = server.children()
            assert server.stop() == 0
            assert [answer.result() for answer in answers] == [expected(seed) for seed in range(2)]
        assert not Path(f"/proc/{pid}").exists()
    finally:
        server.close()


@pytest.mark.slow  # one more start; that the kernel ends children is known from other commands
def test_replicas_end_with_a_front_end_that_is_killed(checkpoint):
    server = served.launched(checkpoint, *ENGINE).wait()
    try:
        (pid,) = server.children()
        server.process.kill()
        server.process.wait()
        for _ in range(100):
            if not Path(f"/proc/{pid}/fd").exists() or not list(Path(f"/proc/{pid}/fd").iterdir()):
                return
            time.sleep(0.05)
        raise AssertionError("the replica lives on")
    finally:
        server.close()


@pytest.mark.parametrize(
    "arguments, what",
    [
        ([], "give checkpoint="),
        (["checkpoint=a", "bundle=b"], "checkpoint=a bundle=b; give one of them"),
        (["checkpoint=a", "provider=tensorrt"], "provider=tensorrt runs a bundle"),
        (["bundle=b", "dtype=bfloat16"], "dtype=bfloat16: a bundle has the one"),
        (["replicas=0"], "replicas=0: give address="),
        (["checkpoint=a", "parallel.replicas=2"], "a server has replicas="),
        (["checkpoint=a", "port=70000"], "port=70000; expected"),
        (["checkpoint=a", "api_keys_file=/dev/null"], "holds no key"),
        (["checkpoint=a", "engine.max_running=0"], "numbers above 0"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_starts(arguments, what):
    done = commands.run("launch/serve.py", *arguments)
    assert done.returncode == 2 and what in " ".join(done.stderr.split()), done.stderr


def test_a_checkpoint_that_is_none_ends_the_server(tmp_path):
    """The replica says what is wrong; to start it again would give the same."""
    server = served.launched(tmp_path / "nothing")
    output, _ = server.process.communicate(timeout=240)
    said = " ".join(server.log.read_text().split())
    assert (server.process.returncode, output) == (2, ""), said
    assert str(tmp_path / "nothing") in said and "no replica could be started" in said
