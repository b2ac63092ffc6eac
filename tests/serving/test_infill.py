"""/v1/infill: what is given stands, holes settle around it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_diffgemma.serving.api.replies import DraftReply, InfillReply
from tests.serving import cases, served

ENGINE = dict(context_gb=0.02, typical_tokens=700, max_running=6, tokens_per_pass=600)
QUICK = {"max_denoising_steps": 3, "entropy_bound": 20.0}


@pytest.fixture(scope="module")
def server(tmp_path_factory, single):
    checkpoint = served.write_checkpoint(tmp_path_factory.mktemp("infill") / "model")
    made = served.Split(checkpoint, 1, ENGINE)
    yield made.ready(1)
    made.close()


@pytest.fixture(scope="module")
def ask(server):
    def post(**body):
        answer = server.http.post("/v1/infill", json={"model": "tiny", "seed": 1, "diffusion": QUICK, **body})
        assert answer.status_code == 200, answer.text
        InfillReply.model_validate(answer.json(), extra="forbid")
        return answer.json()["choices"]

    return post


@settings(max_examples=40, deadline=None)
@given(
    ids=st.lists(st.one_of(st.none(), st.integers(10, cases.IDS - 1)), min_size=1, max_size=80).filter(
        lambda ids: None in ids
    ),
    seed=st.integers(0, 2**40),
    canvas=st.sampled_from([None, 8, 20]),
)
def test_locked_tokens_never_change(ask, ids, seed, canvas):
    diffusion = QUICK if canvas is None else {**QUICK, "canvas_length": canvas}
    (choice,) = ask(token_ids=ids, prompt=[3, 4], seed=seed, diffusion=diffusion)
    tokens = choice["diffusion"]["token_ids"]
    last = max((place for place, id in enumerate(ids) if id is not None), default=0)
    assert len(tokens) == len(ids) or (last < len(tokens) < len(ids) and tokens[-1] in cases.EOS)
    assert [id for id, given in zip(tokens, ids, strict=False) if given is not None] == [
        id for id in ids[: len(tokens)] if id is not None
    ]
    filled = {hole["start"] + n: id for hole in choice["holes"] for n, id in enumerate(hole["token_ids"])}
    assert filled == {place: id for place, id in enumerate(tokens) if ids[place] is None}


def test_text_around_holes_is_given_back_whole(ask):
    text = ["Grüße, ", {"hole": 6}, " und ", {"hole": 4}, "世界!"]
    (choice,) = ask(text=text, prompt="ab")
    first, second = (hole["text"] for hole in choice["holes"])
    assert choice["text"] == f"Grüße, {first} und {second}世界!"
    assert [len(hole["token_ids"]) for hole in choice["holes"]] == [6, 4]
    assert choice["diffusion"]["canvases"] == 1, "a text that fits in a canvas has one"
    as_ids = [id for part in text for id in (_ids(part) if isinstance(part, str) else [None] * part["hole"])]
    (same,) = ask(token_ids=as_ids, prompt="ab")
    assert same["diffusion"]["token_ids"] == choice["diffusion"]["token_ids"]
    (chat,) = ask(text=text, messages=[{"role": "user", "content": "ab"}])
    assert chat["diffusion"]["token_ids"] != choice["diffusion"]["token_ids"], "what stands before counts"


def _ids(text: str) -> list[int]:
    return served.tokenizer()(text, add_special_tokens=False).input_ids


def test_a_hole_depends_on_both_sides(ask):
    def filled(left: str, right: str) -> list[list[int]]:
        (choice,) = ask(text=[left, {"hole": 12}, right])
        return [hole["token_ids"] for hole in choice["holes"]]

    base = filled("abc", "xyz")
    assert base == filled("abc", "xyz")
    assert base != filled("abd", "xyz")
    assert base != filled("abc", "xyy")


def test_of_lengths_the_most_probable_is_taken_and_is_what_it_is_alone(ask):
    text = ["ab", {"hole": {"min": 2, "max": 25}}, "cd"]
    for seed in range(3):
        (choice,) = ask(text=text, seed=seed)
        tried = choice["diffusion"]["tried"]
        lengths = [one["lengths"][0] for one in tried]
        assert (lengths[0], lengths[-1], len(lengths)) == (2, 25, 8) and lengths == sorted(lengths)
        best = max(tried, key=lambda one: one["logprob"])["lengths"][0]
        (alone,) = ask(text=["ab", {"hole": best}, "cd"], seed=seed)
        assert alone["holes"] == choice["holes"]
        assert alone["diffusion"]["token_ids"] == choice["diffusion"]["token_ids"]


def test_holes_of_free_length_are_tried_in_all_combinations(ask):
    (choice,) = ask(text=[{"hole": {"min": 1, "max": 3}}, "ab", {"hole": {"min": 2, "max": 3}}, "c", {"hole": 2}])
    tried = [tuple(one["lengths"]) for one in choice["diffusion"]["tried"]]
    assert tried == [(a, b, 2) for a in (1, 2, 3) for b in (2, 3)]


def test_n_answers_are_those_of_n_seeds(ask):
    text = [{"hole": {"min": 3, "max": 5}}, "abc"]
    both = ask(text=text, n=2, seed=5)
    for choice, seed in zip(both, (5, 6), strict=True):
        (alone,) = ask(text=text, seed=seed)
        assert alone["holes"] == choice["holes"] and choice["diffusion"]["seed"] == seed


@pytest.mark.parametrize("hole", [12, {"min": 9, "max": 12}], ids=["given", "free"])
def test_a_stream_has_the_steps_and_then_the_reply(server, ask, hole):
    body = dict(text=["ab", {"hole": hole}, "cd"])
    (whole,) = ask(**body)
    events, name = [], ""
    more = {"model": "tiny", "seed": 1, "diffusion": QUICK, "stream": True, "stream_options": {"drafts": True}}
    with server.http.stream("POST", "/v1/infill", json={**body, **more}) as answer:
        for line in answer.iter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                events.append((name, line.removeprefix("data: ")))
                name = ""
    assert events[-1] == ("", "[DONE]")
    (choice,) = json.loads(events[-2][1])["choices"]
    assert choice["text"] == whole["text"] and choice["holes"] == whole["holes"]
    ids, drafts = _ids("ab"), 0
    for name, data in events[:-2]:
        told = json.loads(data)["diffusion"]
        if name == "diffusion.draft":
            draft = told["draft"]
            if draft["lengths"] == [len(whole["holes"][0]["token_ids"])]:
                drafts += 1
            DraftReply.model_validate({key: value for key, value in draft.items() if key != "lengths"}, extra="forbid")
            assert draft["token_ids"][:2] == ids, "locked cells stand from the first step on"
        else:
            assert name == "diffusion.settled" and told["settled"]["token_ids"][:2] == ids
    assert drafts == whole["diffusion"]["steps"]


@pytest.mark.parametrize(
    "body, parameter, what",
    [
        ({}, "text", "one of text and token_ids"),
        ({"text": ["a"]}, "text", "no hole"),
        ({"text": ["a", {"hole": 0}]}, "text.1.hole", "greater than or equal to 1"),
        ({"text": ["a", {"hole": {"min": 5, "max": 2}}]}, "text", "5 to 2 tokens"),
        (
            {"text": [{"hole": {"min": 1, "max": 2}}, "a"] * 6},
            "text",
            "6 holes of free length in a text of up to 18 tokens; expected at most 5 of them",
        ),
        ({"text": ["a", {"hole": {"min": 1, "max": 40_000}}]}, "text", "expected at most 0 of them"),
        ({"text": ["a", {"hole": 10**6}]}, "text", "this server has room for"),
        ({"token_ids": [3, None], "text": ["a"]}, "text", "one of text and token_ids"),
        ({"token_ids": [3, None, 10**6]}, None, "id 1000000"),
        ({"text": [{"hole": 3}], "max_tokens": 4}, "max_tokens", ""),
        ({"text": [{"hole": 3}], "stop": ["a"]}, "stop", ""),
        ({"text": [{"hole": 3}], "prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt", "or none"),
    ],
)
def test_what_cannot_be_filled_is_refused_by_name(server, body, parameter, what):
    answer = server.http.post("/v1/infill", json={"model": "tiny", **body})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, parameter), error
    assert what in error["message"]
