"""Triton's model.py answers as the engine does. Triton itself is not run: its module is the double below.

The double has the signatures of the Python backend's bindings (`src/pb_stub.cc` and the README of
triton-inference-server/python_backend, 23.10 and later), and refuses what they refuse.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from export.bundle import triton_repository
from nemo_diffgemma import SamplerConfig
from nemo_diffgemma.data import build_tokenizer
from nemo_diffgemma.schema import ConfigurationError
from tests.export import kit

pytestmark = pytest.mark.usefixtures("single")

FINAL = 1


class Tensor:
    def __init__(self, name: str, numpy_array: np.ndarray) -> None:
        assert numpy_array.dtype in (np.int32, np.int64, np.float32, bool, np.object_), (
            "no type that the backend carries"
        )
        assert numpy_array.flags.c_contiguous
        self._name, self._array = name, numpy_array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array


class TritonError:
    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS, CANCELLED = range(8)

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> int:
        return self._code


class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor], error: TritonError | None = None) -> None:
        self._tensors, self._error = output_tensors, error

    def output_tensors(self) -> list[Tensor]:
        return self._tensors

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error


class InferenceResponseSender:
    def __init__(self, cancelled_after: int | None) -> None:
        self.responses: list[InferenceResponse] = []
        self.closed, self._asked, self._cancelled_after = False, 0, cancelled_after

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        assert not self.closed, "the final flag was sent already"
        assert response is not None or flags == FINAL
        self.closed = flags == FINAL
        if response is not None:
            self.responses.append(response)

    def is_cancelled(self) -> bool:
        self._asked += 1
        return self._cancelled_after is not None and self._asked > self._cancelled_after


class InferenceRequest:
    def __init__(self, inputs: list[Tensor], cancelled_after: int | None = None) -> None:
        self._inputs, self.sender = inputs, InferenceResponseSender(cancelled_after)

    def inputs(self) -> list[Tensor]:
        return self._inputs

    def get_response_sender(self) -> InferenceResponseSender:
        return self.sender


class Logger:
    @staticmethod
    def log_error(message: str) -> None:
        print(message, file=sys.stderr)


class TritonModelException(Exception):
    pass


def backend() -> ModuleType:
    """The double of `triton_python_backend_utils`."""
    module = ModuleType("triton_python_backend_utils")
    for thing in (Tensor, TritonError, InferenceResponse, InferenceRequest, Logger, TritonModelException):
        setattr(module, thing.__name__, thing)
    module.TRITONSERVER_RESPONSE_COMPLETE_FINAL = FINAL  # type: ignore[attr-defined]
    module.get_input_tensor_by_name = lambda request, name: next(  # type: ignore[attr-defined]
        (tensor for tensor in request.inputs() if tensor.name() == name), None
    )
    return module


TYPES = {"TYPE_INT32": np.int32, "TYPE_INT64": np.int64, "TYPE_FP32": np.float32, "TYPE_BOOL": bool}


def configuration(directory: Path) -> Any:
    """config.pbtxt as Triton reads it."""
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="pip install tritonclient[grpc]")
    from google.protobuf import text_format

    text = (directory / "triton" / "diffusion_gemma" / "config.pbtxt").read_text()
    return text_format.Parse(text, schema.ModelConfig())


def parameters(directory: Path) -> dict[str, Any]:
    """The parameters of config.pbtxt, in the JSON form in which a model gets them."""
    lines = [line.strip() for line in (directory / "triton/diffusion_gemma/config.pbtxt").read_text().splitlines()]
    keys = [line.partition('"')[2][:-1] for line in lines if line.startswith("key:")]
    values = [line.partition('"')[2][:-1] for line in lines if line.startswith("string_value:")]
    return {key: {"string_value": value} for key, value in zip(keys, values, strict=True)}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bundle")
    triton_repository.write(directory, "onnx")
    return directory


def load(bundle: Path, monkeypatch: pytest.MonkeyPatch, open_bundle: Any) -> Any:
    """The written model.py, initialised as the backend does it; `open_bundle` takes the place of the real one."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend())
    monkeypatch.setattr("export.bundle.opening.open_bundle", open_bundle)
    file = bundle / "triton" / "diffusion_gemma" / "1" / "model.py"
    spec = importlib.util.spec_from_file_location("triton_model_under_test", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    arguments = dict(model_repository=str(file.parents[1]), model_version="1", model_name="diffusion_gemma")
    arguments |= dict(model_instance_kind="CPU", model_instance_device_id="0", model_instance_name="diffusion_gemma_0")
    model.initialize({**arguments, "model_config": json.dumps({"parameters": parameters(bundle)})})
    return model


@pytest.fixture
def engine(checkpoint: Any) -> Any:
    return kit.engine(kit.calm(checkpoint), loop=6)


@pytest.fixture
def model(bundle: Path, engine: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    def open_bundle(path: Path, provider: str, device: int) -> Any:
        assert (path, provider, device) == (bundle, "onnxruntime", 0)
        return engine

    return load(bundle, monkeypatch, open_bundle)


IDS = torch.tensor([[0, 0, 7, 9, 11], [3, 5, 8, 13, 21]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
SAMPLER = SamplerConfig(max_denoising_steps=6, entropy_bound=5.0, confidence_threshold=0.0)


def request(cancelled_after: int | None = None, **inputs: Any) -> InferenceRequest:
    """A request with these inputs, in the types that config.pbtxt names."""
    tensors = []
    for name, value in inputs.items():
        kind = triton_repository._INPUTS[name][0]
        array = (
            np.array([value.encode()], dtype=np.object_)
            if kind == "TYPE_STRING"
            else torch.as_tensor(value).numpy().astype(TYPES[kind])
        )
        tensors.append(Tensor(name, array))
    return InferenceRequest(tensors, cancelled_after)


def settings(sampler: SamplerConfig) -> dict[str, Any]:
    return {name: [getattr(sampler, name)] for name in triton_repository.SETTINGS}


def sampler_of(engine: Any) -> SamplerConfig:
    """The checkpoint's settings (EOS and padding) with those that requests here set."""
    return replace(engine.sampler_defaults, **{name: value[0] for name, value in settings(SAMPLER).items()})


def outputs(response: InferenceResponse) -> dict[str, np.ndarray]:
    assert not response.has_error(), response.error().message()  # type: ignore[union-attr]
    return {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}


def test_every_canvas_is_one_response_and_together_they_are_what_generate_returns(model: Any, engine: Any) -> None:
    asked = request(input_ids=IDS, attention_mask=MASK, max_new_tokens=[12], seed=[5], **settings(SAMPLER))
    model.execute([asked])
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
    asked = request(input_ids=IDS, attention_mask=MASK, max_new_tokens=[12], seed=[5])
    model.execute([asked])
    expected = engine.generate(IDS, MASK, 12, sampler, seed=5).sequences[:, 5:]
    tokens = np.concatenate([outputs(response)["tokens"] for response in asked.sender.responses], axis=1)
    assert tokens.tolist() == expected.tolist()
    assert tokens[0, 4:].tolist() == [63] * 8
    assert len(asked.sender.responses) == 3


def test_without_streaming_one_response_comes_from_the_loop(model: Any, engine: Any, monkeypatch: Any) -> None:
    expected = engine.generate(IDS, None, 8, sampler_of(engine), seed=2).sequences[:, 5:]
    monkeypatch.setattr(engine, "step", None)  # nobody may run single steps
    asked = request(input_ids=IDS, max_new_tokens=[8], seed=[2], stream=[False], **settings(SAMPLER))
    model.execute([asked])
    (answer,) = [outputs(response) for response in asked.sender.responses]
    assert answer["tokens"].tolist() == expected.tolist()


def test_text_goes_in_and_comes_out(bundle: Path, engine: Any, monkeypatch: Any, tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(engine, "assets", tmp_path)
    model = load(bundle, monkeypatch, lambda path, provider, device: engine)
    sampler = settings(SAMPLER)
    asked = request(prompt="1..4 ..3. 2... ...1", max_new_tokens=[4], stream=[False], **sampler)
    model.execute([asked])
    answer = outputs(asked.sender.responses[0])
    ids = torch.tensor([tokenizer("1..4 ..3. 2... ...1").input_ids])
    expected = engine.generate(ids, None, 4, sampler_of(engine), seed=0).sequences[0, ids.shape[1] :]
    assert answer["tokens"][0].tolist() == expected.tolist()
    assert answer["text"].tolist() == [str(tokenizer.decode(expected, skip_special_tokens=True)).encode()]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (dict(), "give one of input_ids"),
        (dict(input_ids=IDS, prompt="x"), "give one of input_ids"),
        (dict(prompt="1..4"), "has no tokenizer.json"),
        (dict(input_ids=IDS, seed=[1, 2]), r"seed has shape \[2\]; expected \[1\]"),
        (dict(input_ids=IDS, max_denoising_steps=[0]), "max_denoising_steps=0; expected at least 1"),
        (dict(input_ids=IDS.repeat(5, 1)), "10"),  # more rows than the engine takes
    ],
)
def test_a_wrong_request_is_answered_and_the_next_one_served(model: Any, inputs: Any, message: str) -> None:
    wrong, right = request(**inputs), request(input_ids=IDS, max_new_tokens=[4], **settings(SAMPLER))
    model.execute([wrong, right])
    (response,) = wrong.sender.responses
    error = response.error()
    assert error is not None and wrong.sender.closed
    assert error.code() == TritonError.INVALID_ARG
    with pytest.raises(ValueError, match=message):
        raise ValueError(error.message())
    assert outputs(right.sender.responses[-1])["tokens"].shape == (2, 4)


def test_a_defect_is_an_internal_error(model: Any, engine: Any, monkeypatch: Any) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(engine, "generate", broken)
    asked = request(input_ids=IDS)
    model.execute([asked])
    error = asked.sender.responses[0].error()
    assert error is not None and (error.code(), error.message()) == (TritonError.INTERNAL, "RuntimeError: no memory")
    assert asked.sender.closed


def test_a_cancelled_request_stops_at_the_next_step(model: Any) -> None:
    asked = request(cancelled_after=8, input_ids=IDS, max_new_tokens=[40], **settings(SAMPLER))
    model.execute([asked])
    first, last = asked.sender.responses  # six steps are a canvas, the eighth belongs to the second
    assert outputs(first)["tokens"].shape == (2, 4)
    error = last.error()
    assert error is not None and error.code() == TritonError.CANCELLED
    assert asked.sender.closed


def test_a_bundle_that_cannot_be_opened_does_not_load(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path, provider: str, device: int) -> None:
        raise ConfigurationError("bundle lacks step.rank0.engine")

    with pytest.raises(TritonModelException, match="bundle lacks step.rank0.engine"):
        load(bundle, monkeypatch, refused)


@pytest.mark.parametrize("builder", ["onnx", "tensorrt"])
def test_configuration_is_one_that_triton_reads(builder: str, tmp_path: Path) -> None:
    triton_repository.write(tmp_path, builder)
    read = configuration(tmp_path)
    assert (read.name, read.backend, read.max_batch_size) == ("diffusion_gemma", "python", 0)
    assert read.model_transaction_policy.decoupled
    assert [tensor.name for tensor in read.output] == ["tokens", "text", "forwards", "tokens_per_forward"]
    assert {tensor.name: list(tensor.dims) for tensor in read.input}["input_ids"] == [-1, -1]
    assert all(tensor.optional for tensor in read.input)
    group = type(read.instance_group[0])
    assert read.instance_group[0].kind == (group.KIND_CPU if builder == "onnx" else group.KIND_GPU)
    given = {key: value.string_value for key, value in read.parameters.items()}
    assert given == {key: value["string_value"] for key, value in parameters(tmp_path).items()}
    assert given["provider"] == triton_repository.PROVIDERS[builder]


def test_every_request_setting_is_a_field_of_the_sampler() -> None:
    assert set(triton_repository.SETTINGS) == set(vars(SamplerConfig())) - {"eos_token_id", "pad_token_id"}
