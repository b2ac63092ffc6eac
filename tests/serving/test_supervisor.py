"""Replicas of a node are started again, unless that is of no use: here they are lines of shell."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_diffgemma.serving import supervisor
from nemo_diffgemma.serving.settings import FrontSettings
from nemo_diffgemma.serving.supervisor import StartError, Supervisor


@pytest.fixture
def play(monkeypatch) -> Callable[..., Any]:
    """Run `scene(supervisor, task, ended)` with a replica that is a line of shell."""
    monkeypatch.setattr(supervisor, "_BACKOFF", (0.01, 0.05))
    monkeypatch.setattr(supervisor, "_TERM_SECONDS", 0.5)

    def run(line: str, scene: Callable[..., Any]) -> Any:
        async def whole() -> Any:
            ended: list[tuple[str, str]] = []
            command = [["sh", "-c", line, "replica"]]
            settings = FrontSettings(host="", port=0, names=["m"], replicas=command, environments=[{"WHICH": "7"}])
            keeper = Supervisor(settings, "ipc:///nowhere", lambda name, why: ended.append((name, why)))
            task = keeper.start()
            try:
                return await asyncio.wait_for(scene(keeper, task, ended), 20)
            finally:
                await keeper.close()
                await asyncio.gather(task, return_exceptions=True)

        return asyncio.run(whole())

    return run


async def until(fine: Callable[[], bool]) -> None:
    while not fine():
        await asyncio.sleep(0.01)


def alive(pid: int) -> bool:
    """A process that is no zombie."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("code, starts", [(2, 1), (1, 3)])
def test_a_start_that_fails_is_given_up(play, code, starts):
    """At once where the user must mend something, else after some tries."""

    async def scene(keeper, task, ended):
        with pytest.raises(StartError) as error:
            await task
        assert error.value.exit_code == code
        assert ended == [(f"replica-0.{life}", f"its process ended with code {code}") for life in range(starts)]

    play(f"exit {code}", scene)


def test_a_replica_that_has_served_is_started_again_and_again(play):
    async def scene(keeper, task, ended):
        keeper.served("replica-0.0")
        await until(lambda: len(ended) > 5)
        assert not task.done()

    play("exit 2", scene)


def test_a_replica_knows_where_to_go_and_what_is_its_own(play, tmp_path):
    async def scene(keeper, task, ended):
        await until(lambda: (tmp_path / "said").exists() and "7" in (tmp_path / "said").read_text())

    play(f"echo $1 $2 $WHICH $NEMO_DIFFGEMMA_FRONT > {tmp_path}/said; sleep 60", scene)
    assert (tmp_path / "said").read_text() == f"front=ipc:///nowhere name=replica-0.0 7 {os.getpid()}\n"


def test_ranks_that_a_replica_leaves_end_with_it(play, tmp_path):
    async def scene(keeper, task, ended):
        keeper.served("replica-0.0")
        await until(lambda: bool(ended))
        pid = int((tmp_path / "rank").read_text().split()[0])
        await until(lambda: not alive(pid))

    play(f"sleep 60 & echo $! > {tmp_path}/rank.new; mv {tmp_path}/rank.new {tmp_path}/rank; exit 1", scene)


def test_a_replica_that_is_given_up_is_killed(play, tmp_path):
    async def scene(keeper, task, ended):
        await until((tmp_path / "up").exists)
        keeper.served("replica-0.0")
        keeper.kill("nobody")
        keeper.kill("replica-0.0")
        await until(lambda: bool(ended))
        assert ended[0] == ("replica-0.0", "its process ended with code -9")

    play(f"trap '' TERM; touch {tmp_path}/up; sleep 60", scene)


def test_the_end_is_the_end_of_all(play, tmp_path):
    """Also of one that does not hear SIGTERM."""

    async def scene(keeper, task, ended):
        await until(lambda: (tmp_path / "up").exists())
        began = time.monotonic()
        await keeper.close()
        assert time.monotonic() - began < 10
        assert not alive(int((tmp_path / "up").read_text()))

    play(
        f"trap '' TERM; echo $$ > {tmp_path}/up.new; mv {tmp_path}/up.new {tmp_path}/up; while :; do sleep 1; done",
        scene,
    )
