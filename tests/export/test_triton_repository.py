"""Triton's model.py answers as the engine does. `triton_double.py` stands for the server's module."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.bundle import triton_repository, triton_request
from nemo_diffgemma import SamplerConfig
from nemo_diffgemma.data import build_tokenizer
from nemo_diffgemma.schema import ConfigurationError
from tests.export import kit, triton_double
from tests.export.triton_double import TritonError, load, outputs, request

pytestmark = pytest.mark.usefixtures("single")

ROOT = Path(__file__).resolve().parents[2]
IDS = torch.tensor([[0, 0, 7, 9, 11], [3, 5, 8, 13, 21]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
SAMPLER = SamplerConfig(max_denoising_steps=6, entropy_bound=5.0, confidence_threshold=0.0)
SETTINGS = {name: [getattr(SAMPLER, name)] for name in triton_request.SETTINGS}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bundle")
    triton_repository.write(directory, "onnx")
    return directory


@pytest.fixture
def engine(checkpoint: Any) -> Any:
    return kit.engine(kit.calm(checkpoint), loop=6)


@pytest.fixture
def model(bundle: Path, engine: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    def open_bundle(path: Path, provider: str, device: int) -> Any:
        assert (path, provider, device) == (bundle, "onnxruntime", 0)
        return engine

    return load(bundle, monkeypatch, open_bundle)


def sampler_of(engine: Any) -> SamplerConfig:
    """The checkpoint's settings (EOS and padding) with those that requests here set."""
    return replace(engine.sampler_defaults, **{name: value[0] for name, value in SETTINGS.items()})


def test_every_canvas_is_one_response_and_together_they_are_what_generate_returns(model: Any, engine: Any) -> None:
    asked = request(input_ids=IDS, attention_mask=MASK, max_new_tokens=[12], seed=[5], stream=[True], **SETTINGS)
    assert model.execute([asked]) is None
    expected = engine.generate(IDS, MASK, 12, sampler_of(engine), seed=5)
    answers = [outputs(response) for response in asked.sender.responses]
    assert asked.sender.closed
    assert [answer["tokens"].shape for answer in answers] == [(2, 4)] * 3
    tokens = np.concatenate([answer["tokens"] for answer in answers], axis=1)
    assert tokens.tolist() == expected.sequences[:, 5:].tolist()
    assert ["forwards" in answer for answer in answers] == [False, False, True]
    assert answers[-1]["forwards"].tolist() == expected.forwards.tolist() == [18, 18]
    assert answers[-1]["tokens_per_forward"].tolist() == pytest.approx(expected.tokens_per_forward.tolist())
    assert answers[0]["text"].tolist() == [b"", b""]  # no tokenizer here


def test_a_row_that_has_ended_is_padded_as_in_the_result(model: Any, engine: Any, monkeypatch: Any) -> None:
    free = engine.generate(IDS, MASK, 12, SAMPLER, seed=5).sequences[:, 5:]
    # ends row 0 in its first canvas and row 1 nowhere
    eos = next(id for id in free[0, :3].tolist() if id not in free[1].tolist())
    sampler = SamplerConfig(**{**vars(SAMPLER), "eos_token_id": eos, "pad_token_id": 63})
    monkeypatch.setattr(type(engine), "sampler_defaults", sampler)
    asked = request(input_ids=IDS, attention_mask=MASK, max_new_tokens=[12], seed=[5], stream=[True])
    model.execute([asked])
    expected = engine.generate(IDS, MASK, 12, sampler, seed=5).sequences[:, 5:]
    tokens = np.concatenate([outputs(response)["tokens"] for response in asked.sender.responses], axis=1)
    assert tokens.tolist() == expected.tolist()
    assert tokens[0, 4:].tolist() == [63] * 8
    assert len(asked.sender.responses) == 3


def test_a_request_that_says_nothing_else_gets_one_canvas_in_one_response(model: Any, engine: Any) -> None:
    asked = request(input_ids=IDS)
    model.execute([asked])
    (answer,) = [outputs(response) for response in asked.sender.responses]
    assert answer["tokens"].tolist() == engine.generate(IDS, max_new_tokens=4).sequences[:, 5:].tolist()
    assert "forwards" in answer


def test_fixed_steps_come_from_the_loop(model: Any, engine: Any, monkeypatch: Any) -> None:
    expected = engine.generate(IDS, None, 8, sampler_of(engine), seed=2).sequences[:, 5:]
    monkeypatch.setattr(engine, "step", None)  # nobody may run single steps
    asked = request(input_ids=IDS, max_new_tokens=[8], seed=[2], **SETTINGS)
    model.execute([asked])
    (answer,) = [outputs(response) for response in asked.sender.responses]
    assert answer["tokens"].tolist() == expected.tolist()


def test_text_goes_in_and_comes_out(bundle: Path, engine: Any, monkeypatch: Any, tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(engine, "assets", tmp_path)
    model = load(bundle, monkeypatch, lambda path, provider, device: engine)
    asked = request(prompt="1..4 ..3. 2... ...1", max_new_tokens=[4], **SETTINGS)
    model.execute([asked])
    answer = outputs(asked.sender.responses[0])
    ids = torch.tensor([tokenizer("1..4 ..3. 2... ...1").input_ids])
    expected = engine.generate(ids, None, 4, sampler_of(engine), seed=0).sequences[0, ids.shape[1] :]
    assert answer["tokens"][0].tolist() == expected.tolist()
    assert answer["text"].tolist() == [str(tokenizer.decode(expected, skip_special_tokens=True)).encode()]


def test_without_decoupling_responses_are_returned(bundle: Path, engine: Any, monkeypatch: Any) -> None:
    model = load(bundle, monkeypatch, lambda path, provider, device: engine, decoupled=False)
    asked = [request(input_ids=IDS, max_new_tokens=[8], **SETTINGS), request(input_ids=IDS, stream=[True])]
    answer, refusal = model.execute(asked)
    expected = engine.generate(IDS, None, 8, sampler_of(engine)).sequences[:, 5:]
    assert outputs(answer)["tokens"].tolist() == expected.tolist()
    assert "stream=true needs `decoupled: true`" in refusal.error().message()
    assert not any(one.sender.responses for one in asked)


def test_a_defect_is_an_internal_error(model: Any, engine: Any, monkeypatch: Any) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(engine, "generate", broken)
    asked = request(input_ids=IDS)
    model.execute([asked])
    error = asked.sender.responses[0].error()
    assert error is not None and (error.code(), error.message()) == (TritonError.INTERNAL, "RuntimeError: no memory")
    assert asked.sender.closed


@pytest.mark.parametrize(("stream", "answers"), [(True, 1), (False, 0)])
def test_a_cancelled_request_stops_at_the_next_step(model: Any, stream: bool, answers: int) -> None:
    sampler = {**SETTINGS, "confidence_threshold": [1e-30]}  # single steps
    asked = request(cancelled_after=9, input_ids=IDS, max_new_tokens=[40], stream=[stream], **sampler)
    model.execute([asked])
    *before, last = asked.sender.responses  # asked once before the six steps of a canvas; the ninth is of the second
    assert [outputs(response)["tokens"].shape for response in before] == [(2, 4)] * answers
    error = last.error()
    assert error is not None and error.code() == TritonError.CANCELLED
    assert asked.sender.closed


def test_what_was_cancelled_while_it_waited_is_not_computed(model: Any, engine: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(engine, "generate", None)
    asked = request(cancelled_after=0, input_ids=IDS)
    model.execute([asked])
    error = asked.sender.responses[0].error()
    assert error is not None and error.code() == TritonError.CANCELLED


def test_a_bundle_that_cannot_be_opened_does_not_load(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path, provider: str, device: int) -> None:
        raise ConfigurationError("bundle lacks step.rank0.engine")

    with pytest.raises(triton_double.TritonModelException, match="bundle lacks step.rank0.engine"):
        load(bundle, monkeypatch, refused)


def test_a_backend_that_misreads_arrays_is_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # what pybind11 before 2.12 makes of NumPy 2's int64: stride 0
    misread = lambda name, tensor: triton_double.Tensor(name, np.zeros(3, dtype=np.int64))
    monkeypatch.setattr(triton_double.Tensor, "from_dlpack", misread)
    with pytest.raises(triton_double.TritonModelException, match=r"\[0, 1, 2\] came through as \[0, 0, 0\]; .*24\.11"):
        load(bundle, monkeypatch, lambda path, provider, device: None)


BACKEND = """
class TritonModelException(Exception): pass
def using_decoupled_model_transaction_policy(configuration): return True
"""
INITIALIZE = """
import json, sys
sys.path[:0] = sys.argv[1:3]
import model
parameters = {key: {"string_value": value} for key, value in json.loads(sys.argv[3]).items()}
try:
    arguments = {"model_config": json.dumps({"parameters": parameters}), "model_instance_device_id": "0"}
    model.TritonPythonModel().initialize(arguments)
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    ("code", "python_path", "message"),
    [
        ("", "", "No module named 'export', .* name the repository of nemo_diffgemma in the parameter code"),
        ("", "/elsewhere", "PYTHONPATH=/elsewhere is not read, .*; use Triton >= 24.11, or unset PYTHONPATH"),
        (str(ROOT), "", "No module named '[a-z]+', asked of the Python in .*; install it there, or start tritonserver"),
        (str(ROOT), str(ROOT), "No module named '[a-z]+', asked of"),  # not read, but found all the same
    ],
)
def test_what_triton_s_python_lacks_is_told(
    code: str, python_path: str, message: str, bundle: Path, tmp_path: Path
) -> None:
    """In a Python without packages, isolated as that of Triton before 24.11."""
    (tmp_path / "triton_python_backend_utils.py").write_text(BACKEND)
    model = bundle / "triton" / "diffusion_gemma" / "1"
    given = '{"code": "%s", "bundle": "../..", "provider": "onnxruntime"}' % code  # noqa: UP031
    command = [sys.executable, "-I", "-S", "-c", INITIALIZE, str(tmp_path), str(model), given]
    told = subprocess.run(command, env={**os.environ, "PYTHONPATH": python_path}, capture_output=True, text=True)
    with pytest.raises(AssertionError, match=f"^TritonModelException {message}"):
        raise AssertionError(told.stdout + told.stderr)


@pytest.mark.parametrize("builder", ["onnx", "tensorrt"])
def test_configuration_says_where_and_by_what_the_bundle_is_run(builder: str, tmp_path: Path) -> None:
    triton_repository.write(tmp_path, builder)
    text = (tmp_path / "triton" / "diffusion_gemma" / "config.pbtxt").read_text()
    assert f"kind: {'KIND_CPU' if builder == 'onnx' else 'KIND_GPU'}\n" in text
    given = {key: value["string_value"] for key, value in triton_double.parameters(tmp_path).items()}
    assert given == {"bundle": "../..", "provider": triton_repository.PROVIDERS[builder], "code": ""}


def test_every_request_setting_is_a_field_of_the_sampler() -> None:
    assert set(triton_request.SETTINGS) == set(vars(SamplerConfig())) - {"eos_token_id", "pad_token_id"}
