"""Quantised experts: what the packed tensors stand for, and that the quantised graphs compute with exactly these."""

from __future__ import annotations

import fnmatch
import functools
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import load_external_data_for_model
from onnx.reference import ReferenceEvaluator
from safetensors.torch import save_file
from torch import Tensor

from export import quantize
from export.builders import build_engine
from export.calibrate import SimulatedWeights, calibrate
from export.graph import Model, Weights
from export.inline import inline, places_in
from export.loop import to_loop
from export.qdq import quantize_graph
from export.quantize import (
    BLOCK,
    SCHEMES,
    QuantizationError,
    dequantize,
    is_quantized,
    packed_inputs,
    quantize_weight,
)
from export.sessions import OnnxSession
from export.tracing import example_inputs, past_names, present_names, trace
from export.weights import EXPERTS, engine_weights
from nemo_diffgemma.config import ModelConfig
from nemo_diffgemma.parallel.layout import ParallelLayout
from tests.reference import tiny_config

NAME = "model.decoder.layers.0.experts.down_proj"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PROMPTS = [[3, 14, 15, 9, 2, 6, 5], [35, 8]]

# contraction axes of 64 (hidden) and 8 * 32 (experts), of which a half is still two blocks
CONFIG = ModelConfig.from_huggingface(
    tiny_config(
        {"hidden_size": 64, "moe_intermediate_size": 32, "layer_types": ("sliding_attention", "full_attention")}
    ).to_dict()
)
WHOLE, HALVES = ParallelLayout(), ParallelLayout(expert=2)


# -- matrices ----------------------------------------------------------------------------------------------------------


def _representable(scheme: str) -> Tensor:
    """A matrix [4, 128] that the scheme has numbers for, and whose largest entries are the ends of its ranges."""
    generator = torch.Generator().manual_seed(0)
    if scheme == "fp8":
        codes = torch.randint(0, 127, (4, 128), generator=generator, dtype=torch.uint8)
        values = codes.view(torch.float8_e4m3fn).float()
        values[0, 0] = 448.0
        return values * 0.25
    if scheme == "int4":
        values = torch.randint(-7, 8, (4, 128), generator=generator).float()
        values[:, ::64] = 7.0
        return values * torch.tensor([0.5, 2.0]).repeat_interleave(64)
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])[torch.randint(0, 8, (4, 128), generator=generator)]
    values *= torch.where(torch.rand(4, 128, generator=generator) < 0.5, -1.0, 1.0)
    values[:, ::16] = 6.0
    scales = torch.tensor([448.0, 1.0, 2.0**-9, 13.0, 0.25, 96.0, 3.5, 1.125])
    return values * scales.repeat_interleave(16) * 0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_numbers_that_the_format_has_come_back_exactly(scheme: str, dtype: torch.dtype) -> None:
    matrix = _representable(scheme).to(dtype)
    assert torch.equal(dequantize(NAME, quantize_weight(NAME, matrix, scheme, 1.0), scheme), matrix.float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_error_of_every_entry_is_within_half_a_step_of_the_format(scheme: str, dtype: torch.dtype) -> None:
    """Half of the distance between neighbours, and what lies beyond the largest number after scales are rounded."""
    generator = torch.Generator().manual_seed(1)
    spread = torch.logspace(-3, 0, 48)[:, None]
    matrix = (torch.randn(48, 256, generator=generator) * spread).to(dtype)
    packed = quantize_weight(NAME, matrix, scheme, 1.0)
    exact = matrix.float()
    scale = packed[f"{NAME}.scale"].float()
    if scheme == "fp8":  # 3 bits of mantissa: half a step is 2^-4 of the number, or of the least normal one, 2^-6
        bound = torch.maximum(exact.abs() / 16, scale * 2**-10)
        largest = 448 * scale
    elif scheme == "int4":
        bound = (scale / 2).repeat_interleave(64, 1)
        largest = 7 * scale.repeat_interleave(64, 1)
    else:  # steps of 0.5 up to 2, 1 up to 4, 2 up to 6: half of them is at most a fifth of the number beyond 1.25
        step = (scale * packed[f"{NAME}.global_scale"]).repeat_interleave(16, 1)
        bound = torch.maximum(step / 4, exact.abs() / 5)
        largest = 6 * step
    error = (dequantize(NAME, packed, scheme) - exact).abs()
    allowed = torch.maximum(bound, exact.abs() - largest)
    assert (error <= allowed * (1 + 1e-5)).all(), (error / allowed).max()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_zeros_stay_zeros_under_positive_scales(scheme: str) -> None:
    matrix = torch.zeros(4, 128)
    matrix[2, 64:] = 1.0
    packed = quantize_weight(NAME, matrix, scheme, 0.0)
    assert torch.equal(dequantize(NAME, packed, scheme), matrix)
    assert all((tensor.float() > 0).all() for key, tensor in packed.items() if key.endswith("scale"))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_chunks_of_rows_make_no_difference(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(50, 128, generator=torch.Generator().manual_seed(2))
    whole = quantize_weight(NAME, matrix, scheme, 1.0)
    monkeypatch.setattr(quantize, "_CHUNK", 3 * 128)
    chunked = quantize_weight(NAME, matrix, scheme, 1.0)
    assert all(torch.equal(_bytes(whole[key]), _bytes(chunked[key])) for key in whole)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bytes_mean_the_same_to_onnx(scheme: str) -> None:
    matrix = torch.randn(6, 128, generator=torch.Generator().manual_seed(3))
    packed = quantize_weight(NAME, matrix, scheme, 1.0)
    spec = packed_inputs(NAME, matrix.shape, scheme, torch.float32)[NAME]
    stored = TensorProto(data_type=spec.onnx_type, dims=spec.shape, raw_data=_bytes(packed[NAME]).numpy().tobytes())
    scale = packed[f"{NAME}.scale"].float() * packed.get(f"{NAME}.global_scale", 1.0)
    blocks = scale.reshape(-1, scale.shape[-1] if scale.dim() else 1).repeat_interleave(BLOCK.get(scheme, 128), 1)
    numbers = torch.from_numpy(numpy_helper.to_array(stored).astype(np.float32))
    torch.testing.assert_close(dequantize(NAME, packed, scheme), numbers * blocks, rtol=1e-6, atol=0)


def test_nvfp4_nodes_dequantise_as_the_simulation() -> None:
    """ONNX Runtime has no FLOAT4E2M1 on the CPU: the two DequantizeLinear of one matrix in ONNX's own interpreter."""
    packed, model = _packed("nvfp4")[NAME], _graph("step", "nvfp4")
    wanted = f"{NAME}.dequantized"
    nodes = [node for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0].startswith(NAME)]
    nodes = [node for node in nodes if ".input" not in node.input[0]]
    inputs = [value for value in model.graph.input if value.name in packed]
    output = helper.make_tensor_value_info(wanted, TensorProto.FLOAT, [64, 256])
    cut = helper.make_model(helper.make_graph(nodes, "weight", inputs, [output]), opset_imports=model.opset_import)
    constants = _inlined(cut, packed).graph.initializer
    feed = {tensor.name: numpy_helper.to_array(tensor) for tensor in constants}
    found = ReferenceEvaluator(cut).run([wanted], feed)
    assert isinstance(found, list)
    torch.testing.assert_close(torch.from_numpy(found[0]), dequantize(NAME, packed, "nvfp4"), rtol=1e-6, atol=0)


# -- graphs ------------------------------------------------------------------------------------------------------------


@functools.cache
def _weights() -> dict[str, Tensor]:
    """Random weights of the tiny model; norms and scales around one, so that activations spread."""
    generator = torch.Generator().manual_seed(4)
    return {
        name: torch.randn(weight.shape, generator=generator) * (0.15 if len(weight.shape) > 1 else 0.3)
        + (len(weight.shape) == 1)
        for name, weight in engine_weights(CONFIG, WHOLE).items()
    }


@functools.cache
def _amax() -> dict[str, float]:
    return calibrate(Model(CONFIG, WHOLE, torch.float32), Weights(_weights()), PROMPTS, steps=4)


@functools.cache
def _packed(scheme: str) -> dict[str, dict[str, Tensor]]:
    names = [name for name in _weights() if is_quantized(name)]
    return {name: quantize_weight(name, _weights()[name], scheme, _amax()[name]) for name in names}


def _quantized(scheme: str) -> dict[str, Tensor]:
    """All weights, with packed tensors in place of the expert matrices."""
    kept = {name: tensor for name, tensor in _weights().items() if not is_quantized(name)}
    return kept | {key: tensor for packed in _packed(scheme).values() for key, tensor in packed.items()}


@functools.cache
def _traced(graph: str, layout: ParallelLayout, dtype: torch.dtype) -> onnx.ModelProto:
    return trace(graph, CONFIG, layout, dtype)


def _graph(
    graph: str, scheme: str, layout: ParallelLayout = WHOLE, dtype: torch.dtype = torch.float32
) -> onnx.ModelProto:
    return quantize_graph(_traced(graph, layout, dtype), scheme, _amax())


def _inlined(model: onnx.ModelProto, packed: dict[str, Tensor]) -> onnx.ModelProto:
    """With packed tensors as constants, by way of a file as in a bundle."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "quantized.safetensors"
        save_file(packed, file)
        inlined = inline(model, places_in(file, Path(folder)))
        load_external_data_for_model(inlined, folder)
    return inlined


def _run(model: onnx.ModelProto, tensors: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    packed = {name: tensor for name, tensor in tensors.items() if "experts." in name}
    kept = {name: tensor for name, tensor in tensors.items() if name not in packed}
    return OnnxSession([_inlined(model, packed)], [kept]).run(inputs, [{}])[0]


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
    settings = {"past_length": torch.tensor(6)}
    if graph == "step":
        settings |= {"temperature": torch.tensor(0.7), "entropy_bound": torch.tensor(2.0)}
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
    found = _run(_graph(graph, scheme), _quantized(scheme), inputs)
    expected = _simulated(graph, SimulatedWeights(_quantized(scheme), scheme), inputs)
    exact = _simulated(graph, Weights(_weights()), inputs)
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
    step, tensors, inputs = _graph("step", scheme), _quantized(scheme), _inputs("step")
    generator = torch.Generator().manual_seed(6)
    stacks = {
        "temperatures": torch.tensor([0.8, 0.6]),
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
    model, spec = _graph("step", "int4", HALVES), engine_weights(CONFIG, HALVES)
    models, weights = [], []
    for rank in range(2):
        own = {
            name: w.of_rank(_weights()[name].view(w.stored), rank) for name, w in spec.items() if not is_quantized(name)
        }
        packed: dict[str, Tensor] = {}
        for name, weight in spec.items():
            if is_quantized(name):
                packed |= quantize_weight(name, weight.of_rank(_as_stored(name), rank), "int4")
        models.append(_inlined(model, packed))
        weights.append(own)
    found = OnnxSession(models, weights).run(inputs, [{"rank": torch.tensor(rank)} for rank in range(2)])
    expected = _simulated("step", SimulatedWeights(_quantized("int4"), "int4"), inputs)
    for rank in range(2):
        assert torch.equal(found[rank]["next_canvas"], expected["next_canvas"])
        torch.testing.assert_close(found[rank]["entropy"], expected["entropy"], rtol=1e-4, atol=1e-5)


def _as_stored(name: str) -> Tensor:
    """An expert matrix of the whole model, as it lies in a checkpoint."""
    weight = engine_weights(CONFIG, WHOLE)[name]
    permuted = _weights()[name].view([weight.view[axis] for axis in weight.permute])
    return permuted.permute([weight.permute.index(axis) for axis in range(len(weight.permute))]).reshape(weight.stored)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_inputs_of_the_graph_are_what_weights_become(scheme: str) -> None:
    before, after = _traced("step", WHOLE, torch.float32), _graph("step", scheme)
    matrices = {v.name for v in before.graph.input if is_quantized(v.name)}
    added = {
        v.name: v for v in after.graph.input if v.name not in {u.name for u in before.graph.input} or v.name in matrices
    }
    expected = {
        key: spec
        for name in matrices
        for key, spec in packed_inputs(name, _weights()[name].shape, scheme, torch.float32).items()
    }
    constants = {tensor.name for tensor in after.graph.initializer}
    assert set(added) == set(expected) - constants
    for name, value in added.items():
        kind = value.type.tensor_type
        assert (kind.elem_type, tuple(d.dim_value for d in kind.shape.dim)) == tuple(expected[name])
    assert all(name.endswith(".input_scale") for name in set(expected) & constants)
    onnx.checker.check_model(after)


def test_what_cannot_be_quantised_is_refused_with_a_way_out() -> None:
    with pytest.raises(
        QuantizationError, match=r"\[4, 96\] cannot be cut into int4 blocks of 64 .* use quantization=fp8"
    ):
        quantize_weight(NAME, torch.ones(4, 96), "int4")
    with pytest.raises(QuantizationError, match="'int8'; use one of fp8, int4, nvfp4"):
        quantize_weight(NAME, torch.ones(4, 128), "int8")
    with pytest.raises(QuantizationError, match="calibrate"):
        quantize_weight(NAME, torch.ones(4, 128), "fp8")
    with pytest.raises(QuantizationError, match="holds nan"):
        quantize_weight(NAME, torch.tensor([[float("nan")] * 128, [1.0] * 128]), "int4")
    with pytest.raises(QuantizationError, match=f"no activation range for {NAME}"):
        quantize_graph(_traced("step", WHOLE, torch.float32), "nvfp4", {k: v for k, v in _amax().items() if k != NAME})
    with pytest.raises(QuantizationError, match="not what to_loop or inline made of it"):
        quantize_graph(_graph("step", "int4"), "int4")
    with pytest.raises(QuantizationError, match="give a few typical prompts"):
        quantize.check("fp8", CONFIG, WHOLE, [])


# -- calibration -------------------------------------------------------------------------------------------------------


class _Watch(Weights):
    largest: dict[str, float]

    def linear(self, x: Tensor, name: str) -> Tensor:
        self.largest[name] = max(self.largest.get(name, 0.0), float(x.abs().max()))
        return super().linear(x, name)


def test_calibrated_range_is_the_largest_input_of_each_matrix() -> None:
    watch = _Watch(_weights())
    watch.largest = {}
    amax = calibrate(Model(CONFIG, WHOLE, torch.float32), watch, PROMPTS, steps=4)
    assert amax == watch.largest
    assert set(amax) == {name for name in _weights() if is_quantized(name)}


def test_finer_formats_change_less() -> None:
    inputs = _inputs("step")
    exact = _simulated("step", Weights(_weights()), inputs)["entropy"]
    gaps = {
        s: (_simulated("step", SimulatedWeights(_quantized(s), s), inputs)["entropy"] - exact).abs().mean()
        for s in SCHEMES
    }
    assert 0 < gaps["fp8"] < min(gaps["int4"], gaps["nvfp4"])


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_file_of_a_rank_holds_its_matrices(scheme: str, tmp_path) -> None:
    spec = engine_weights(CONFIG, HALVES)
    experts = {name: _as_stored(name) for name in spec if is_quantized(name)}
    save_file({name: tensor.contiguous() for name, tensor in experts.items()}, tmp_path / "model.safetensors")
    file = tmp_path / "quantized.rank1.safetensors.part"
    quantize.write_quantized(file, tmp_path, spec, 1, scheme, torch.bfloat16, _amax())
    loaded = dict(quantize.load_quantized(file, scheme))
    expected: dict[str, Tensor] = {}
    for name, stored in experts.items():
        matrix = spec[name].of_rank(stored, 1).to(torch.bfloat16)
        expected |= quantize_weight(name, matrix, scheme, _amax()[name])
    assert loaded.keys() == expected.keys()
    assert all(
        torch.equal(_bytes(loaded[k]), _bytes(expected[k])) and loaded[k].dtype == expected[k].dtype for k in loaded
    )
    with pytest.raises(QuantizationError, match=f"holds {scheme} weights, but other was asked for"):
        dict(quantize.load_quantized(file, "other"))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_exclusions_of_hf_quant_config_are_all_that_is_not_quantised(scheme: str) -> None:
    found = quantize.hf_quant_config(scheme)["quantization"]
    assert found["quant_algo"] == {"fp8": "FP8", "int4": "W4A16_AWQ", "nvfp4": "NVFP4"}[scheme]
    assert found.get("group_size") == BLOCK.get(scheme)
    for name, weight in engine_weights(CONFIG, WHOLE).items():
        if len(weight.shape) == 2:
            excluded = any(fnmatch.fnmatch(name, pattern + "*") for pattern in found["exclude_modules"])
            assert excluded != is_quantized(name), name


# -- TensorRT-RTX ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("graph", ["encode", "step", "loop"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_tensorrt_rtx_builds_quantised_graphs(scheme: str, graph: str) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    model = _graph("encode" if graph == "encode" else "step", scheme, dtype=torch.bfloat16)
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
    each = {"fp8": (2, 1, 0), "int4": (1, 0, 0), "nvfp4": (4, 0, 1)}[scheme]  # layers for one matrix
    layers = trt.LayerType.DEQUANTIZE, trt.LayerType.QUANTIZE, trt.LayerType.DYNAMIC_QUANTIZE
    assert [kinds.count(kind) for kind in layers] == [count * matrices for count in each]


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
    onnx.save(_inlined(quantize_graph(model, scheme, {NAME: 4.0}), packed), tmp_path / "product.onnx")
    report = build_engine("tensorrt_rtx", tmp_path / "product.onnx", tmp_path / "engine", {}, targets=["sm_120"])
    assert bits * size**2 / 8 < report.bytes < 1.1 * bits * size**2 / 8 + 200_000
    assert list(report.network.inputs) == ["x"]


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
