"""A double of `triton_python_backend_utils`, and model.py loaded with it.

It has the signatures of the Python backend's bindings (`src/pb_stub.cc` and the README of
triton-inference-server/python_backend, 23.10 and later), and refuses what they refuse. `test_triton_server.py` runs the
real server.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from export.bundle import triton_request

FINAL = 1


class Tensor:
    """As the backend makes it of a NumPy array; `from_dlpack` of any other library's."""

    def __init__(self, name: str, numpy_array: np.ndarray) -> None:
        assert numpy_array.dtype in (np.int32, np.int64, np.float32, bool, np.object_), (
            "no type that the backend carries"
        )
        assert numpy_array.flags.c_contiguous
        self._name, self._array = name, numpy_array

    @staticmethod
    def from_dlpack(name: str, tensor: Any) -> Tensor:
        return Tensor(name, np.from_dlpack(tensor))

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
    def __init__(
        self, inputs: list[Tensor], cancelled_after: int | None = None, parameters: dict[str, Any] | None = None
    ) -> None:
        self._inputs, self.sender = inputs, InferenceResponseSender(cancelled_after)
        self._parameters = json.dumps(parameters) if parameters else ""

    def inputs(self) -> list[Tensor]:
        return self._inputs

    def parameters(self) -> str:
        return self._parameters

    def is_cancelled(self) -> bool:
        return self.sender.is_cancelled()

    def get_response_sender(self) -> InferenceResponseSender:
        return self.sender


class Logger:
    @staticmethod
    def log_info(message: str) -> None:
        print(message, file=sys.stderr)

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
    module.using_decoupled_model_transaction_policy = (  # type: ignore[attr-defined]
        lambda configuration: configuration["model_transaction_policy"]["decoupled"]
    )
    return module


def parameters(directory: Path) -> dict[str, Any]:
    """The parameters of config.pbtxt, in the JSON form in which a model gets them."""
    lines = [line.strip() for line in (directory / "triton/diffusion_gemma/config.pbtxt").read_text().splitlines()]
    keys = [line.partition('"')[2][:-1] for line in lines if line.startswith("key:")]
    values = [line.partition('"')[2][:-1] for line in lines if line.startswith("string_value:")]
    return {key: {"string_value": value} for key, value in zip(keys, values, strict=True)}


def load(bundle: Path, monkeypatch: pytest.MonkeyPatch, open_bundle: Any, decoupled: bool = True) -> Any:
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
    configuration = {"parameters": parameters(bundle), "model_transaction_policy": {"decoupled": decoupled}}
    model.initialize({**arguments, "model_config": json.dumps(configuration)})
    return model


def request(
    cancelled_after: int | None = None, parameters: dict[str, Any] | None = None, **inputs: Any
) -> InferenceRequest:
    """A request with these inputs, in the types that config.pbtxt names; NumPy arrays stay as they are."""
    tensors = []
    for name, value in inputs.items():
        kind = triton_request.INPUTS[name][0]
        if isinstance(value, str):
            value = np.array([value.encode()], dtype=np.object_)
        elif not isinstance(value, np.ndarray):
            value = torch.as_tensor(value).numpy().astype(triton_request.NUMPY_TYPES[kind])
        tensors.append(Tensor(name, value))
    return InferenceRequest(tensors, cancelled_after, parameters)


def outputs(response: InferenceResponse) -> dict[str, np.ndarray]:
    assert not response.has_error(), response.error().message()  # type: ignore[union-attr]
    return {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
