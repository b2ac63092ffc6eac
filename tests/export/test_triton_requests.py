"""Whatever is asked of the Triton model ends in the engine's answer or in an error that tells what to change."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from export.bundle import triton_repository, triton_request
from nemo_diffgemma import SamplerConfig
from nemo_diffgemma.data import build_tokenizer
from tests.export import kit, triton_double
from tests.export.triton_double import TritonError, load, outputs, request

CANVAS = 4
DEFAULTS = SamplerConfig(max_denoising_steps=2, confidence_threshold=0.0)
PUZZLE = "1..4 ..3. 2... ...1"
IDS = np.array([[3, 5, 8], [13, 21, 34]])


@pytest.fixture(scope="module")
def engine(single: None, checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    engine = kit.engine(kit.calm(checkpoint), loop=2)
    engine.assets = tmp_path_factory.mktemp("assets")
    build_tokenizer().save_pretrained(engine.assets)
    return engine


@pytest.fixture(scope="module")
def model(engine: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    bundle = tmp_path_factory.mktemp("bundle")
    triton_repository.write(bundle, "onnx")
    patch = pytest.MonkeyPatch()
    patch.setattr(type(engine), "sampler_defaults", DEFAULTS)
    yield load(bundle, patch, lambda path, provider, device: engine)
    patch.undo()


def answered(model: Any, **given: Any) -> tuple[list[dict[str, np.ndarray]], str]:
    """The outputs of all responses and the text of an error, which must be the client's; "" for none."""
    asked = request(**given)
    model.execute([asked])
    assert asked.sender.closed
    *before, last = asked.sender.responses
    error = last.error()
    if error is None:
        return [outputs(response) for response in (*before, last)], ""
    assert error.code() == TritonError.INVALID_ARG, error.message()
    assert not before, "part of an answer was sent before the refusal"
    assert error.message() and "\n" not in error.message()
    return [], error.message()


def check_answer(engine: Any, answers: list[dict[str, np.ndarray]], given: dict[str, Any]) -> None:
    """Compare with `generate` of the engine itself."""
    single = {name: value.item() for name, value in given.items() if value.dtype != object and value.ndim == 1}
    if "prompt" in given:
        ids = torch.tensor([build_tokenizer()(given["prompt"][0].decode()).input_ids])
    else:
        ids = torch.tensor(given["input_ids"])
    mask = torch.tensor(given["attention_mask"]) if "attention_mask" in given else None
    sampler = replace(DEFAULTS, **{name: single[name] for name in triton_request.SETTINGS if name in single})
    expected = engine.generate(ids, mask, single.get("max_new_tokens", CANVAS), sampler, seed=single.get("seed", 0))
    tokens = np.concatenate([answer["tokens"] for answer in answers], axis=1)
    assert tokens.tolist() == expected.sequences[:, ids.shape[1] :].tolist()
    assert answers[-1]["forwards"].tolist() == expected.forwards.tolist()
    assert single.get("stream", False) or len(answers) == 1


def array(dtype: type, values: st.SearchStrategy, shapes: st.SearchStrategy) -> st.SearchStrategy:
    return shapes.flatmap(
        lambda shape: st.lists(values, min_size=int(np.prod(shape)), max_size=int(np.prod(shape))).map(
            lambda flat: np.array(flat, dtype=dtype).reshape(shape)
        )
    )


def text_array(values: st.SearchStrategy) -> st.SearchStrategy:
    return values.map(lambda text: np.array([text], dtype=np.object_))


def one(dtype: type, values: st.SearchStrategy, shapes: st.SearchStrategy = st.just((1,))) -> st.SearchStrategy:  # noqa: B008
    return array(dtype, values, shapes)


def often(usual: st.SearchStrategy, rare: st.SearchStrategy) -> st.SearchStrategy:
    """The usual most times: requests with many inputs would else never get past the first."""
    return st.integers(0, 9).flatmap(lambda throw: rare if throw == 9 else usual)


SHAPES = often(st.just((2, 3)), st.tuples(st.integers(0, 10), st.integers(0, 5)))
ONE = often(st.just((1,)), st.sampled_from([(), (0,), (2,), (1, 1)]))
FLOATS = st.floats(width=32)  # NaN and infinities too
STEPS = often(st.integers(1, 3), st.integers(-1, 0) | st.integers(triton_request.MOST_STEPS + 1, 2**31 - 1))
PROMPTS = {
    "input_ids": often(
        array(np.int64, st.integers(0, 63), SHAPES), array(np.int64, st.integers(-(2**63), 2**63 - 1), SHAPES)
    ),
    "attention_mask": often(
        st.sampled_from([np.ones((2, 3), np.int64), np.array([[0, 0, 1], [1, 1, 1]])]),
        array(np.int64, st.integers(-1, 2), SHAPES),
    ),
    "prompt": text_array(often(st.just(PUZZLE.encode()), st.binary() | st.text().map(str.encode))),
}
REST = st.fixed_dictionaries(
    {},
    optional={
        "max_new_tokens": one(np.int32, often(st.integers(1, 12), st.integers(-(2**31), 2**31 - 1)), ONE),
        "seed": one(np.int64, st.integers(-(2**63), 2**63 - 1), ONE),
        "stream": one(bool, st.booleans(), ONE),
        "max_denoising_steps": one(np.int32, STEPS, ONE),
        "stability_threshold": one(np.int32, STEPS, ONE),
        "entropy_bound": one(np.float32, often(st.floats(0, 10, width=32), FLOATS), ONE),
        "confidence_threshold": one(np.float32, often(st.sampled_from([0.0, 0.01]), FLOATS), ONE),
        "t_min": one(np.float32, often(st.floats(0, 0.5, width=32), FLOATS), ONE),
        "t_max": one(np.float32, often(st.floats(1, 2, width=32), FLOATS), ONE),
    },
)
WHAT = st.sampled_from([("input_ids",), ("input_ids", "attention_mask"), ("prompt",)])
WHAT_NOT = st.lists(st.sampled_from(sorted(PROMPTS)), unique=True).map(tuple)
PROMPT = often(WHAT, WHAT_NOT).flatmap(lambda names: st.fixed_dictionaries({name: PROMPTS[name] for name in names}))
ANYTHING = st.tuples(PROMPT, REST).map(lambda parts: {**parts[0], **parts[1]})
PARAMETERS = often(st.just({}), st.dictionaries(st.sampled_from(["seed", "max_new_token", "triton"]), st.integers()))


@settings(max_examples=120, suppress_health_check=[HealthCheck.too_slow])
@given(given=ANYTHING, parameters=PARAMETERS)
def test_any_request_ends_in_the_answer_or_in_a_clear_error(
    model: Any, engine: Any, given: dict[str, Any], parameters: dict[str, int]
) -> None:
    answers, error = answered(model, parameters=parameters, **given)
    event("answered" if answers else " ".join(error.split()[:3]))
    if answers:
        assert not parameters
        check_answer(engine, answers, given)


SINGLE = {
    "max_new_tokens": one(np.int32, st.integers(1, 12)),
    "seed": one(np.int64, st.integers(-(2**63), 2**63 - 1)),
    "stream": one(bool, st.booleans()),
    "max_denoising_steps": one(np.int32, st.integers(1, 3)),
    "stability_threshold": one(np.int32, st.integers(0, 2)),
    "entropy_bound": one(np.float32, st.floats(0, 10, width=32)),
    "confidence_threshold": one(np.float32, st.sampled_from([0.0, 0.01, 10.0])),
    "t_min": one(np.float32, st.floats(0, 0.5, width=32)),
    "t_max": one(np.float32, st.floats(0.625, 2, width=32)),
}
GOOD_IDS = st.fixed_dictionaries(
    {"input_ids": array(np.int64, st.integers(0, 63), st.just((2, 3)))},
    optional={**SINGLE, "attention_mask": st.just(np.array([[0, 0, 1], [1, 1, 1]]))},
)
GOOD_TEXT = st.fixed_dictionaries({"prompt": st.just(np.array([PUZZLE.encode()], dtype=np.object_))}, optional=SINGLE)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(given=GOOD_IDS | GOOD_TEXT)
def test_a_request_that_means_something_is_answered(model: Any, engine: Any, given: dict[str, Any]) -> None:
    answers, error = answered(model, **given)
    assert not error
    check_answer(engine, answers, given)


NUMBERS = {"entropy_bound": [-1.0, np.nan, np.inf], "confidence_threshold": [-1.0, np.nan, np.inf]}
NUMBERS |= {"t_min": [-1.0, np.nan, 0.9], "t_max": [0.3, np.nan, np.inf], "max_denoising_steps": [0, -1, 1025]}
NUMBERS |= {"stability_threshold": [-1], "max_new_tokens": [0, -1]}
REFUSED = {
    "nothing": ({}, "give one of input_ids"),
    "ids and text": (dict(input_ids=IDS, prompt=PUZZLE), "give one of input_ids"),
    "no rows": (dict(input_ids=IDS[:0]), r"input_ids has shape \[0, 3\]; expected .* at least one row"),
    "no tokens": (dict(input_ids=IDS[:, :0]), r"input_ids has shape \[2, 0\]; expected .* at least one row"),
    "ids without rows": (dict(input_ids=IDS[0]), r"input_ids has shape \[3\]; expected \[rows, tokens\]"),
    "an id that is none": (dict(input_ids=IDS + 60), "input_ids holds 94; token ids go from 0 to 63"),
    "other integers": (dict(input_ids=IDS.astype(np.int32)), "input_ids is int32; expected TYPE_INT64"),
    "too many rows": (dict(input_ids=IDS.repeat(5, 0)), "10 rows, but the engines were built for batches of 1 to 8"),
    "too much context": (dict(input_ids=IDS, max_new_tokens=[2**31 - 1]), "need a context of"),
    "a mask of twos": (dict(input_ids=IDS, attention_mask=IDS * 0 + 2), "attention_mask must be zeros at the left"),
    "a mask of zeros": (dict(input_ids=IDS, attention_mask=IDS * 0), "attention_mask must be zeros at the left"),
    "a short mask": (dict(input_ids=IDS, attention_mask=IDS[:, :2] * 0 + 1), r"attention_mask has shape \[2, 2\]"),
    "a mask of text": (dict(prompt=PUZZLE, attention_mask=IDS), "attention_mask goes with input_ids"),
    "bytes that are no text": (dict(prompt=np.array([b"\xff"], dtype=np.object_)), "prompt is not UTF-8 text"),
    "letters that the tokenizer lacks": (dict(prompt="∃"), "cannot read prompt='∃'"),
    "two seeds": (dict(input_ids=IDS, seed=[1, 2]), r"seed has shape \[2\]; expected \[1\]"),
    "a misspelt key": (dict(input_ids=IDS, parameters={"max_new_token": 8}), "nothing here reads max_new_token"),
    "a parameter": (dict(input_ids=IDS, parameters={"seed": 8}), "seed came as a parameter of the request; give it"),
    **{
        f"{name} {value}": ({"input_ids": IDS, name: [value]}, f"{name}=.*; expected")
        for name, values in NUMBERS.items()
        for value in values
    },
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_means_nothing_is_refused_in_words(model: Any, case: str) -> None:
    given, message = REFUSED[case]
    _, error = answered(model, **given)
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(error)


def test_without_a_tokenizer_text_is_refused(model: Any, engine: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(model, "text", type(model.text)(None))
    assert "no tokenizer.json, so it cannot read a prompt; give input_ids" in answered(model, prompt=PUZZLE)[1]


def test_one_request_s_error_is_not_the_next_one_s(model: Any, engine: Any) -> None:
    asked = [request(), request(input_ids=IDS), request(input_ids=IDS[:0]), request(input_ids=IDS)]
    model.execute(asked)
    failed = [one.sender.responses[-1].has_error() for one in asked]
    assert failed == [True, False, True, False]
    tokens = [outputs(one.sender.responses[-1])["tokens"].tolist() for one in asked[1::2]]
    assert all(a == b for a, b in itertools.pairwise(tokens))
    assert isinstance(triton_double.FINAL, int) and all(one.sender.closed for one in asked)


def test_the_table_is_what_the_server_is_told(tmp_path: Path) -> None:
    triton_repository.write(tmp_path, "onnx")
    lines = (tmp_path / "triton" / "diffusion_gemma" / "config.pbtxt").read_text().splitlines()
    stripped = [line.strip() for line in lines]
    told = {}
    for start in (index for index, line in enumerate(lines) if line == "input {"):
        name, kind, dims, optional = stripped[start + 1 : start + 5]
        assert optional == "optional: true"
        told[name.split('"')[1]] = (kind.removeprefix("data_type: "), [int(n) for n in dims[7:-1].split(",")])
    assert told == triton_request.INPUTS
