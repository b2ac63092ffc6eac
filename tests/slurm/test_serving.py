"""`slurm/serve.sbatch` on a real Slurm: the front end on one node, two replicas on two others, one of them killed."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from nemo_diffgemma.serving.request import Request
from tests.serving import cases, served
from tests.slurm.cluster import wait_for
from tests.slurm.conftest import ENDED, ROOT, SECONDS

ENGINE = ("engine.context_gb=0.02", "engine.typical_tokens=700", "engine.max_running=2")
SLOW = {"max_denoising_steps": 12, "confidence_threshold": 0.0, "canvas_length": 16}


class Served:
    """A server as a job."""

    def __init__(self, cluster: Any, folder: Path, *arguments: str) -> None:
        self.cluster, self.folder = cluster, folder
        cluster.environment |= {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
        options = ["--parsable", "--partition=debug", "--time=10", "--nodes=3", f"--output={folder}/serve.out"]
        self.number = cluster.call("sbatch", *options, f"--chdir={ROOT}", ROOT / "slurm/serve.sbatch", *arguments)

    def out(self) -> str:
        file = self.folder / "serve.out"
        return file.read_text(errors="replace") if file.exists() else ""

    def state(self) -> str:
        return self.cluster.job(self.number)["JobState"]

    def wait_for(self, claim: Any, what: str) -> None:
        def known() -> str:
            known = self.cluster.job(self.number)
            return f"waited for {what} of {known}\n\n{self.out()[-6000:]}\n\n{self.cluster.log()}"

        wait_for(claim, known, SECONDS)

    def url(self) -> str:
        """Of the front end, once it is ready."""
        lines: list[str] = []

        def is_ready() -> bool:
            assert self.state() not in ENDED, self.out()
            lines[:] = [line for line in self.out().splitlines() if line.startswith('{"url"')]
            return bool(lines)

        self.wait_for(is_ready, "the url")
        return json.loads(lines[0])["url"]

    def processes(self, of: bytes = b"") -> dict[int, str]:
        """Processes of this job whose command line has `of`, and the node of each."""
        configuration = self.cluster.environment["SLURM_CONF"]
        found = {}
        for node in ("n1", "n2", "n3"):
            given = {"SLURM_CONF": configuration, "SLURM_JOB_ID": self.number, "SLURMD_NODENAME": node}
            for pid in self.cluster.processes(**given):
                try:
                    if of in Path(f"/proc/{pid}/cmdline").read_bytes():
                        found[pid] = node
                except OSError:
                    continue  # it has ended
        return found

    def replicas(self) -> dict[int, str]:
        return {
            pid: node
            for pid, node in self.processes(b"launch/replica.py").items()
            if b"srun" not in Path(f"/proc/{pid}/cmdline").read_bytes()
        }


@pytest.fixture(scope="module")
def network(single):
    return cases.network()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, network) -> Path:
    return served.write_checkpoint(tmp_path_factory.mktemp("slurm") / "model")


def test_two_replicas_on_two_nodes_answer_one_is_killed_and_scancel_drains(cluster, checkpoint, network, tmp_path):
    server = Served(cluster, tmp_path, f"checkpoint={checkpoint}", *ENGINE, "--", "name=tiny", "port=0")
    url = server.url()
    with (
        httpx.Client(base_url=url, timeout=SECONDS) as http,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=SECONDS) as client,
    ):
        check_kill_and_scancel(server, http, client, network)
    server.wait_for(lambda: server.state() in ENDED, "the end")
    server.wait_for(lambda: not server.processes(), "the end of every process")
    assert server.state() == "CANCELLED" and "ended with code 0" in server.out(), server.out()


def check_kill_and_scancel(server: Served, http: httpx.Client, client: openai.OpenAI, network: Any) -> None:
    begun = [threading.Semaphore(0) for _ in range(6)]  # work that is asked for by its figure can be over by then

    def ask(seed: int, begun: threading.Semaphore) -> list[int]:
        given = dict(model="tiny", prompt=[9, 9], seed=seed, max_tokens=480, extra_body={"diffusion": SLOW})
        return served.streamed(client, begun, **given)

    def figure(name: str) -> float:
        lines = http.get("/metrics").text.splitlines()
        return next((float(line.split()[-1]) for line in lines if line.startswith(f"diffgemma_{name} ")), 0.0)

    sampler = network.sampler_defaults.with_overrides({**SLOW, "canvas_length": None})
    expected = [cases.alone(network, Request("", (9, 9), 480, 16, sampler, seed))[0] for seed in range(4)]
    server.wait_for(lambda: figure("replicas") == 2, "both replicas")
    front, replicas = server.processes(b"serving.front"), server.replicas()
    assert len({*front.values(), *replicas.values()}) == 3, (front, replicas)
    said = dict(model="tiny", messages=[{"role": "user", "content": "Why?"}], max_tokens=8)
    assert http.post("/v1/chat/completions", json=said).json()["choices"][0]["message"]["role"] == "assistant"

    with ThreadPoolExecutor(4) as threads:
        answers = [threads.submit(ask, seed, begun[seed]) for seed in range(4)]
        assert all(one.acquire(timeout=SECONDS) for one in begun[:4]), server.out()
        killed = min(replicas)
        os.kill(killed, signal.SIGKILL)
        assert [answer.result() for answer in answers] == expected
        assert figure("requests_replayed_total") > 0
        server.wait_for(lambda: figure("replicas") == 2, "the replica that was killed")
        assert killed not in server.replicas() and sorted(server.replicas().values()) == sorted(replicas.values())

        answers = [threads.submit(ask, seed, begun[4 + seed]) for seed in range(2)]
        assert all(one.acquire(timeout=SECONDS) for one in begun[4:]), server.out()
        server.cluster.call("scancel", server.number)
        assert [answer.result() for answer in answers] == expected[:2]


@pytest.mark.slow
def test_what_replicas_refuse_ends_the_job(cluster, tmp_path):
    server = Served(cluster, tmp_path, "checkpoint=/nowhere", "--", "port=0")
    server.wait_for(lambda: server.state() in ENDED, "the end")
    assert server.state() == "FAILED" and cluster.job(server.number)["ExitCode"] == "2:0"
    assert "refused what it was given" in server.out() and "/nowhere" in server.out()
