"""Languages of requests in a replica: compiled while passes go on, by rank 0 for all ranks."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from nemo_diffgemma.serving import messages
from nemo_diffgemma.serving.compiling import LanguageCompiler
from nemo_diffgemma.serving.constraints import ConstraintError, Limits, regex
from nemo_diffgemma.serving.messages import Accepted, Cancel, Drain, Farewell, Hello, Refused, Unknown
from nemo_diffgemma.serving.replica import _vocabulary
from nemo_diffgemma.serving.request import Finished, Reason, Settled
from nemo_diffgemma.tokenizer import Text
from tests.serving import cases, gemma, held, served
from tests.serving.test_replica import SAMPLER, Front, play, request  # noqa: F401  play is a fixture

ENDING = SAMPLER.with_overrides({"eos_token_id": cases.EOS, "max_denoising_steps": 2})


def asked(seed, language=held.LETTERS, **given):
    return request(seed, **{**dict(sampler=ENDING, language=language, max_tokens=60), **given})


def until_ended(front, ids):
    """What was heard until these requests have ended."""
    heard, refused = cases.Heard(), {}
    for event in front.events():
        if isinstance(event, Refused):
            refused[event.id] = event.why
        elif not isinstance(event, Accepted):
            heard.take([event])
        if ids <= heard.finished.keys() | refused.keys():
            return heard, refused


class Slow:
    """In place of a compiler: what was asked of it is done when a test says so."""

    def __init__(self):
        self.futures = {}
        self.cancelled = []

    def submit(self, language):
        return self.futures.setdefault(language.expression, Future())

    def forget(self, language):
        del self.futures[language.expression]

    def cancel(self, language):
        if (future := self.futures.pop(language.expression, None)) is not None and future.cancel():
            self.cancelled.append(language.expression)

    def close(self):
        pass


def test_passes_go_on_while_a_language_is_compiled(play):  # noqa: F811
    slow, broken = Slow(), regex("[0-9]+")

    def spoil(replica):
        replica._compiler._compiler = slow

    def scene(front):
        front.say(asked(1), asked(2), asked(3), asked(4, broken), asked(5, broken), request(6, max_tokens=3000))
        events, canvases = front.events(), 0
        while canvases < 5:
            event = next(events)
            assert event.id == "r6"
            canvases += isinstance(event, Settled)
        front.say(Cancel("r2"), Cancel("r5"), Cancel("r6"))
        cancelled = {event.id for event in (next(e for e in events if isinstance(e, Finished)) for _ in range(3))}
        assert cancelled == {"r2", "r5", "r6"} and len(slow.futures) == 2
        slow.futures[broken.expression].set_exception(ConstraintError("the constraint is too large"))
        refused = next(events)
        assert refused == Refused("r4", "the constraint is too large")
        front.say(asked(8, regex("[0-9]")), Cancel("r8"))
        assert next(e for e in events if isinstance(e, Finished)).id == "r8"
        assert slow.cancelled == [regex("[0-9]").expression], "nobody waits for it"
        slow.futures[held.LETTERS.expression].set_result(held.automaton(held.LETTERS))
        assert [next(events), next(events)] == [Accepted("r1"), Accepted("r3")], "in the same pass"
        assert held.LETTERS.expression not in slow.futures, "the automaton is kept once"
        heard, _ = until_ended(front, {"r1", "r3"})
        assert held.problems([asked(1), asked(3)], heard.tokens) == []
        front.say(asked(7))  # its automaton is there
        assert next(front.events()) == Accepted("r7")
        until_ended(front, {"r7"})
        front.say(Drain())

    play(scene, spoil, gemma.tokenizer())


def test_a_replica_that_drains_answers_what_is_compiled(play):  # noqa: F811
    slow = Slow()

    def spoil(replica):
        replica._compiler._compiler = slow

    def scene(front):
        front.say(asked(1), Drain())
        assert front.hear(Farewell).draining
        front.say(asked(2))
        assert next(front.events()) == Refused("r2", "this replica is about to end", elsewhere=True)
        slow.futures[held.LETTERS.expression].set_result(held.automaton(held.LETTERS))
        heard, _ = until_ended(front, {"r1"})
        assert held.problems([asked(1)], heard.tokens) == []

    play(scene, spoil, gemma.tokenizer())


def test_whoever_is_forgotten_waits_for_nothing(play):  # noqa: F811
    slow = Slow()

    def spoil(replica):
        replica._compiler._compiler = slow

    def scene(front):
        front.say(asked(1), Unknown())
        front.hear(Hello)
        front.say(messages.Welcome(False), asked(2))
        while not (slow.cancelled and slow.futures):
            time.sleep(0.01)
        slow.futures[held.LETTERS.expression].set_result(held.automaton(held.LETTERS))
        heard, _ = until_ended(front, {"r2"})
        assert heard.finished.keys() == {"r2"}
        front.say(Drain())

    play(scene, spoil, gemma.tokenizer())


def test_children_compile_and_what_takes_for_ever_is_refused(play):  # noqa: F811
    def spoil(replica):
        vocabulary = lambda: _vocabulary(replica.engine.network, Text(replica.engine.network.assets))
        replica._compiler = LanguageCompiler(vocabulary, replica._mailbox.post, Limits(seconds=4.0))

    def scene(front):
        late, short = regex("(?:a|b)*a(?:a|b){40}"), asked(3, max_tokens=5)
        front.say(asked(1), asked(2, late), short, asked(4, prompt=()), asked(5, language=regex("b*"), stop=("b",)))
        heard, refused = until_ended(front, {f"r{number}" for number in range(1, 6)})
        assert "too large" in refused["r2"] and "has 20 tokens; max_tokens=5" in refused["r3"]
        assert "no token" in refused["r4"] and "stop='b'" in refused["r5"]
        assert held.problems([asked(1)], heard.tokens) == []
        assert heard.finished["r1"].reason is Reason.STOP
        front.say(Drain())

    play(scene, spoil, gemma.tokenizer())


def test_without_a_tokenizer_languages_are_refused(play):  # noqa: F811
    def scene(front):
        front.say(asked(1))
        assert next(front.events()) == Refused(
            "r1", "this model has no tokenizer, so its answers cannot be held to a language"
        )
        front.say(Drain())

    play(scene)


def test_a_replica_of_four_ranks_holds_answers(pool, single, tmp_path):
    """All ranks get what one of them has compiled, and begin the requests in the same pass: else they would hang."""
    checkpoint = served.write_checkpoint(tmp_path / "model", gemma.tokenizer())
    engine = dict(context_gb=0.02, typical_tokens=700, max_running=3, tokens_per_pass=600)
    given = dict(layout=dict(tensor=2, expert=2), checkpoint=str(checkpoint), engine=engine)
    given["address"] = f"ipc://{tmp_path}/front"
    front, wanted = Front(given["address"]), held.requests(12, 9)
    front.socket.rcvtimeo = 240_000  # four ranks start
    with ThreadPoolExecutor(1) as thread:
        ranks = thread.submit(pool(4).run, "tests.serving.served:serve_in_layout", **given)
        try:
            front.hear(Hello)
            front.say(messages.Welcome(False), *wanted)
            heard, refused = until_ended(front, {request.id for request in wanted})
            assert not refused and held.problems(wanted, heard.tokens) == []
        finally:
            front.say(Unknown(), Drain())
            assert ranks.result() == [0] * 4
            front.socket.close()


@pytest.mark.parametrize("decoder", ["WordPiece", "Metaspace"])
def test_tokenizers_whose_text_is_not_that_of_its_tokens_are_refused(decoder):
    from types import SimpleNamespace

    from tokenizers import Tokenizer, decoders, models

    made, posted = Tokenizer(models.BPE()), []
    made.decoder = getattr(decoders, decoder)()
    network = SimpleNamespace()
    compiler = LanguageCompiler(lambda: _vocabulary(network, SimpleNamespace(tokenizer=made)), posted.append)
    compiler.submit(held.LETTERS)
    assert posted[0].why.startswith(f"a tokenizer whose decoder is {decoder} cannot be constrained")
    compiler.close()
