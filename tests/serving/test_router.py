"""Where requests go, and what becomes of them when replicas die: replicas here are sockets that say what is asked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

import msgspec
import pytest
import zmq
import zmq.asyncio
from hypothesis import given
from hypothesis import strategies as st

from nemo_diffgemma.diffusion.sampler_config import SamplerConfig
from nemo_diffgemma.serving import messages
from nemo_diffgemma.serving.failures import Failure, InvalidRequest, Overloaded, TimedOut, Unavailable
from nemo_diffgemma.serving.job import Job
from nemo_diffgemma.serving.messages import Accepted, Beat, Cancel, Events, Farewell, Hello, Ping, Refused
from nemo_diffgemma.serving.request import Draft, Finished, Reason, Request, Settled
from tests.serving.fakes import FACTS, Fake, finished, play_in, rest


@pytest.fixture
def play(tmp_path) -> Callable[..., None]:
    return partial(play_in, tmp_path)


def test_the_longest_known_beginning_decides_then_the_load(play):
    async def scene(world):
        a, b = await world.join("a"), await world.join("b")
        first = world.ask((1, 2, 3, 4, 5))
        home, other = (a, b) if first.replica.name == "a" else (b, a)
        assert world.ask((9, 9, 9, 9)).replica.name == other.name, "nothing known: the one with fewer requests"
        assert world.ask((1, 2, 3, 4, 6)).replica.name == home.name, "a tile of it is known there"
        assert world.ask((1, 2, 3, 4, 7)).replica.name == other.name, "no slot is free where it is known"
        assert (await home.hear(Request)).prompt == (1, 2, 3, 4, 5)

    play(scene)


def test_a_client_hears_each_canvas_once_though_the_replica_dies(play):
    async def scene(world):
        a = await world.join("a")
        job = world.ask()
        request = await a.hear(Request)
        id = request.id
        draft = lambda canvas, remaining: Draft(id, canvas, remaining, [0], [True], [0.0])
        await a.say(Events([Accepted(id), draft(0, 1), Settled(id, 0, 3, [7]), draft(1, 2)]))
        assert isinstance(await job.next(), Accepted) and isinstance(await job.next(), Draft)
        assert (await job.next()).tokens == [7]
        world.kill(a)
        b = await world.join("b")
        again = await b.hear(Request)
        assert again == msgspec.structs.replace(request, id=again.id) and again.id != id, "when the silence is noticed"
        assert (await a.hear(Cancel)).id == id and not world.dead
        await a.say(Events([Settled(id, 1, 9, [666]), finished(id)]))  # it lives after all
        told, id = draft(1, 2), again.id
        await b.say(Events([Accepted(id), draft(0, 1), Settled(id, 0, 3, [7]), draft(1, 2), draft(1, 1)]))
        await b.say(Events([Settled(id, 1, 2, [8]), finished(id)]))
        heard = []
        while not isinstance(event := await job.next(), Finished):
            heard.append(event)
        assert heard == [told, draft(1, 1), Settled(id, 1, 2, [8])]
        assert not world.router.jobs

    play(scene)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.lists(st.integers(0, 30), max_size=3))
def test_whenever_replicas_die_each_canvas_is_told_once_and_drafts_go_on(steps, deaths):
    """`steps` of each canvas; `deaths` are numbers of events after which the request begins again."""
    events = [Accepted("")]
    for canvas, count in enumerate(steps):
        events += [Draft("", canvas, remaining, [], [], []) for remaining in range(9, 9 - count, -1)]
        events.append(Settled("", canvas, count, [canvas]))
    job = Job(Request("", (1,), 8, 8, drafts=True), [], 0.0)
    told = [event for life in [*deaths, len(events)] for event in events[:life] if job.tell(event)]
    assert told == events


def test_a_replica_that_says_hello_twice_keeps_its_requests(play):
    """The welcome may take longer than it waits."""

    async def scene(world):
        a = await world.join("a")
        job = world.ask()
        id = (await a.hear(Request)).id
        await a.say(Hello("a", FACTS), Events([Accepted(id), Settled(id, 0, 1, [5]), finished(id)]))
        assert await rest(job) == [5]
        assert not world.dead

    play(scene)


def test_requests_wait_where_there_is_no_replica_and_go_to_the_next(play):
    async def scene(world):
        a = await world.join("a")
        job = world.ask()
        await a.hear(Request)
        world.router.ended("a", "killed")
        assert world.router.waiting == 1
        await a.say(Hello("a", FACTS))  # ranks that it has left
        await a.hear(messages.Drain)
        b = await world.join("b")
        id = (await b.hear(Request)).id
        await b.say(Events([Accepted(id), Settled(id, 0, 1, [5]), finished(id)]))
        assert await rest(job) == [5]

    play(scene)


NEVER = dict(silent_seconds=1000.0, lost_seconds=1000.0)


def test_a_connection_that_ends_is_noticed_without_any_silence(play):
    """As the kernel ends those of a process that is killed, on this machine or another."""

    async def scene(world):
        a = await world.join("a")
        job = world.ask()
        id = (await a.hear(Request)).id
        await a.say(Events([Accepted(id), Settled(id, 0, 1, [5])]))
        await job.next()
        world.kill(a)
        a.socket.close()
        b = await world.join("b")
        id = (await b.hear(Request)).id
        assert world.dead == ["a"] and list(world.router.replicas) == [b"b"]
        await b.say(Events([Accepted(id), Settled(id, 0, 1, [5]), Settled(id, 1, 1, [6]), finished(id)]))
        assert await rest(job) == [5, 6]

    play(scene, **NEVER)


def test_a_silence_that_lasts_gives_a_replica_up(play):
    async def scene(world):
        a = await world.join("a")
        job = world.ask()
        await a.hear(Request)
        world.kill(a)
        while not world.dead:
            await asyncio.sleep(0.01)
        assert world.dead == ["a"] and world.router.waiting == 1
        await a.say(Beat(1, 0, 5, 0.0))
        await a.hear(messages.Unknown)
        await a.say(Hello("a", FACTS))  # it has forgotten its requests
        id = (await a.hear(Request)).id
        await a.say(Events([Settled(id, 0, 1, [5]), finished(id)]))
        assert await rest(job) == [5]

    play(scene, silent_seconds=0.5, lost_seconds=1.5)


def test_a_replica_alone_that_is_merely_slow_keeps_its_requests(play):
    """Nobody else could answer them sooner; nothing begins again, nothing is killed, new ones wait for it."""

    async def scene(world):
        a = await world.join("a")
        first = world.ask()
        id = (await a.hear(Request)).id
        world.kill(a)
        while not world.router.replicas[b"a"].is_silent:
            await asyncio.sleep(0.01)
        second = world.ask()
        assert world.router.waiting == 1
        await a.say(Events([Accepted(id), Settled(id, 0, 1, [5]), finished(id)]))
        assert await rest(first) == [5]
        assert (await a.hear(Request)).id == second.request.id
        assert not world.dead and first.replays == first.moves == second.moves == 0

    play(scene, lost_seconds=1000.0)


def test_where_all_are_slow_a_request_stays_somewhere(play):
    """Else each would begin again before it is answered, for ever."""

    async def scene(world):
        both = [await world.join(name) for name in "ab"]
        job = world.ask()
        for move in range(3):
            name = job.replica.name
            world.kill(next(one for one in both if one.name == name))
            while not world.router.replicas[name.encode()].is_silent:
                await asyncio.sleep(0.01)
            await asyncio.sleep(1.0)  # two looks at the replicas
            assert job.moves == min(move + 1, 2) and job.replays == 0
            slow = next(one for one in both if one.name == name)
            world.hearts[name] = asyncio.create_task(slow.live())
            while world.router.replicas[name.encode()].is_silent:
                await asyncio.sleep(0.01)

    play(scene, silent_seconds=0.7, lost_seconds=1000.0)


def test_a_request_that_replicas_die_of_is_given_up(play):
    async def scene(world):
        job = None
        for name in "abc":
            replica = await world.join(name)
            job = job or world.ask()
            await replica.hear(Request)
            await replica.say(Farewell(False, "NaN"))
        with pytest.raises(Failure, match="3 replicas failed while they answered: NaN"):
            await job.next()

    play(scene)


@pytest.mark.parametrize("told", [True, False], ids=["told", "not_told"])
def test_a_replica_that_drains_gets_nothing_new(play, told):
    async def scene(world):
        a = await world.join("a")
        job = world.ask()
        await a.hear(Request)
        late = world.ask()
        refused = Events([Refused(late.request.id, "about to end", elsewhere=True)])
        await a.say(*([Farewell(True, "draining"), refused] if told else [refused]))
        b = await world.join("b")
        assert (await b.hear(Request)).id == late.request.id
        await a.say(Events([Settled(job.request.id, 0, 1, [5]), finished(job.request.id)]))
        assert await rest(job) == [5]

    play(scene)


def test_refusals_and_errors_end_a_request(play):
    async def scene(world):
        a = await world.join("a")
        for event, failure in [
            (lambda id: Refused(id, "no token"), InvalidRequest),
            (lambda id: finished(id, Reason.ERROR, "NaN"), Failure),
        ]:
            job = world.ask()
            await a.say(Events([event((await a.hear(Request)).id)]))
            with pytest.raises(failure, match="no token|NaN"):
                await job.next()
            assert not world.router.jobs

    play(scene)


def test_what_takes_too_long_is_cancelled(play):
    async def scene(world):
        a = await world.join("a")
        job = world.ask()
        with pytest.raises(TimedOut, match="not answered in 0.3 s"):
            await job.next()
        assert (await a.hear(Cancel)).id == job.request.id

    play(scene, request_seconds=0.3)


def test_a_pass_that_does_not_end_is_a_death(play):
    async def scene(world):
        a = await world.join("a")
        job = world.ask()
        await a.hear(Request)
        world.kill(a)
        await a.say(Beat(1, 0, 5, 77.0))
        b = await world.join("b")
        assert (await b.hear(Request)).id == job.request.id

    play(scene, stall_seconds=60.0, silent_seconds=1000.0)


def test_a_full_queue_refuses_all_of_a_clients_requests(play):
    async def scene(world):
        with pytest.raises(Unavailable):
            world.ask()
        await world.join("a")  # with two slots
        for _ in range(4):
            world.ask()
        several = [Request(str(index), (1,), 8, 8) for index in range(2)]
        with pytest.raises(Overloaded) as refused:
            world.router.submit(several)
        assert refused.value.retry_after >= 1 and len(world.router.jobs) == 4
        world.ask()

    play(scene, queue_limit=3)


def test_a_cancelled_request_leaves_its_replica(play):
    async def scene(world):
        a = await world.join("a")
        job = world.ask()
        await a.hear(Request)
        world.router.cancel(job)
        assert (await a.hear(Cancel)).id == job.request.id
        world.router.cancel(job)
        await a.hears_nothing(Cancel)
        await a.say(Events([Settled(job.request.id, 0, 1, [5])]))
        await a.hear(Ping)
        assert not world.router.jobs

    play(scene)


def test_a_replica_of_another_model_gets_no_requests(play):
    async def scene(world):
        await world.join("a")
        other = Fake(world.address, "b", messages.Facts(501, 32, 4096, 4, 8, 2, SamplerConfig(), "", "", "cpu"))
        await other.say(Hello("b", other.facts))
        await other.hears_nothing(messages.Welcome)
        assert len(world.router.replicas) == 1

    play(scene)


def test_a_request_goes_where_there_is_room_for_it(play):
    async def scene(world):
        small = await world.join("small", msgspec.structs.replace(FACTS, context_tokens=64))
        assert world.router.facts.context_tokens == 64
        late = world.ask(tuple(range(200)))
        assert late.replica is None, "it waits"
        large = await world.join("large")
        assert world.router.facts.context_tokens == FACTS.context_tokens
        assert late.replica.name == "large"
        assert [world.ask(tuple(range(100))).replica.name for _ in range(4)] == ["large"] * 4
        assert world.ask((1,)).replica.name == "small", "it has fewer"
        world.kill(large)
        while not world.router.replicas[b"large"].is_silent:
            await asyncio.sleep(0.05)
        assert late.replica.name == "large", "nobody else has room"
        await small.hear(Request)

    play(scene)


def test_slow_readers_miss_drafts_and_no_token(play):
    async def scene(world):
        a = await world.join("a")
        job = world.ask(drafts=True)
        id = (await a.hear(Request)).id
        await a.say(Events([Accepted(id)]))
        for canvas in range(5):
            steps = [Draft(id, canvas, remaining, [0], [True], [0.0]) for remaining in range(47, -1, -1)]
            await a.say(Events([*steps, Settled(id, canvas, 48, [canvas])]))
        await a.say(Events([finished(id)]))
        while not job.is_over:
            await asyncio.sleep(0.01)
        assert job._events.qsize() < 5 * 48
        assert await rest(job) == [0, 1, 2, 3, 4]

    play(scene)


def test_messages_that_are_none_are_left_aside(play):
    async def scene(world):
        a = await world.join("a")
        await a.socket.send(b"\xc1 no MessagePack")
        await a.socket.send(b"\x81\xa4type\xa5Hello")
        job = world.ask()
        assert (await a.hear(Request)).id == job.request.id

    play(scene)


def test_whatever_comes_at_the_port_of_replicas_others_are_heard(play, tmp_path):
    """Clients of HTTP, sockets of other kinds, messages of one and several parts, and of other programs."""

    async def scene(world):
        a = await world.join("a")
        _, writer = await asyncio.open_unix_connection(f"{tmp_path}/router")
        writer.write(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}" + bytes(range(256)))
        for kind, parts in ((zmq.REQ, [b"\xff"]), (zmq.DEALER, [b"", b"a", b""]), (zmq.DEALER, [b""])):
            with zmq.asyncio.Context.instance().socket(kind) as stranger:
                stranger.linger = 200
                stranger.connect(world.address)
                await stranger.send_multipart(parts)
        await asyncio.sleep(0.3)
        job = world.ask()
        request = await a.hear(Request)
        await a.say(Events([Accepted(request.id), Settled(request.id, 0, 1, [7]), finished(request.id)]))
        assert isinstance(await job.next(), Accepted) and await rest(job) == [7]
        writer.close()

    play(scene)


def test_a_million_answers_are_refused_before_any_is_made(play):
    async def scene(world):
        await world.join("a")
        with pytest.raises(InvalidRequest, match="1000000 answers at once; this server has room for 7"):
            world.router.check_room(10**6)
        assert world.router.check_room(7) == 7

    play(scene, queue_limit=5)
