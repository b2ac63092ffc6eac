"""Serves a bundle in Triton's Python backend; `export/bundle/triton_repository.py` writes it there as model.py.

A request is one batch: `input_ids` [B, S], left-padded with `attention_mask` [B, S], or the text `prompt` [1]. It may
hold `max_new_tokens` (256), `seed` (0), `stream` (true) and the sampler's settings, each [1]. Each response holds
`tokens` [B, new] and `text` [B] (empty without a tokenizer) of one finished canvas; the last also `forwards` and
`tokens_per_forward` [B]. With `stream` false there is one response, and fixed-step requests (`confidence_threshold` 0)
run the whole loop in one call.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """The class that the backend looks for."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the bundle. Raises `TritonModelException`, for which Triton does not load the model."""
        configuration = json.loads(args["model_config"])
        parameters = {key: value["string_value"] for key, value in configuration["parameters"].items()}
        if parameters["code"]:
            sys.path.insert(0, parameters["code"])
        try:
            from export import open_bundle
            from nemo_diffgemma.errors import UserError
            from nemo_diffgemma.tokenizer import Text
        except ImportError as error:
            raise pb_utils.TritonModelException(
                f"{error}; set PYTHONPATH, or the parameter code in config.pbtxt, to the repository of nemo_diffgemma"
            ) from None
        bundle = (Path(__file__).resolve().parents[1] / parameters["bundle"]).resolve()
        device = int(args["model_instance_device_id"])
        try:
            self.engine: Any = open_bundle(bundle, provider=parameters["provider"], device=device)
            self.text = Text(self.engine.assets)
        except UserError as error:
            raise pb_utils.TritonModelException(str(error)) from None

    def execute(self, requests: list[Any]) -> None:
        """Answer requests one after the other, each through its own sender."""
        from nemo_diffgemma.errors import UserError  # on the path since `initialize`

        for request in requests:
            sender = request.get_response_sender()
            try:
                response = self._serve(request, sender)
            except _Cancelled:
                response = _failure("the client has cancelled the request", pb_utils.TritonError.CANCELLED)
            except UserError as error:
                response = _failure(str(error), pb_utils.TritonError.INVALID_ARG)
            except Exception as error:
                pb_utils.Logger.log_error(traceback.format_exc())
                response = _failure(f"{type(error).__name__}: {error}", pb_utils.TritonError.INTERNAL)
            sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def finalize(self) -> None:
        """Give the engine's memory back."""
        del self.engine

    def _serve(self, request: Any, sender: Any) -> Any:
        """Send all canvases but the last -> the last response."""
        prompt, mask = self._prompt(request)
        sampler = self._sampler(request)
        stream = _Stream(sampler, lambda tokens: sender.send(self._answer(tokens)), sender.is_cancelled)
        generation = self.engine.generate(
            prompt,
            attention_mask=mask,
            max_new_tokens=_one(request, "max_new_tokens", 256),
            sampler=sampler,
            seed=_one(request, "seed", 0),
            observe=stream if _one(request, "stream", True) else None,
        )
        rest = generation.sequences[:, prompt.shape[1] + stream.sent :]
        return self._answer(
            rest, forwards=generation.forwards.long(), tokens_per_forward=generation.tokens_per_forward.float()
        )

    def _prompt(self, request: Any) -> tuple[Any, Any]:
        """Token ids [B, S] and the mask, None where every token counts."""
        from nemo_diffgemma.errors import UserError

        ids, mask, prompt = (_array(request, name) for name in ("input_ids", "attention_mask", "prompt"))
        if (ids is None) == (prompt is None):
            raise UserError("give one of input_ids [B, S] and prompt [1], not both or none")
        if prompt is not None:
            return torch.tensor([self.text.encode(prompt.reshape(-1)[0].decode(), chat=True)]), None
        return torch.from_numpy(ids.copy()), None if mask is None else torch.from_numpy(mask.copy())

    def _sampler(self, request: Any) -> Any:
        """The checkpoint's settings with those of the request."""
        from export.bundle.triton_repository import SETTINGS

        return self.engine.sampler_defaults.with_overrides({name: _one(request, name, None) for name in SETTINGS})

    def _answer(self, tokens: Any, **statistics: Any) -> Any:
        import numpy as np

        text = [(self.text.decode(row) or "").encode() for row in tokens.tolist()]
        tensors = [
            pb_utils.Tensor("tokens", tokens.cpu().contiguous().numpy()),
            pb_utils.Tensor("text", np.array(text, dtype=np.object_)),
            *(pb_utils.Tensor(name, value.cpu().numpy()) for name, value in statistics.items()),
        ]
        return pb_utils.InferenceResponse(output_tensors=tensors)


class _Cancelled(Exception):
    """The client no longer wants the answer."""


class _Stream:
    """Observer of generation: emits every canvas once the next has begun, padded as `generate` pads it."""

    def __init__(self, sampler: Any, emit: Any, is_cancelled: Any) -> None:
        self.sent = 0  # columns
        self._sampler, self._emit, self._is_cancelled = sampler, emit, is_cancelled
        self._last: Any = None
        self._finished_B: Any = None

    def __call__(self, denoised: Any) -> None:
        if self._is_cancelled():
            raise _Cancelled
        if self._last is not None and denoised.canvas > self._last.canvas:
            tokens = self._padded(self._last.argmax)
            self._emit(tokens)
            self.sent += tokens.shape[1]
        self._last = denoised

    def _padded(self, argmax_BC: Any) -> Any:
        from nemo_diffgemma.diffusion.sampler import pad_after_eos

        eos, pad = self._sampler.eos_ids, self._sampler.pad_token_id
        if not eos or pad is None:
            return argmax_BC
        before_B = torch.zeros_like(argmax_BC[:, 0], dtype=torch.bool) if self._finished_B is None else self._finished_B
        self._finished_B = before_B | torch.isin(argmax_BC, torch.tensor(eos, device=argmax_BC.device)).any(-1)
        return pad_after_eos(argmax_BC, eos, pad).masked_fill(before_B[:, None], pad)


def _array(request: Any, name: str) -> Any:
    """An input as a NumPy array, or None."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy()


def _one(request: Any, name: str, default: Any) -> Any:
    """The only entry of an input, as a Python number."""
    array = _array(request, name)
    if array is None:
        return default
    if array.size != 1:
        from nemo_diffgemma.errors import UserError

        raise UserError(f"{name} has shape {list(array.shape)}; expected [1]")
    return array.reshape(-1)[0].item()


def _failure(message: str, code: Any) -> Any:
    return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(message, code))
