"""Serves a bundle in Triton's Python backend; `export/bundle/triton_repository.py` writes it there as model.py.

A request is one batch: `input_ids` [B, S], left-padded with `attention_mask` [B, S], or the text `prompt` [1]. It may
hold `max_new_tokens` (one canvas), `seed` (0), `stream` (false) and the sampler's settings, each [1]; `triton_request`
reads it. A response holds `tokens` [B, new], `text` [B] (empty without a tokenizer), `forwards` and
`tokens_per_forward` [B]. With `stream` every finished canvas is a response of its own, and the last has the statistics.

Only Triton's module is imported at once: what is missing is told by `initialize`, in words.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """The class that the backend looks for."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the bundle. Raises `TritonModelException`, for which Triton does not load the model."""
        configuration = json.loads(args["model_config"])
        parameters = {key: value["string_value"] for key, value in configuration["parameters"].items()}
        self.streams = pb_utils.using_decoupled_model_transaction_policy(configuration)
        if parameters["code"]:
            sys.path.insert(0, parameters["code"])
        _check_path()
        open_bundle, text_of = _imported()
        _check_arrays()
        from nemo_diffgemma.errors import UserError

        bundle = (Path(__file__).resolve().parents[1] / parameters["bundle"]).resolve()
        device = int(args["model_instance_device_id"])
        threading.Thread(target=_end_with_server, args=[os.getppid()], daemon=True).start()
        try:
            self.engine: Any = open_bundle(bundle, provider=parameters["provider"], device=device)
            self.text: Any = text_of(self.engine.assets)
        except UserError as error:
            raise pb_utils.TritonModelException(str(error)) from None

    def execute(self, requests: Sequence[Any]) -> list[Any] | None:
        """Answer requests one after the other: each through its own sender, or all as a list where not decoupled.

        It returns when all are answered, so `finalize` is never called with one in flight.
        """
        if not self.streams:
            return [self._answer(request, request.is_cancelled, None) for request in requests]
        for request in requests:
            sender = request.get_response_sender()
            last = self._answer(request, sender.is_cancelled, sender.send)
            sender.send(last, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        return None

    def finalize(self) -> None:
        """Give the engine's memory back."""
        self.engine = self.text = None

    def _answer(self, request: Any, is_cancelled: Callable[[], bool], send: Callable[[Any], None] | None) -> Any:
        """Send all canvases but the last -> the last response, or the error that ended the request."""
        from nemo_diffgemma.errors import UserError  # on the path since `initialize`

        try:
            return self._generate(request, is_cancelled, send)
        except _Cancelled:
            pb_utils.Logger.log_info("a cancelled request was ended")
            return _failure("the client has cancelled the request", pb_utils.TritonError.CANCELLED)
        except UserError as error:
            return _failure(str(error), pb_utils.TritonError.INVALID_ARG)
        except Exception as error:
            pb_utils.Logger.log_error(traceback.format_exc())
            return _failure(f"{type(error).__name__}: {error}", pb_utils.TritonError.INTERNAL)

    def _generate(self, request: Any, is_cancelled: Callable[[], bool], send: Callable[[Any], None] | None) -> Any:
        from export.bundle.triton_request import RequestError, read_request

        if is_cancelled():  # while it waited for others
            raise _Cancelled
        asked = read_request(
            {tensor.name(): tensor.as_numpy() for tensor in request.inputs()},
            request.parameters(),
            self.engine.sampler_defaults,
            self.engine.model_config.canvas_length,
            self.text,
        )
        if asked.stream and send is None:
            raise RequestError("stream=true needs `decoupled: true` in the model's config.pbtxt; leave stream out")
        emit = (lambda tokens: send(self._response(tokens))) if asked.stream and send is not None else None
        progress = _Progress(asked.sampler, emit, is_cancelled)
        # nobody looks on where all steps of a canvas may be one call: see `Engine.generate`
        watched = emit is not None or asked.sampler.confidence_threshold > 0
        generation = self.engine.generate(
            asked.input_ids,
            attention_mask=asked.attention_mask,
            max_new_tokens=asked.max_new_tokens,
            sampler=asked.sampler,
            seed=asked.seed,
            observe=progress if watched else None,
        )
        rest = generation.sequences[:, asked.input_ids.shape[1] + progress.sent :]
        return self._response(
            rest, forwards=generation.forwards.long(), tokens_per_forward=generation.tokens_per_forward.float()
        )

    def _response(self, tokens: Any, **statistics: Any) -> Any:
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


class _Progress:
    """Observer of generation: ends what was cancelled, and emits every canvas once the next has begun.

    A canvas is padded as `generate` pads it. `emit` None emits nothing; `sent` counts emitted columns.
    """

    def __init__(self, sampler: Any, emit: Callable[[Any], None] | None, is_cancelled: Callable[[], bool]) -> None:
        self.sent = 0
        self._sampler, self._emit, self._is_cancelled = sampler, emit, is_cancelled
        self._last: Any = None
        self._finished_B: Any = None

    def __call__(self, denoised: Any) -> None:
        if self._is_cancelled():
            raise _Cancelled
        if self._emit is None:
            return
        if self._last is not None and denoised.canvas > self._last.canvas:
            tokens = self._padded(self._last.argmax)
            self._emit(tokens)
            self.sent += tokens.shape[1]
        self._last = denoised

    def _padded(self, argmax_BC: Any) -> Any:
        import torch

        from nemo_diffgemma.diffusion.sampler import pad_after_eos

        eos, pad = self._sampler.eos_ids, self._sampler.pad_token_id
        if not eos or pad is None:
            return argmax_BC
        before_B = torch.zeros_like(argmax_BC[:, 0], dtype=torch.bool) if self._finished_B is None else self._finished_B
        self._finished_B = before_B | torch.isin(argmax_BC, torch.tensor(eos, device=argmax_BC.device)).any(-1)
        return pad_after_eos(argmax_BC, eos, pad).masked_fill(before_B[:, None], pad)


def _end_with_server(server: int) -> None:
    """End this process when the server, its parent, has been killed or has crashed, so that no GPU memory stays taken.

    The backend's own watch can wait for ever (seen with 24.10): for a message of the server, if a request is in flight.
    """
    while os.getppid() == server:
        time.sleep(1)
    os._exit(1)


def _check_path() -> None:
    """Refuse where PYTHONPATH is set and not read: another copy of the code, or none, would be imported."""
    wanted = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    known = {os.path.abspath(entry) for entry in sys.path}
    if sys.flags.isolated and any(os.path.abspath(entry) not in known for entry in wanted):
        raise pb_utils.TritonModelException(
            f"PYTHONPATH={os.environ['PYTHONPATH']} is not read, since the Python of this Triton is isolated; use "
            "Triton >= 24.11, or unset PYTHONPATH and name the repository of nemo_diffgemma in the parameter code of "
            "config.pbtxt"
        )


def _imported() -> tuple[Any, Any]:
    """`open_bundle` and the class of the tokenizer; the message says where Triton's Python has looked."""
    try:
        from export import open_bundle
        from export.bundle import opening, triton_request  # noqa: F401  (with all that they import)
        from nemo_diffgemma.tokenizer import Text
    except ImportError as error:
        ours = (error.name or "").partition(".")[0] in ("export", "nemo_diffgemma")
        remedy = (
            "name the repository of nemo_diffgemma in the parameter code of config.pbtxt or in PYTHONPATH"
            if ours
            else "install it there, or start tritonserver with the bin folder of the environment of nemo_diffgemma "
            "(`make venv`) first on PATH"
        )
        raise pb_utils.TritonModelException(f"{error}, asked of the Python in {sys.prefix}; {remedy}") from None
    return open_bundle, Text


def _check_arrays() -> None:
    """Refuse where the backend misreads NumPy's arrays: integers would arrive as zeros, and text end the process.

    The fault shows in arrays that the backend makes itself, as it does for inputs: their strides are not int64's.
    """
    import numpy as np
    import torch

    given = torch.arange(3)
    try:
        found = pb_utils.Tensor.from_dlpack("probe", given).as_numpy().tolist()
    except Exception as error:
        found = repr(error)
    if found != given.tolist():
        raise pb_utils.TritonModelException(
            f"the Python backend of this Triton misreads NumPy {np.__version__}: the integers {given.tolist()} came "
            f"through as {found}; use Triton >= 24.11, or give older ones NumPy 1.26, as export/README.md shows"
        )


def _failure(message: str, code: Any) -> Any:
    return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(message, code))
