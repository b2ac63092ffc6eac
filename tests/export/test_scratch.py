"""The memory that an engine asks for beside its weights, at the widths of the released model, as TensorRT-RTX says it.

TensorRT multiplies by 16-bit copies of quantised experts, and by turned ones where products are written in another
way. Where it makes those of all layers before it begins, 30 layers ask for 23 to 140 GB: a few layers show it.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
import yaml
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto
from torch import Tensor, nn

from export.engine.builders import build_engine
from export.graph.bodies import rename
from export.graph.model import Model, Weights
from export.graph.tracing import to_onnx
from export.graph.weights import engine_weights
from export.quantization.qdq import quantize_graph
from export.quantization.schemes import SCHEMES
from nemo_diffgemma.config import ModelConfig
from nemo_diffgemma.parallel.layout import ParallelLayout
from nemo_diffgemma.repository import CONF

CONFIG = ModelConfig(**yaml.safe_load((CONF / "model/diffusiongemma_26b_a4b.yaml").read_text())["architecture"])
COPY = 2 * 3 * CONFIG.num_experts * CONFIG.moe_intermediate_size * CONFIG.hidden_size  # bytes: a layer's in 16 bits
LAYER = "model.decoder.layers.0."


class Experts(nn.Module):
    """Experts of one layer; the router reads `x`."""

    def __init__(self, form: str, quantized: str | None) -> None:
        super().__init__()
        self._quantized = quantized
        self._model = Model(CONFIG, ParallelLayout(), torch.bfloat16, form)

    def forward(self, weights: dict[str, Tensor], inputs: dict[str, Tensor]) -> Tensor:
        given = Weights(weights, self._quantized)
        return self._model.mixture(given, LAYER, inputs["x"], inputs["normed"], torch.tensor(0), None)


def layer(form: str, quantized: str | None) -> ModelProto:
    weights = {
        name: weight
        for name, weight in engine_weights(CONFIG, ParallelLayout(), form).items()
        if name.startswith((LAYER + "router", LAYER + "experts"))
    }
    shape = (2, CONFIG.canvas_length, CONFIG.hidden_size)
    inputs = {name: torch.zeros(shape, dtype=torch.bfloat16) for name in ("x", "normed")}
    dynamic = {name: {0: "batch"} for name in inputs}
    return to_onnx(Experts(form, quantized), weights, torch.bfloat16, inputs, dynamic, ["mixed"])


def stacked(one: ModelProto, count: int) -> ModelProto:
    """As many layers, each of which is given what the one before it makes."""
    model = ModelProto()
    model.CopyFrom(one)
    for part in (model.graph.node, model.graph.initializer, model.graph.input):
        del part[:]
    for number in range(count):

        def name(old: str, number: int = number) -> str:
            if old in ("x", "normed"):
                return old if number == 0 else f"{number - 1}/mixed"
            new = old.replace(LAYER, LAYER.replace("0", str(number)))
            return new if new != old or (number == count - 1 and old == "mixed") else f"{number}/{old}"

        for node in one.graph.node:
            copy = NodeProto.FromString(node.SerializeToString())
            rename(copy, name)
            copy.name = f"{number}/{node.name}"
            model.graph.node.append(copy)
        for tensor in one.graph.initializer:
            constant = TensorProto.FromString(tensor.SerializeToString())
            constant.name = name(tensor.name)
            model.graph.initializer.append(constant)
        for value in one.graph.input:
            taken = ValueInfoProto.FromString(value.SerializeToString())
            taken.name = name(value.name)
            if value.name not in ("x", "normed") or number == 0:
                model.graph.input.append(taken)
    return model


@pytest.mark.parametrize(
    ("form", "schemes"), [("sparse", SCHEMES), ("dense", SCHEMES), ("sparse", (None,)), ("dense", (None,))]
)
def test_more_layers_ask_for_no_more_copies_of_experts(form: str, schemes: tuple, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    one, file = layer(form, None if schemes == (None,) else "inputs"), tmp_path / "graph.onnx"
    for scheme in schemes:
        asked = []
        for count in (1, 3):
            model = stacked(one, count)
            if scheme is not None:
                model = quantize_graph(model, scheme, {value.name: 3.0 for value in model.graph.input})
            onnx.save(model, file)
            report = build_engine("tensorrt_rtx", file, tmp_path / "engine", {"batch": (1, 1, 1)}, targets=["sm_120"])
            asked.append(report.scratch_bytes)
        assert asked[1] - asked[0] < 0.1 * COPY, (scheme, asked)
        assert 1e7 < asked[0] < 3.5 * COPY, (scheme, asked)
