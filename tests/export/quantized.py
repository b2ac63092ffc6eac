"""A tiny model whose experts can be cut into blocks, its weights quantised, and its graphs: made once a session."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import onnx
import torch
from onnx.external_data_helper import load_external_data_for_model
from safetensors.torch import save_file
from torch import Tensor

from export.graph.inline import inline, places_in
from export.graph.model import Model, Weights
from export.graph.weights import engine_weights
from export.quantization.calibration import calibrate
from export.quantization.qdq import quantize_graph
from export.quantization.schemes import is_quantized, quantize_weight
from nemo_diffgemma.config import ModelConfig
from nemo_diffgemma.parallel.layout import ParallelLayout
from tests.export import kit
from tests.reference import tiny_config

NAME = "model.decoder.layers.0.experts.down_proj"
PROMPTS = [[3, 14, 15, 9, 2, 6, 5], [35, 8]]

# contraction axes of 64: a block of INT4, so that the sparse form has whole ones in every expert
CONFIG = ModelConfig.from_huggingface(
    tiny_config(
        {"hidden_size": 64, "moe_intermediate_size": 64, "layer_types": ("sliding_attention", "full_attention")}
    ).to_dict()
)
WHOLE, HALVES = ParallelLayout(), ParallelLayout(expert=2)


@functools.cache
def weights() -> dict[str, Tensor]:
    """Random weights of the tiny model; norms and scales around one, so that activations spread."""
    generator = torch.Generator().manual_seed(4)
    return {
        name: torch.randn(weight.shape, generator=generator) * (0.15 if len(weight.shape) > 1 else 0.3)
        + (len(weight.shape) == 1)
        for name, weight in engine_weights(CONFIG, WHOLE).items()
    }


@functools.cache
def amax() -> dict[str, float]:
    return calibrate(Model(CONFIG, WHOLE, torch.float32), Weights(weights()), PROMPTS, steps=4)


@functools.cache
def packed(scheme: str) -> dict[str, dict[str, Tensor]]:
    names = [name for name in weights() if is_quantized(name)]
    return {name: quantize_weight(name, weights()[name], scheme, amax()[name]) for name in names}


def quantized(scheme: str) -> dict[str, Tensor]:
    """All weights, with packed tensors in place of the expert matrices."""
    kept = {name: tensor for name, tensor in weights().items() if not is_quantized(name)}
    return kept | {key: tensor for tensors in packed(scheme).values() for key, tensor in tensors.items()}


def graph(
    name: str, scheme: str, layout: ParallelLayout = WHOLE, dtype: torch.dtype = torch.float32
) -> onnx.ModelProto:
    return quantize_graph(kit.traced(name, CONFIG, layout, dtype, quantized="inputs"), scheme, amax())


def inlined(model: onnx.ModelProto, packed: dict[str, Tensor]) -> onnx.ModelProto:
    """With packed tensors as constants, by way of a file as in a bundle."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "quantized.safetensors"
        save_file(packed, file)
        inlined = inline(model, places_in(file, Path(folder)))
        load_external_data_for_model(inlined, folder)
    return inlined


def as_stored(name: str) -> Tensor:
    """An expert matrix of the whole model, as it lies in a checkpoint."""
    weight = engine_weights(CONFIG, WHOLE)[name]
    permuted = weights()[name].view([weight.view[axis] for axis in weight.permute])
    return permuted.permute([weight.permute.index(axis) for axis in range(len(weight.permute))]).reshape(weight.stored)
