"""The memory that an engine asks for beside its weights, at the widths of the released model, as TensorRT-RTX says it.

TensorRT multiplies by 16-bit copies of quantised experts, and by turned ones where products are written in another
way. Where it makes those of all layers before it begins, 30 layers ask for 23 to 140 GB: two layers show it.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
import yaml
from onnx import ModelProto
from torch import Tensor, nn

from export.engine.builders import build_engine
from export.graph.model import Model, Weights
from export.graph.tracing import to_onnx
from export.graph.weights import engine_weights
from export.quantization.qdq import quantize_graph
from export.quantization.schemes import SCHEMES
from nemo_diffgemma.config import ModelConfig
from nemo_diffgemma.parallel.layout import ParallelLayout
from nemo_diffgemma.repository import CONF

CONFIG = ModelConfig(**yaml.safe_load((CONF / "model/diffusiongemma_26b_a4b.yaml").read_text())["architecture"])
MATRICES = 3 * CONFIG.num_experts * CONFIG.moe_intermediate_size * CONFIG.hidden_size  # elements of a layer's experts


class Layers(nn.Module):
    """The experts of some layers, each of which is given what the last one makes."""

    def __init__(self, count: int, form: str, quantized: str | None) -> None:
        super().__init__()
        self._count, self._quantized = count, quantized
        self._model = Model(CONFIG, ParallelLayout(), torch.bfloat16, form)

    def forward(self, weights: dict[str, Tensor], inputs: dict[str, Tensor]) -> Tensor:
        x, given = inputs["x"], Weights(weights, self._quantized)
        for layer in range(self._count):
            x = self._model.mixture(given, f"model.decoder.layers.{layer}.", x, x, torch.tensor(0), None)
        return x


def graph(count: int, form: str, quantized: str | None) -> ModelProto:
    weights = {
        name: weight
        for name, weight in engine_weights(CONFIG, ParallelLayout(), form).items()
        for layer in range(count)
        if name.startswith((f"model.decoder.layers.{layer}.router", f"model.decoder.layers.{layer}.experts"))
    }
    inputs = {"x": torch.zeros(2, CONFIG.canvas_length, CONFIG.hidden_size, dtype=torch.bfloat16)}
    return to_onnx(Layers(count, form, quantized), weights, torch.bfloat16, inputs, {"x": {0: "batch"}}, ["mixed"])


@pytest.mark.parametrize("form", ["sparse", "dense"])
def test_the_second_layer_asks_for_no_copy_of_its_experts(form: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    for quantized in ("inputs", None):
        graphs = [graph(count, form, quantized) for count in (1, 2)]
        for scheme in SCHEMES if quantized else (None,):
            asked = []
            for model in graphs:
                amax = {value.name: 3.0 for value in model.graph.input}
                onnx.save(model if scheme is None else quantize_graph(model, scheme, amax), tmp_path / "graph.onnx")
                report = build_engine(
                    "tensorrt_rtx", tmp_path / "graph.onnx", tmp_path / "engine", {"batch": (1, 1, 1)}, 1, ["sm_120"]
                )
                asked.append(report.scratch_bytes)
            assert asked[1] - asked[0] < 0.1 * 2 * MATRICES, (scheme, asked)
            assert 1e7 < asked[1] < 5e9, (scheme, asked)
