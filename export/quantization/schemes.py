"""Quantised experts: FP8, INT4 and NVFP4 matrices, the tensors that stand for them and the files that hold these.

Only the two expert matrices of a layer are quantised; router, norms, attention, dense MLP and head keep the dtype of
the engine. Every scheme replaces the input `<name>` [..., N, K] (used as `x @ W.T`, K the contraction axis; of the
sparse form one matrix for each expert, [E, N, K]):

    scheme  <name>          <name>.scale                  besides
    fp8     FLOAT8E4M3FN    engine dtype, []              <name>.input_scale, engine dtype, []
    int4    INT4            engine dtype, [..., N, K/64]  (activations stay as they are)
    nvfp4   FLOAT4E2M1      FLOAT8E4M3FN, [..., N, K/16]  <name>.global_scale, float32, []; a constant for activations

- fp8: one scale for all experts. TensorRT takes one for each row as well, but fuses only scalar by scalar into an FP8
  product (TensorRT-Model-Connect pull request 1386). Scales are in the dtype of the data, because a Cast between
  DequantizeLinear and MatMul is said to hinder that fusion (Model Optimizer, `export_onnx.py`).
- int4: blocks of 64, TensorRT's smaller one: it divides the expert width 704, so no block spans two experts.
- nvfp4: both levels are dequantised in float32 and then cast, as Model Optimizer's exporter has it: a float16 global
  scale would be subnormal. `TRT_FP4DynamicQuantize` wants its scale at build time, hence a constant of the graph.

NVIDIA Model Optimizer packs FP8 and NVFP4 and computes NVFP4's block scales. Its INT4QTensor doesn't serve: other bit
order (offset binary, high half first) than ONNX, scales that cannot be given in the dtype of the engine, and NaN for a
block of zeros; INT4 is rounded here. In memory 4-bit values lie two to a byte, low half first, as in ONNX.

    tensors = quantize_weight(name, matrix, "int4")         # what `<name>` is replaced by
    matrix = dequantize(name, tensors, "int4")
    model = qdq.quantize_graph(model, "int4")               # the same in a graph
"""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from onnx import TensorProto
from safetensors import safe_open
from torch import Tensor

from export.graph.weights import EXPERTS, Weight, engine_weights, stored_slice
from nemo_diffgemma.checkpoint.tensor_files import TensorFiles
from nemo_diffgemma.config import ModelConfig
from nemo_diffgemma.errors import UserError
from nemo_diffgemma.parallel.layout import ParallelLayout

SCHEMES = ("fp8", "int4", "nvfp4")
ALGORITHMS = {"fp8": "FP8", "int4": "W4A16_AWQ", "nvfp4": "NVFP4"}  # Model Optimizer's names; any INT4 in blocks is AWQ
QUANTIZE_ACTIVATIONS = ("fp8", "nvfp4")
BLOCK = {"int4": 64, "nvfp4": 16}  # along the contraction axis
FP8_MAX, INT4_MAX, FP4_MAX = 448.0, 7.0, 6.0  # INT4's -8 is never used: symmetric, as in Model Optimizer

_CHUNK = 1 << 22  # elements quantised at once
_FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
TORCH_DTYPES: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.FLOAT8E4M3FN: torch.float8_e4m3fn,
    TensorProto.INT4: torch.uint8,
    TensorProto.FLOAT4E2M1: torch.uint8,
}
_ONNX = {dtype: kind for kind, dtype in TORCH_DTYPES.items() if dtype != torch.uint8}
_SAFETENSORS = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.uint8: "U8",
}


class QuantizationError(UserError):
    """What cannot be quantised; the message says why and what to choose instead."""


class Packed(NamedTuple):
    """A tensor of a quantised matrix: ONNX type and shape, and as it lies in memory (4-bit values two to a byte)."""

    onnx_type: int
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.onnx_type]

    @property
    def stored(self) -> tuple[int, ...]:
        return self.shape if self.dtype != torch.uint8 else (*self.shape[:-1], self.shape[-1] // 2)


def is_quantized(name: str) -> bool:
    """Whether the schemes replace the weight input `name`."""
    return name.endswith(EXPERTS)


def check(
    scheme: str, config: ModelConfig, layout: ParallelLayout, experts: str, prompts: Sequence[Sequence[int]]
) -> None:
    """Raise `QuantizationError` where the experts of this model and layout cannot be quantised like this."""
    for name, weight in engine_weights(config, layout, experts).items():
        if is_quantized(name):
            packed_inputs(name, weight.shape, scheme, torch.float32)
    if scheme in QUANTIZE_ACTIVATIONS and not prompts:
        raise QuantizationError(
            f"quantization={scheme} needs the range of the activations: give a few typical prompts to calibrate with, "
            "or use quantization=int4, which quantises weights only"
        )
    if scheme != "int4":
        model_optimizer("qtensor")


def fits(scheme: str, config: ModelConfig, layout: ParallelLayout, experts: str) -> bool:
    """Whether blocks of the scheme divide the experts of this model and layout."""
    shapes = [w.shape for name, w in engine_weights(config, layout, experts).items() if is_quantized(name)]
    return all(shape[-1] % BLOCK.get(scheme, 1) == 0 for shape in shapes)


def packed_inputs(name: str, shape: Sequence[int], scheme: str, dtype: torch.dtype) -> dict[str, Packed]:
    """What `<name>` [..., N, K] of an engine in `dtype` is replaced by.

    Raises `QuantizationError` if no block divides K.
    """
    if scheme not in SCHEMES:
        raise QuantizationError(f"quantization={scheme!r}; use one of {', '.join(SCHEMES)}, or null for none")
    whole, block = tuple(shape), BLOCK.get(scheme, 1)
    if whole[-1] % block:
        raise QuantizationError(
            f"{name} {list(whole)} cannot be cut into {scheme} blocks of {block} along its last axis; use "
            "quantization=fp8, which has no blocks, experts=dense, where blocks may span experts, or a layout that "
            "leaves more columns to a rank"
        )
    own, blocks = _ONNX[dtype], (*whole[:-1], whole[-1] // block)
    if scheme == "fp8":
        return {
            name: Packed(TensorProto.FLOAT8E4M3FN, whole),
            f"{name}.scale": Packed(own, ()),
            f"{name}.input_scale": Packed(own, ()),
        }
    if scheme == "int4":
        return {name: Packed(TensorProto.INT4, whole), f"{name}.scale": Packed(own, blocks)}
    return {
        name: Packed(TensorProto.FLOAT4E2M1, whole),
        f"{name}.scale": Packed(TensorProto.FLOAT8E4M3FN, blocks),
        f"{name}.global_scale": Packed(TensorProto.FLOAT, ()),
        f"{name}.input_scale": Packed(TensorProto.FLOAT, ()),
    }


# -- weights -----------------------------------------------------------------------------------------------------------


def quantize_weight(name: str, tensor: Tensor, scheme: str, amax: float | None = None) -> dict[str, Tensor]:
    """The tensors of `packed_inputs` for matrices [..., N, K] in the dtype of the engine, a few rows at a time.

    `amax` is the largest absolute activation that the matrix meets (see `calibration`), for fp8 and nvfp4.
    """
    specs = packed_inputs(name, tensor.shape, scheme, tensor.dtype)
    made = {key: torch.empty(spec.stored, dtype=spec.dtype) for key, spec in specs.items()}
    chunks = tensor.flatten(0, -2).split(max(1, _CHUNK // tensor.shape[-1]))
    largest = float(torch.stack([chunk.abs().amax() for chunk in chunks]).amax())
    if not largest < float("inf"):
        raise QuantizationError(f"{name} holds {largest}; quantise a checkpoint whose weights are finite")
    if scheme == "fp8":
        made[f"{name}.scale"].copy_(_positive(largest / FP8_MAX, tensor.dtype))
    if scheme == "nvfp4":
        made[f"{name}.global_scale"].copy_(_positive(largest / (FP4_MAX * FP8_MAX), torch.float32))
    if scheme in QUANTIZE_ACTIVATIONS:
        made[f"{name}.input_scale"].copy_(input_scale(name, scheme, amax, tensor.dtype))
    packed = made[name].flatten(0, -2)
    scales = made[f"{name}.scale"].flatten(0, -2) if scheme in BLOCK else None  # views, filled below
    start = 0
    for chunk in chunks:
        rows = slice(start, start := start + chunk.shape[0])
        if scales is None:
            packed[rows] = _pack_fp8(chunk.float(), made[f"{name}.scale"].float())
        elif scheme == "int4":
            packed[rows], scales[rows] = _pack_int4(chunk)
        else:
            packed[rows], scales[rows] = _pack_nvfp4(chunk.float(), made[f"{name}.global_scale"])
    return made


def input_scale(name: str, scheme: str, amax: float | None, dtype: torch.dtype) -> Tensor:
    """Scale of the activations that reach `name`: one FP8 step, or one step of NVFP4's block scales."""
    if amax is None:
        raise QuantizationError(f"no activation range for {name}, which {scheme} needs; calibrate first")
    if scheme == "fp8":
        return _positive(amax / FP8_MAX, dtype)
    return _positive(amax / (FP4_MAX * FP8_MAX), torch.float32)


def dequantize(name: str, tensors: Mapping[str, Tensor], scheme: str) -> Tensor:
    """The matrices [..., N, K] that the quantised tensors stand for, float32."""
    packed, scale = tensors[name], tensors[f"{name}.scale"].float()
    if scheme == "fp8":
        return packed.float() * scale
    if scheme == "int4":
        halves = _unpack(packed)
        return _scaled((halves ^ 8).float() - 8, scale)  # two's complement of four bits
    return _dequantize_nvfp4(packed, scale, tensors[f"{name}.global_scale"])


def fake_quantize(x: Tensor, name: str, tensors: Mapping[str, Tensor], scheme: str) -> Tensor:
    """Activations [..., K] as the quantised product by `name` sees them, in their own dtype."""
    if scheme not in QUANTIZE_ACTIVATIONS:
        return x
    step = tensors[f"{name}.input_scale"].float()
    if scheme == "fp8":
        return ((x.float() / step).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float() * step).to(x.dtype)
    packed, scale = _pack_nvfp4(x.float().flatten(0, -2), step)
    return _dequantize_nvfp4(packed, scale.float(), step).view(x.shape).to(x.dtype)


def _positive(value: float | Tensor, dtype: torch.dtype) -> Tensor:
    """A scale that TensorRT takes: greater than zero, and a normal number."""
    return torch.as_tensor(value, dtype=dtype).clamp_min(torch.finfo(dtype).tiny)


def _pack_fp8(values: Tensor, scale: Tensor) -> Tensor:
    return model_optimizer("qtensor").FP8QTensor.quantize(values, scales=scale)[0]._quantized_data


def _pack_int4(values: Tensor) -> tuple[Tensor, Tensor]:
    blocks = values.unflatten(-1, (-1, BLOCK["int4"]))
    scale = _positive(blocks.abs().amax(-1).float() / INT4_MAX, values.dtype)
    steps = (blocks.float() / scale.float()[..., None]).round().clamp(-INT4_MAX, INT4_MAX)
    halves = (steps.to(torch.int8).flatten(-2) & 15).to(torch.uint8)
    return halves[:, ::2] | halves[:, 1::2] << 4, scale


def _pack_nvfp4(values: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    made, scale, _ = model_optimizer("qtensor").NVFP4QTensor.quantize(
        values, BLOCK["nvfp4"], weights_scaling_factor_2=global_scale
    )
    return made._quantized_data, scale


def _dequantize_nvfp4(packed: Tensor, scale: Tensor, global_scale: Tensor) -> Tensor:
    halves = _unpack(packed)
    values = torch.tensor(_FP4_VALUES)[(halves & 7).long()] * (1 - 2 * (halves >> 3).float())
    return _scaled(values, scale * global_scale)


def _unpack(packed: Tensor) -> Tensor:
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def _scaled(values: Tensor, scale: Tensor) -> Tensor:
    """[..., K] times one scale a block, [..., blocks]."""
    return (values.unflatten(-1, (scale.shape[-1], -1)) * scale[..., None]).flatten(-2)


def model_optimizer(module: str) -> Any:
    """A module of Model Optimizer's quantisation, imported when it is needed (seconds). Raises `QuantizationError`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tells which extras it was not tested with
            return importlib.import_module(f"modelopt.torch.quantization.{module}")
    except ImportError as error:
        raise QuantizationError(
            f"fp8 and nvfp4 need NVIDIA Model Optimizer ({error}); pip install nvidia-modelopt, or use int4"
        ) from None


# -- files -------------------------------------------------------------------------------------------------------------


def write_quantized(
    file: Path,
    checkpoint: Path,
    weights: Mapping[str, Weight],
    rank: int,
    scheme: str,
    dtype: torch.dtype,
    amax: Mapping[str, float],
) -> None:
    """The quantised matrices of a rank as a safetensors file, one matrix in memory at a time."""
    chosen = {name: weight for name, weight in weights.items() if is_quantized(name)}
    header: dict[str, Any] = {"__metadata__": {"scheme": scheme}}
    end = 0
    for name, weight in chosen.items():
        for key, spec in packed_inputs(name, weight.shape, scheme, dtype).items():
            start, end = end, end + prod(spec.stored) * spec.dtype.itemsize
            header[key] = {"dtype": _SAFETENSORS[spec.dtype], "shape": spec.stored, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with TensorFiles(checkpoint) as files, file.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, weight in chosen.items():
            matrix = weight.of_rank(stored_slice(files, weight), rank).to(dtype)
            for tensor in quantize_weight(name, matrix, scheme, amax.get(name)).values():
                stream.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def load_quantized(file: Path, scheme: str) -> Iterator[tuple[str, Tensor]]:
    """What `write_quantized` wrote, tensor by tensor. Raises `QuantizationError` for a file of another scheme."""
    with safe_open(str(file), framework="pt") as stored:
        written = (stored.metadata() or {}).get("scheme")
        if written != scheme:
            raise QuantizationError(
                f"{file} holds {written} weights, but {scheme} was asked for; build the bundle again"
            )
        for name in stored.keys():  # noqa: SIM118 (no mapping)
            yield name, stored.get_tensor(name)


def hf_quant_config(scheme: str) -> dict[str, Any]:
    """`hf_quant_config.json` in Model Optimizer's form."""
    plain = {"has_zero_point": False, "pre_quant_scale": False} if scheme == "int4" else {}
    producer, package = ("nemo_diffgemma", "nemo_diffgemma") if scheme == "int4" else ("modelopt", "nvidia-modelopt")
    block = {"group_size": BLOCK[scheme]} if scheme in BLOCK else {}
    return {
        "producer": {"name": producer, "version": metadata.version(package)},
        "quantization": {
            "quant_algo": ALGORITHMS[scheme],
            **plain,
            **block,
            "kv_cache_quant_algo": None,
            "exclude_modules": [
                "lm_head",
                "model.decoder.embed_tokens",
                "model.decoder.layers.*.mlp*",
                "model.decoder.layers.*.router*",
                "model.decoder.layers.*.self_attn*",
                "model.decoder.self_conditioning*",
                "model.encoder*",
            ],
        },
    }
