"""Requests to a bundle in Triton: one table of what may be in them, for config.pbtxt and for reading them.

The server itself compares types and shapes with config.pbtxt. What it does not know (which inputs go together, which
values mean something, names that nobody reads) is refused here or by the engine, before anything is computed.

Shapes: B rows, S prompt columns.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemo_diffgemma.diffusion.sampler_config import SamplerConfig
from nemo_diffgemma.errors import UserError
from nemo_diffgemma.tokenizer import Text

# fields of SamplerConfig that a request may set, with Triton's types
SETTINGS = {
    "max_denoising_steps": "TYPE_INT32",
    "entropy_bound": "TYPE_FP32",
    "t_min": "TYPE_FP32",
    "t_max": "TYPE_FP32",
    "stability_threshold": "TYPE_INT32",
    "confidence_threshold": "TYPE_FP32",
}
MOST_STEPS = (
    1024  # the noise of all steps of a canvas may be drawn at once: a request must not be able to fill the memory
)
# inputs, all optional -> Triton's type and dimensions, -1 for any
INPUTS = {
    "input_ids": ("TYPE_INT64", [-1, -1]),  # [B, S]; or prompt
    "attention_mask": ("TYPE_INT64", [-1, -1]),  # [B, S], zeros on the left
    "prompt": ("TYPE_STRING", [1]),
    "max_new_tokens": ("TYPE_INT32", [1]),
    "seed": ("TYPE_INT64", [1]),
    "stream": ("TYPE_BOOL", [1]),
    **{name: (kind, [1]) for name, kind in SETTINGS.items()},
}
NUMPY_TYPES = {
    "TYPE_INT32": np.int32,
    "TYPE_INT64": np.int64,
    "TYPE_FP32": np.float32,
    "TYPE_BOOL": np.bool_,
    "TYPE_STRING": np.object_,
}


class RequestError(UserError):
    """A request that means nothing; the message names the input and what it has to be."""


@dataclass(frozen=True)
class Request:
    """A batch to generate for: `input_ids` [B, S], left-padded where `attention_mask` [B, S] is given."""

    input_ids: Tensor
    attention_mask: Tensor | None
    max_new_tokens: int
    sampler: SamplerConfig
    seed: int
    stream: bool


def read_request(
    inputs: Mapping[str, np.ndarray], parameters: str, defaults: SamplerConfig, canvas_length: int, text: Text
) -> Request:
    """A request of `inputs` by name. `parameters` is Triton's JSON of all that was given besides; nothing may be.

    Left out are one canvas of new tokens, seed 0, no streaming, and the checkpoint's sampler settings `defaults`.
    Raises `UserError`.
    """
    _check_names(inputs, json.loads(parameters or "{}"))
    for name, array in inputs.items():
        _check_form(name, array)
    single = {name: array.item() for name, array in inputs.items() if INPUTS[name][1] == [1]}
    ids, mask = _prompt(inputs, text)
    settings = {name: value for name, value in single.items() if name in SETTINGS}
    if settings.get("max_denoising_steps", 0) > MOST_STEPS:
        raise RequestError(f"max_denoising_steps={settings['max_denoising_steps']}; expected at most {MOST_STEPS}")
    return Request(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=single.get("max_new_tokens", canvas_length),
        sampler=SamplerConfig.from_mapping({**vars(defaults), **settings}, "request: "),
        seed=single.get("seed", 0),
        stream=single.get("stream", False),
    )


def _check_names(inputs: Iterable[str], parameters: Iterable[str]) -> None:
    """`/generate` makes a parameter of every key that is no input: without this a misspelt one would change nothing."""
    misplaced = [name for name in parameters if name in INPUTS]
    if misplaced:
        raise RequestError(f"{', '.join(misplaced)} came as a parameter of the request; give it as an input")
    unknown = [name for name in (*inputs, *parameters) if name not in INPUTS]
    if unknown:
        raise RequestError(f"nothing here reads {', '.join(unknown)}; a request may hold {', '.join(INPUTS)}")


def _check_form(name: str, array: np.ndarray) -> None:
    kind, dims = INPUTS[name]
    if array.dtype != NUMPY_TYPES[kind]:
        raise RequestError(f"{name} is {array.dtype}; expected {kind}")
    if array.ndim != len(dims) or any(wanted not in (-1, size) for wanted, size in zip(dims, array.shape, strict=True)):
        expected = "[1]" if dims == [1] else "[rows, tokens]"
        raise RequestError(f"{name} has shape {list(array.shape)}; expected {expected}")


def _prompt(inputs: Mapping[str, np.ndarray], text: Text) -> tuple[Tensor, Tensor | None]:
    """Token ids [B, S] and the mask, None where every token counts. The engine checks the ids, the network the mask."""
    if ("input_ids" in inputs) == ("prompt" in inputs):
        raise RequestError("give one of input_ids [rows, tokens] and prompt [1], not both or none")
    mask = inputs.get("attention_mask")
    if "input_ids" in inputs:
        # copies: the arrays lie in memory that is the server's again once the request is answered
        return _tensor(inputs["input_ids"]), None if mask is None else _tensor(mask)
    if mask is not None:
        raise RequestError("attention_mask goes with input_ids; a prompt is one row without padding, so leave it out")
    if text.tokenizer is None:
        raise RequestError("this bundle has no tokenizer.json, so it cannot read a prompt; give input_ids")
    ids = text.encode(_decoded(inputs["prompt"].item()), chat=True)
    if not ids:
        raise RequestError("prompt='' has no tokens; give some text, or input_ids")
    return torch.tensor([ids]), None


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.copy())


def _decoded(prompt: Any) -> str:
    try:
        return prompt.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"prompt is not UTF-8 text ({error})") from None
