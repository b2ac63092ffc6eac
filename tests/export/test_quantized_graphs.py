"""Graphs with quantised experts compute what the packed tensors stand for, and TensorRT-RTX builds them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from export.engine.builders import build_engine
from export.engine.onnx_session import OnnxSession
from export.graph.bodies import graphs
from export.graph.loop import to_loop
from export.graph.model import Model, Weights
from export.graph.tracing import example_inputs, past_names, present_names
from export.graph.weights import EXPERTS, engine_weights
from export.quantization.calibration import SimulatedWeights
from export.quantization.qdq import quantize_graph
from export.quantization.schemes import SCHEMES, dequantize, is_quantized, packed_inputs, quantize_weight
from tests.export import kit, quantized
from tests.export.quantized import CONFIG, HALVES, NAME, WHOLE


def _run(model: onnx.ModelProto, tensors: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    packed = {name: tensor for name, tensor in tensors.items() if "experts." in name}
    kept = {name: tensor for name, tensor in tensors.items() if name not in packed}
    return OnnxSession([quantized.inlined(model, packed)], [kept]).run(inputs, [{}])[0]


def _inputs(graph: str) -> dict[str, Tensor]:
    """Random inputs after a context of 6 columns, without `rank`."""
    generator = torch.Generator().manual_seed(5)
    inputs, _ = example_inputs(graph, CONFIG, WHOLE, torch.float32)
    for name, tensor in inputs.items():
        if name in ("canvas", "replacements", "input_ids"):
            inputs[name] = torch.randint(0, CONFIG.vocab_size, tensor.shape, generator=generator)
        elif name == "uniforms":
            inputs[name] = torch.rand(tensor.shape, generator=generator)
        elif tensor.dim() > 1:
            inputs[name] = torch.randn(tensor.shape, generator=generator) * 0.5
    settings = {"past_length": torch.tensor([6, 4])}
    if graph == "step":
        settings |= {"temperature": torch.tensor([0.7, 0.5]), "entropy_bound": torch.tensor([2.0, 1.0])}
    return inputs | settings


def _simulated(graph: str, weights: Weights, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    given = dict(inputs)
    layers = range(CONFIG.num_hidden_layers)
    past = [(given.pop(key), given.pop(value)) for key, value in map(past_names, layers)]
    model = Model(CONFIG, WHOLE, torch.float32)
    with torch.inference_mode():
        if graph == "encode":
            fresh = model.encode(weights, past=past, **given)
            return {name: t for i, pair in enumerate(fresh) for name, t in zip(present_names(i), pair, strict=True)}
        outputs = model.step(weights, past=past, **given)
    return dict(
        zip(("next_canvas", "next_soft", "argmax", "entropy", "accepted", "accepted_count"), outputs, strict=True)
    )


@pytest.mark.parametrize("graph", ["step", "encode"])
@pytest.mark.parametrize("scheme", ["fp8", "int4"])
def test_onnx_runtime_computes_what_the_simulation_computes(scheme: str, graph: str) -> None:
    inputs = _inputs(graph)
    found = _run(quantized.graph(graph, scheme), quantized.quantized(scheme), inputs)
    expected = _simulated(graph, SimulatedWeights(quantized.quantized(scheme), scheme), inputs)
    exact = _simulated(graph, Weights(quantized.weights()), inputs)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(found[name], tensor), name
    last = "entropy" if graph == "step" else present_names(CONFIG.num_hidden_layers - 1)[0]
    assert (expected[last] - exact[last]).abs().max() > 1e-3  # quantisation changes more than the tolerance


@pytest.mark.parametrize("scheme", ["fp8", "int4"])
def test_a_loop_of_a_quantised_step_repeats_it(scheme: str) -> None:
    step, tensors, inputs = quantized.graph("step", scheme), quantized.quantized(scheme), _inputs("step")
    generator = torch.Generator().manual_seed(6)
    stacks = {
        "temperatures": torch.tensor([[0.8, 0.7], [0.6, 0.5]]),
        "uniforms": torch.rand(2, 2, 4, generator=generator),
        "replacements": torch.randint(0, CONFIG.vocab_size, (2, 2, 4), generator=generator),
    }
    state = dict(inputs)
    for i in range(2):
        state |= {
            "temperature": stacks["temperatures"][i],
            "uniforms": stacks["uniforms"][i],
            "replacements": stacks["replacements"][i],
        }
        once = _run(step, tensors, state)
        state |= {"canvas": once["next_canvas"], "soft": once["next_soft"]}
    whole = _run(to_loop(step, None), tensors, {k: v for k, v in inputs.items() if k != "temperature"} | stacks)
    assert torch.equal(whole["next_canvas"], once["next_canvas"])
    torch.testing.assert_close(whole["entropy"][1], once["entropy"], rtol=1e-5, atol=1e-6)


def test_two_ranks_of_int4_compute_what_one_does() -> None:
    """Blocks end where a rank's columns end, so slices have the very scales of the whole."""
    inputs = _inputs("step")
    model, spec = quantized.graph("step", "int4", HALVES), engine_weights(CONFIG, HALVES)
    models, weights = [], []
    for rank in range(2):
        own = {
            name: w.of_rank(quantized.weights()[name].view(w.stored), rank)
            for name, w in spec.items()
            if not is_quantized(name)
        }
        packed: dict[str, Tensor] = {}
        for name, weight in spec.items():
            if is_quantized(name):
                packed |= quantize_weight(name, weight.of_rank(quantized.as_stored(name), rank), "int4")
        models.append(quantized.inlined(model, packed))
        weights.append(own)
    found = OnnxSession(models, weights).run(inputs, [{"rank": torch.tensor(rank)} for rank in range(2)])
    expected = _simulated("step", SimulatedWeights(quantized.quantized("int4"), "int4"), inputs)
    for rank in range(2):
        assert torch.equal(found[rank]["next_canvas"], expected["next_canvas"])
        torch.testing.assert_close(found[rank]["entropy"], expected["entropy"], rtol=1e-4, atol=1e-5)


def test_nvfp4_nodes_dequantise_as_the_simulation() -> None:
    """ONNX Runtime has no FLOAT4E2M1 on the CPU: the two DequantizeLinear of one matrix in ONNX's own interpreter."""
    packed, model = quantized.packed("nvfp4")[NAME], quantized.graph("step", "nvfp4")
    body = next(graph for graph in graphs(model.graph) if any(NAME in node.input for node in graph.node))
    nodes = [node for node in body.node if node.output[0].startswith(NAME) and ".dequantized" in node.output[0]]
    wanted = next(node.output[0] for node in nodes if NAME in node.input)
    inputs = [*(value for value in model.graph.input if value.name in packed), body.input[2]]  # which turn it is
    output = helper.make_tensor_value_info(wanted, TensorProto.FLOAT, list(quantized.weights()[NAME].shape))
    cut = helper.make_model(helper.make_graph(nodes, "weight", inputs, [output]), opset_imports=model.opset_import)
    constants = quantized.inlined(cut, packed).graph.initializer
    feed = {tensor.name: numpy_helper.to_array(tensor) for tensor in constants} | {body.input[2].name: np.array(1)}
    found = ReferenceEvaluator(cut).run([wanted], feed)
    assert isinstance(found, list)
    torch.testing.assert_close(torch.from_numpy(found[0]), dequantize(NAME, packed, "nvfp4"), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_inputs_of_the_graph_are_what_weights_become(scheme: str) -> None:
    before, after = kit.traced("step", CONFIG, WHOLE, torch.float32), quantized.graph("step", scheme)
    matrices = {v.name for v in before.graph.input if is_quantized(v.name)}
    added = {
        v.name: v for v in after.graph.input if v.name not in {u.name for u in before.graph.input} or v.name in matrices
    }
    expected = {
        key: spec
        for name in matrices
        for key, spec in packed_inputs(name, quantized.weights()[name].shape, scheme, torch.float32).items()
    }
    constants = {tensor.name for tensor in after.graph.initializer}
    assert set(added) == set(expected) - constants
    for name, value in added.items():
        kind = value.type.tensor_type
        assert (kind.elem_type, tuple(d.dim_value for d in kind.shape.dim)) == tuple(expected[name])
    assert all(name.endswith(".input_scale") for name in set(expected) & constants)
    onnx.checker.check_model(after)


def test_finer_formats_change_less() -> None:
    inputs = _inputs("step")
    exact = _simulated("step", Weights(quantized.weights()), inputs)["entropy"]
    gaps = {
        s: (_simulated("step", SimulatedWeights(quantized.quantized(s), s), inputs)["entropy"] - exact).abs().mean()
        for s in SCHEMES
    }
    assert 0 < gaps["fp8"] < min(gaps["int4"], gaps["nvfp4"])


# -- TensorRT-RTX ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("graph", ["encode", "step", "loop"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_tensorrt_rtx_builds_quantised_graphs(scheme: str, graph: str) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    model = quantized.graph("encode" if graph == "encode" else "step", scheme, dtype=torch.bfloat16)
    matrices = sum(value.name.endswith(EXPERTS) for value in model.graph.input)
    model = to_loop(model, 8) if graph == "loop" else model
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
    assert parser.parse(model.SerializeToString()), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    profile, config = builder.create_optimization_profile(), builder.create_builder_config()
    sizes = {"batch": (1, 1, 8), "chunk": (1, 8, 16), "context_columns": (1, 16, 64), "window_columns": (1, 7, 7)}
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        if any(dim.dim_param for dim in dims):
            ranges = (sizes.get(dim.dim_param, (dim.dim_value,) * 3) for dim in dims)
            profile.set_shape(value.name, *zip(*ranges, strict=True))
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM120, 0)
    assert builder.build_serialized_network(network, config) is not None
    kinds = [network.get_layer(i).type for i in range(network.num_layers)]
    each = {"fp8": (2, 1, 0), "int4": (1, 0, 0), "nvfp4": (4, 0, 1)}[scheme]  # layers for one product of a matrix
    layers = trt.LayerType.DEQUANTIZE, trt.LayerType.QUANTIZE, trt.LayerType.DYNAMIC_QUANTIZE
    # each matrix stands in two products: for all experts, and in the loop over overloaded ones
    assert [kinds.count(kind) for kind in layers] == [2 * count * matrices for count in each]


@pytest.mark.parametrize(("scheme", "bits"), [("fp8", 8), ("int4", 4 + 16 / 64), ("nvfp4", 4 + 8 / 16)])
def test_packed_constants_stay_narrow_in_an_engine(scheme: str, bits: float, tmp_path: Path) -> None:
    """TensorRT could fold the DequantizeLinear of constants, and the engine would be as large as a float16 one."""
    pytest.importorskip("tensorrt_rtx")
    size, half = 2048, TensorProto.FLOAT16
    nodes = [helper.make_node("Transpose", [NAME], ["t"], perm=[1, 0]), helper.make_node("MatMul", ["x", "t"], ["y"])]
    values = {
        name: helper.make_tensor_value_info(name, half, [rows, size])
        for name, rows in (("x", 4), (NAME, size), ("y", 4))
    }
    graph = helper.make_graph(nodes, "product", [values["x"], values[NAME]], [values["y"]])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(7)).half()
    packed = quantize_weight(NAME, matrix, scheme, 4.0)
    onnx.save(quantized.inlined(quantize_graph(model, scheme, {NAME: 4.0}), packed), tmp_path / "product.onnx")
    report = build_engine("tensorrt_rtx", tmp_path / "product.onnx", tmp_path / "engine", {}, targets=["sm_120"])
    assert bits * size**2 / 8 < report.bytes < 1.1 * bits * size**2 / 8 + 200_000
    assert list(report.network.inputs) == ["x"]


@pytest.mark.parametrize(
    ("scheme", "bits", "copies"), [("fp8", 8, 1), ("int4", 4 + 16 / 64, 2), ("nvfp4", 4 + 8 / 16, 1)]
)
def test_packed_constants_of_a_loop_stay_narrow_in_an_engine(
    scheme: str, bits: float, copies: int, tmp_path: Path
) -> None:
    """The loop over overloaded experts takes some of what is dequantised: no 16-bit copy of all may be kept for it.

    INT4 lies there twice: as the product of all experts wants it, and as the loop does.
    """
    pytest.importorskip("tensorrt_rtx")
    experts, size, half = 8, 1024, TensorProto.FLOAT16
    matrices = torch.randn(experts, size, size, generator=torch.Generator().manual_seed(7)).half()
    onnx.save(quantized.inlined(quantize_graph(looped(experts, size, half), scheme, {NAME: 4.0}),
                                quantize_weight(NAME, matrices, scheme, 4.0)), tmp_path / "loop.onnx")  # fmt: skip
    report = build_engine("tensorrt_rtx", tmp_path / "loop.onnx", tmp_path / "engine", {}, targets=["sm_120"])
    packed = bits * experts * size**2 / 8
    assert copies * packed < report.bytes < copies * packed + 2_500_000
    assert report.network.layers["TRIP_LIMIT"] == 2  # a count and a condition


def looped(experts: int, size: int, dtype: int) -> onnx.ModelProto:
    """`x` [E, 4, K] by all matrices, and `rounds` times by the one of each round, summed up."""
    value, node = helper.make_tensor_value_info, helper.make_node
    body = helper.make_graph(
        [
            node("Unsqueeze", ["i", "zero"], ["one"]),
            node("Gather", [NAME, "one"], ["some"], axis=0),
            node("Transpose", ["some"], ["turned"], perm=[0, 2, 1]),
            node("MatMul", ["x", "turned"], ["part"]),
            node("Add", ["total", "part"], ["next"]),
            node("Identity", ["on"], ["still"]),
        ],
        "round",
        [
            value("i", TensorProto.INT64, []),
            value("on", TensorProto.BOOL, []),
            value("total", dtype, [experts, 4, size]),
        ],
        [value("still", TensorProto.BOOL, []), value("next", dtype, [experts, 4, size])],
    )
    nodes = [
        node("Transpose", [NAME], ["all"], perm=[0, 2, 1]),
        node("MatMul", ["x", "all"], ["first"]),
        node("Loop", ["rounds", "true", "first"], ["y"], body=body),
    ]
    inputs = [
        value("x", dtype, [experts, 4, size]),
        value(NAME, dtype, [experts, size, size]),
        value("rounds", TensorProto.INT64, []),
    ]
    constants = [
        helper.make_tensor("zero", TensorProto.INT64, [1], [0]),
        helper.make_tensor("true", TensorProto.BOOL, [], [True]),
    ]
    graph = helper.make_graph(nodes, "loop", inputs, [value("y", dtype, [experts, 4, size])], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
