"""A replica in this process, and a front end that is a thread with a socket."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zmq

from nemo_diffgemma.diffusion.sampler_config import SamplerConfig
from nemo_diffgemma.errors import UserError
from nemo_diffgemma.serving import messages
from nemo_diffgemma.serving.engine_config import EngineConfig
from nemo_diffgemma.serving.messages import Accepted, Beat, Cancel, Drain, Events, Farewell, Hello, Refused, Unknown
from nemo_diffgemma.serving.replica import Replica
from nemo_diffgemma.serving.request import Finished, Reason, Request, Settled
from tests.serving import cases

CONFIG = EngineConfig(context_gb=0.01, typical_tokens=700, max_running=2)
SAMPLER = SamplerConfig(max_denoising_steps=4, confidence_threshold=0.0)


class Front:
    """What a scene says to the replica, and hears of it."""

    def __init__(self, address: str) -> None:
        self.socket = zmq.Context.instance().socket(zmq.ROUTER)
        self.socket.linger = 0
        self.socket.rcvtimeo = 20_000
        self.socket.bind(address)
        self.identity = b""

    def hear(self, kind: type | None = None) -> Any:
        """The next message, of a kind; of events one at a time."""
        while True:
            self.identity, content = self.socket.recv_multipart()
            message = messages.of_replica(content)
            if not isinstance(message, Beat) and (kind is None or isinstance(message, kind)):
                return message

    def say(self, *said: Any) -> None:
        for message in said:
            self.socket.send_multipart([self.identity, messages.encode(message)])

    def events(self) -> Iterator[Any]:
        while True:
            yield from self.hear(Events).events


@pytest.fixture
def play(single, tmp_path) -> Callable[..., Replica]:
    """Serve in this thread, where signals arrive, while a scene plays in another."""

    def run(
        scene: Callable[[Front], None] | None,
        spoil: Callable[[Replica], None] | None = None,
        tokenizer: Any = None,
    ) -> Replica:
        address, failed = f"ipc://{tmp_path}/{uuid.uuid4().hex[:8]}", []
        front = Front(address)

        def whole() -> None:
            try:
                front.hear(Hello)
                front.say(messages.Welcome(False))
                if scene is not None:
                    scene(front)
            except BaseException as error:
                failed.append(error)
                front.say(Unknown(), Drain())

        network = cases.network()
        if tokenizer is not None:
            network.assets = tmp_path / "assets"
            tokenizer.save_pretrained(network.assets)
        replica = Replica(network, CONFIG, address, "a", lonely_seconds=1.5 if scene is None else 60.0)
        if spoil is not None:
            spoil(replica)
        thread = threading.Thread(target=whole)
        thread.start()
        try:
            replica.serve()
        finally:
            thread.join()
            front.socket.close()
        if failed:
            raise failed[0]
        assert not replica.engine.has_work
        return replica

    return run


def request(seed: int = 0, **given: Any) -> Request:
    return Request(**{**dict(id=f"r{seed}", prompt=(3, 4), max_tokens=96, canvas_length=32, sampler=SAMPLER,
                             seed=seed), **given})  # fmt: skip


def test_what_can_never_be_answered_ends_that_request_alone(play):
    def scene(front):
        front.say(request(1, prompt=()), request(2), request(3, prompt=(500,)))
        said, ended = {}, set()
        for event in front.events():
            if isinstance(event, Refused | Accepted):
                said[event.id] = event
            if isinstance(event, Finished):
                ended.add(event.id)
            if len(said) == 3 and ended:
                break
        assert isinstance(said["r1"], Refused) and "no token" in said["r1"].why
        assert isinstance(said["r3"], Refused) and "range from 500" in said["r3"].why
        assert ended == {"r2"}
        front.say(Drain())

    play(scene)


def test_a_signal_drains(play):
    def scene(front):
        front.say(request(1))
        events = front.events()
        assert isinstance(next(events), Accepted)
        os.kill(os.getpid(), signal.SIGTERM)
        tokens, farewells = [], []
        while len(farewells) < 2:
            message = front.hear()
            if isinstance(message, Farewell):
                farewells.append(message)
                if message.draining:
                    front.say(request(2))
            elif isinstance(message, Events):
                for event in message.events:
                    tokens += event.tokens if isinstance(event, Settled) else []
                    assert event.id == "r1" or isinstance(event, Refused)
        assert [one.draining for one in farewells] == [True, False]
        assert tokens == expected

    expected = cases.alone(cases.network(), request(1))[0]
    before = signal.getsignal(signal.SIGTERM)
    play(scene)
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_error_of_the_network_ends_the_replica_and_is_told(play):
    def spoil(replica):
        steps, whole = iter(range(2)), replica.engine.step

        def step() -> Any:
            if next(steps, None) is None:
                raise RuntimeError("the device is lost")
            return whole()

        replica.engine.step = step

    def scene(front):
        front.say(request(1))
        assert front.hear(Farewell) == Farewell(False, "RuntimeError: the device is lost")

    with pytest.raises(RuntimeError, match="the device is lost"):
        play(scene, spoil)


def test_cancelled_and_forgotten_requests_leave_at_once(play):
    def scene(front):
        front.say(request(1, max_tokens=3000), request(2, max_tokens=3000), request(3, max_tokens=3000))
        accepted, ended = 0, {}
        for event in front.events():
            accepted += isinstance(event, Accepted)
            if accepted == 3 and not ended:
                front.say(Cancel("r1"), Cancel("r3"), Cancel("nobody"))
                accepted = 4
            if isinstance(event, Finished):
                ended[event.id] = event.reason
                if len(ended) == 2:
                    break
        assert ended == {"r1": Reason.CANCELLED, "r3": Reason.CANCELLED}
        front.say(Unknown())
        front.hear(Hello)
        front.say(messages.Welcome(False), Drain())

    play(scene)


def test_a_client_that_leaves_frees_its_slot_within_a_step(play):
    """What is cancelled during a pass is gone before the next one."""
    running: list[list[str]] = []

    def spoil(replica):
        whole = replica.engine.step

        def step() -> Any:
            running.append([one.request.id for one in replica.engine.running])
            if len(running) == 9:
                fronts[0].say(Cancel("r1"))
                while replica._mailbox._inbox.empty():
                    time.sleep(0.001)
            return whole()

        replica.engine.step = step

    fronts: list[Front] = []

    def scene(front):
        fronts.append(front)
        front.say(request(1, max_tokens=3000), request(2, max_tokens=96))
        ended = [event.id for event in itertools.islice((e for e in front.events() if isinstance(e, Finished)), 2)]
        assert ended == ["r1", "r2"]
        front.say(Drain())

    play(scene, spoil)
    assert running[8] == ["r1", "r2"] and all(one == ["r2"] for one in running[9:]) and len(running) > 10


def test_a_connection_that_ends_is_another_beginning(play):
    """Messages on their way are lost with it: all requests are forgotten, and the replica says Hello by a new one."""

    def scene(front):
        front.say(request(1, max_tokens=3000), request(2, max_tokens=3000))
        assert isinstance(next(front.events()), Accepted)
        address, identity = front.socket.last_endpoint, front.identity
        front.socket.close()
        front.socket = front.socket.context.socket(zmq.ROUTER)
        front.socket.linger, front.socket.rcvtimeo = 0, 20_000
        front.socket.bind(address)
        assert front.hear(Hello).name == "a" and front.identity != identity
        front.say(messages.Welcome(False), request(3))
        ended = next(event for event in front.events() if isinstance(event, Finished))
        assert (ended.id, ended.reason) == ("r3", Reason.LENGTH)
        front.say(Drain())

    play(scene)


def test_a_replica_that_nobody_speaks_with_ends(play):
    assert play(None).draining


def test_messages_that_are_none_are_left_aside(play):
    def scene(front):
        front.socket.send_multipart([front.identity, b"\xc1"])
        front.say(request(1, prompt=()))
        assert isinstance(next(front.events()), Refused)
        front.say(Drain())

    play(scene)


def test_an_address_that_is_none_is_the_users_error(single):
    with pytest.raises(UserError, match="front=nowhere: .*expected tcp://host:port"):
        Replica(cases.network(), CONFIG, "nowhere", "a", 1.0)
