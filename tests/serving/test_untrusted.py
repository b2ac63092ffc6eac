"""Languages of strangers, and finished answers read once more: what is not of its language reaches no client."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace

import pytest

from nemo_diffgemma.diffusion.sampler_config import SamplerConfig
from nemo_diffgemma.serving.api.asking import Desk
from nemo_diffgemma.serving.api.fields import CompletionBody
from nemo_diffgemma.serving.constraints import bytes_of_tokens, json_of_schema, regex
from nemo_diffgemma.serving.failures import Failure, InvalidRequest, TimedOut
from nemo_diffgemma.serving.messages import TextFiles
from nemo_diffgemma.serving.metrics import Metrics
from nemo_diffgemma.serving.request import Request
from nemo_diffgemma.serving.text import ServedText
from nemo_diffgemma.serving.untrusted import Untrusted
from tests.serving import examples

TURN = 3


@pytest.fixture(scope="module")
def metrics():
    return Metrics()


@pytest.fixture(scope="module")
def untrusted(metrics):
    made = Untrusted(metrics, seconds=20.0, processes=1)
    yield made
    made.close()


@pytest.fixture(scope="module")
def text():
    return ServedText(TextFiles(examples.tokenizer().to_str(), None, {}))


def request(language):
    return Request("a", (3,), 64, 16, SamplerConfig(eos_token_id=examples.EOS), language=language)


def ids(words: str) -> list[int]:
    return examples.tokenizer().encode(words).ids


def test_an_answer_of_its_language_passes_with_what_ends_it_or_without(untrusted, text, metrics):
    person = request(json_of_schema({"type": "object", "required": ["name"]}))
    for tokens in (ids('{"name": "Ann"}'), [*ids('{"name": "é"}'), examples.EOS, examples.EOS]):
        asyncio.run(untrusted.check(person, tokens, text))
    asyncio.run(untrusted.check(request(None), [1, 2, 3], None))
    assert metrics.violations._value.get() == 0


def test_whatever_is_not_is_an_error_and_counted(untrusted, text, metrics):
    person, letters = request(json_of_schema({"type": "object", "required": ["name"]})), request(regex(".*"))
    before = metrics.violations._value.get()
    for wrong, tokens in [(person, ids("{}")), (person, []), (letters, [*ids("a"), TURN, *ids("b")])]:
        with pytest.raises(Failure, match="a defect of this server") as caught:
            asyncio.run(untrusted.check(wrong, tokens, text))
        assert caught.value.status == 500 and caught.value.code == "constraint_violated"
    assert metrics.violations._value.get() == before + 3


def test_a_pattern_that_takes_for_ever_is_the_users_and_stops_nobody_else(text):
    quick = Untrusted(Metrics(), seconds=2.0, processes=2)

    async def both() -> None:
        slow = asyncio.create_task(quick.check(request(regex("(?:a+)+b")), ids("a" * 40), text))
        await quick.check(request(regex("a")), ids("a"), text)
        assert not slow.done()
        with pytest.raises(InvalidRequest, match="cannot be checked: .*within 2 s"):
            await slow

    try:
        asyncio.run(both())
    finally:
        quick.close()


def test_special_tokens_are_told_from_text_that_looks_like_them(text):
    spelled = ids("<turn") + ids("|>")
    assert text.decode_marked([*ids("a"), TURN, TURN, *ids("é")]) == "a\x01<turn|>\x01\x01<turn|>\x01é"
    assert TURN not in spelled and text.decode_marked(spelled) == "<turn|>"
    assert bytes_of_tokens(examples.tokenizer())[TURN] == b"\x01<turn|>\x01"


def test_a_schema_that_takes_for_ever_is_refused_and_stops_nobody_else(untrusted):
    def asked(**diffusion):
        return CompletionBody(model="m", prompt="", diffusion=diffusion)

    async def made() -> None:
        huge = {"type": "object", "properties": {f"p{number}": {} for number in range(19_000)}}
        slow = asyncio.create_task(quick.language(asked(json_schema=huge)))
        assert await quick.language(asked(regex="a")) == regex("a")
        with pytest.raises(InvalidRequest, match="too large"):
            await slow

    quick = Untrusted(Metrics(), seconds=2.0, processes=2)
    try:
        asyncio.run(made())
    finally:
        quick.close()
    for given, parameter, what in [
        (dict(regex="(?=a)"), "diffusion.regex", "look-around"),
        (dict(regex="a", choice=["a"]), "diffusion.choice", "at once"),
    ]:
        with pytest.raises(InvalidRequest, match=what) as refused:
            asyncio.run(untrusted.language(asked(**given)))
        assert (refused.value.parameter, refused.value.status) == (parameter, 400)


def test_an_answer_is_checked_in_the_time_limit_of_its_request():
    async def check(*_) -> None:
        await asyncio.sleep(60)

    async def language(*_) -> None:
        await asyncio.sleep(60)

    slow = SimpleNamespace(check=check, language=language)
    desk = Desk(SimpleNamespace(text=None), SimpleNamespace(request_seconds=0.1), slow)
    for began in (time.monotonic(), time.monotonic() - 9):
        with pytest.raises(TimedOut, match="0.1 s"):
            asyncio.run(desk.check(SimpleNamespace(began=began, request=None), []))
    with pytest.raises(TimedOut):
        asyncio.run(desk.learn_language(CompletionBody(model="m", prompt="", diffusion={"regex": "a"})))
