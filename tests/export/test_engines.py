"""TensorRT-RTX builds every graph of the tiny model, and its network is what the graph says. No engine is run."""

from __future__ import annotations

import onnx
import pytest
import torch

from export.bundle.format import Settings
from export.engine.builders import EngineReport, build_engine, inspect_network
from export.engine.engine import Limits
from export.graph.loop import to_loop
from export.graph.weights import engine_weights
from export.quantization.qdq import quantize_graph
from export.quantization.schemes import is_quantized, packed_inputs
from nemo_diffgemma import ModelConfig, ParallelLayout
from tests.export import kit
from tests.export.quantized import CONFIG

pytest.importorskip(
    "tensorrt_rtx", reason="tensorrt_rtx is not installed: make venv installs it where there is a wheel"
)

SINGLE, FOUR = ParallelLayout(), ParallelLayout(tensor=4, expert=2, expert_tensor=2)
TWO = ParallelLayout(tensor=2, expert=2)
DTYPES = {torch.float32: "FLOAT", torch.float16: "HALF", torch.bfloat16: "BF16"}
CONFIGS = {
    torch.float32: kit.config("short"),
    torch.float16: kit.config("short"),
    torch.bfloat16: CONFIG,
}  # traced anyway
LIMITS = Limits(batch=4, context=256, chunk=64)


def built(model: onnx.ModelProto, graph: str, tmp_path, config: ModelConfig, world: int = 1, steps: int | None = 8):
    """The network report of a graph whose engine was built."""
    file, engine = tmp_path / f"{graph}.onnx", tmp_path / f"{graph}.engine"
    onnx.save(model, file)
    profile = Settings(steps=steps, limits=LIMITS).profile(graph, config)
    report = build_engine("tensorrt_rtx", file, engine, profile, world=world, targets=["sm_120"])
    assert report.bytes == engine.stat().st_size > 100_000
    assert report.network == inspect_network("tensorrt_rtx", file, world)
    assert_profile(report, profile)
    return report.network


def assert_profile(report: EngineReport, profile) -> None:
    """TensorRT has the sizes of every dynamic axis."""
    inputs = report.network.inputs
    assert set(report.profile) == {name for name, tensor in inputs.items() if any(tensor.axes)}
    for name, shapes in report.profile.items():
        tensor = inputs[name]
        for index, shape in enumerate(shapes):
            sizes = (
                profile[axis][index] if axis else size for axis, size in zip(tensor.axes, tensor.shape, strict=True)
            )
            assert shape == tuple(sizes), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("graph", ["encode", "step", "loop"])
def test_every_graph_builds_in_every_precision(graph, dtype, tmp_path):
    config = CONFIGS[dtype]
    model = kit.traced("encode" if graph == "encode" else "step", config, SINGLE, dtype)
    network = built(to_loop(model, 8) if graph == "loop" else model, graph, tmp_path, config)
    weights = engine_weights(config, SINGLE)
    bound = {name: tensor for name, tensor in network.inputs.items() if name in weights}
    assert set(network.inputs) - set(weights) == kit.own_inputs(graph, config)
    for name, tensor in bound.items():
        assert (tensor.dtype, tensor.shape) == (DTYPES[dtype], weights[name].shape)
    axes = {axis for tensor in network.inputs.values() for axis in tensor.axes if axis}
    assert {"batch", "context_columns", "window_columns"} - axes == (
        {"context_columns"} if graph == "encode" else set()
    )
    assert not network.collectives
    # a condition for the experts of every layer, and count and condition of the loop over steps
    more = {"encode": -1, "step": 0, "loop": 2}[graph]  # `encode` ends with the keys and values of the last layer
    assert network.layers["TRIP_LIMIT"] == config.num_hidden_layers + more
    # sampling is in float32 whatever the weights are, and what leaves the engine keeps its type
    if graph != "encode":
        assert network.outputs["entropy"].dtype == "FLOAT"
        assert network.outputs["argmax"].dtype == network.outputs["next_canvas"].dtype == "INT64"
        assert network.outputs["next_soft"].dtype == DTYPES[dtype]


def test_a_loop_of_any_number_of_steps_builds(tmp_path):
    network = built(to_loop(kit.graph("step"), None), "loop", tmp_path, kit.config("short"), steps=None)
    assert network.inputs["temperatures"].axes == ("steps", "batch")


@pytest.mark.parametrize("graph", ["encode", "step"])
def test_rank_graphs_build_with_an_exchange_for_every_sum(graph, tmp_path):
    size, layout = "one_global_kv", FOUR
    network = built(kit.graph(graph, size, layout), graph, tmp_path, kit.config(size), world=4)
    layers = kit.config(size).num_hidden_layers
    # embedding; attention and feed-forward of each layer, of which the last encoded one ends with its keys and values;
    # self-conditioning, chunk masses, the drawn chunk, ids, signal
    expected = 1 + 2 * (layers - 1) if graph == "encode" else 1 + 2 * layers + 5
    assert network.collectives == (4,) * expected
    weights = engine_weights(kit.config(size), layout)
    assert set(network.inputs) - set(weights) == kit.own_inputs(graph, kit.config(size), layout)


@pytest.mark.parametrize("graph", ["encode", "step"])
@pytest.mark.parametrize("scheme", [None, "fp8", "int4", "nvfp4"])
def test_rank_graphs_build_in_bfloat16_and_quantised(scheme, graph, tmp_path):
    """What export/README.md recommends for several GPUs."""
    quantized = None if scheme is None else "inputs"
    model = kit.traced(graph, CONFIG, TWO, torch.bfloat16, quantized=quantized)
    weights = engine_weights(CONFIG, TWO)
    if scheme is not None:
        model = quantize_graph(model, scheme, dict.fromkeys(weights, 1.0))
    file = tmp_path / f"{graph}.onnx"
    onnx.save(model, file)
    profile = Settings(limits=LIMITS).profile(graph, CONFIG)
    report = build_engine("tensorrt_rtx", file, tmp_path / "rank.engine", profile, world=2, targets=["sm_120"])
    assert_profile(report, profile)
    names = set(weights)
    if scheme is not None:
        for matrix in filter(is_quantized, weights):
            names |= set(packed_inputs(matrix, weights[matrix].shape, scheme, torch.bfloat16))
    inputs = report.network.inputs
    assert set(inputs) - names == kit.own_inputs(graph, CONFIG, TWO)
    packed = {None: "BF16", "fp8": "FP8", "int4": "INT4", "nvfp4": "FP4"}[scheme]
    layers = CONFIG.num_hidden_layers - (graph == "encode")  # which ends with the last keys and values
    assert [tensor.dtype for name, tensor in inputs.items() if is_quantized(name)] == [packed] * 2 * layers
    assert set(report.network.collectives) == {2}
