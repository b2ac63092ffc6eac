"""Q/DQ nodes for the expert products of a traced graph; `schemes` says which tensors stand for a matrix.

A quantised graph can be looped, inlined and joined as any other, but not the other way round:

    model = to_loop(quantize_graph(trace("step", config, layout, dtype), "int4"), 48)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from export.quantization.schemes import (
    BLOCK,
    QUANTIZE_ACTIVATIONS,
    TORCH_DTYPES,
    QuantizationError,
    input_scale,
    is_quantized,
    packed_inputs,
)


def quantize_graph(model: ModelProto, scheme: str, amax: Mapping[str, float] | None = None) -> ModelProto:
    """A copy of a traced graph whose expert products are quantised.

    `amax` (largest absolute activation by weight name) is for nvfp4, whose activation scales are constants.
    Raises `QuantizationError` where there is nothing to quantise: weights must be inputs still, and outside of a loop.
    """
    products = _products(model)
    if not products:
        raise QuantizationError(
            "the graph has no product by an expert matrix that is an input; quantise what `trace` gives, not what "
            "to_loop or inline made of it"
        )
    quantized = ModelProto()
    quantized.CopyFrom(model)
    graph = quantized.graph
    del graph.input[:], graph.node[:]
    dtypes: dict[str, int] = {}
    for value in model.graph.input:
        if is_quantized(value.name):
            dtypes[value.name] = value.type.tensor_type.elem_type
            _replace_input(graph, value, scheme, amax or {})
        else:
            graph.input.append(value)
    dequantized: set[str] = set()
    for original in model.graph.node:
        node = NodeProto()
        node.CopyFrom(original)
        for place, name in enumerate(node.input):
            if name in dtypes:
                if name not in dequantized:
                    graph.node.extend(_weight_nodes(name, scheme, dtypes[name]))
                    dequantized.add(name)
                node.input[place] = f"{name}.dequantized"
        if node.output[0] in products and scheme in QUANTIZE_ACTIVATIONS:
            name = products[node.output[0]]
            graph.node.extend(_activation_nodes(node.input[0], name, scheme, dtypes[name]))
            node.input[0] = f"{name}.input"
        graph.node.append(node)
    if scheme == "nvfp4":
        _allow_nvfp4(quantized)
    return quantized


def _products(model: ModelProto) -> dict[str, str]:
    """Output of every product by an expert matrix -> the matrix. torch writes MatMul after Transpose, or Gemm."""
    matrices = {value.name: value.name for value in model.graph.input if is_quantized(value.name)}
    products = {}
    for node in model.graph.node:
        if node.op_type == "Transpose" and node.input[0] in matrices:
            matrices[node.output[0]] = matrices[node.input[0]]
        elif node.op_type in ("MatMul", "Gemm") and node.input[1] in matrices:
            products[node.output[0]] = matrices[node.input[1]]
    return products


def _replace_input(graph: GraphProto, value: ValueInfoProto, scheme: str, amax: Mapping[str, float]) -> None:
    kind = value.type.tensor_type
    shape = [dim.dim_value for dim in kind.shape.dim]
    for key, spec in packed_inputs(value.name, shape, scheme, TORCH_DTYPES[kind.elem_type]).items():
        if scheme == "nvfp4" and key.endswith(".input_scale"):
            step = input_scale(value.name, scheme, amax.get(value.name), torch.float32)
            graph.initializer.append(helper.make_tensor(key, spec.onnx_type, spec.shape, [float(step)]))
        else:
            graph.input.append(helper.make_tensor_value_info(key, spec.onnx_type, spec.shape))


def _weight_nodes(name: str, scheme: str, dtype: int) -> Iterator[NodeProto]:
    scale, result = f"{name}.scale", f"{name}.dequantized"
    if scheme == "fp8":
        yield _node("DequantizeLinear", [name, scale], [result])
    elif scheme == "int4":
        yield _node("DequantizeLinear", [name, scale], [result], axis=1, block_size=BLOCK[scheme])
    else:
        yield from _dequantize_twice(name, scale, f"{name}.global_scale", result, dtype)


def _activation_nodes(x: str, name: str, scheme: str, dtype: int) -> Iterator[NodeProto]:
    step, steps, result = f"{name}.input_scale", f"{name}.input_quantized", f"{name}.input"
    if scheme == "fp8":
        yield _node("QuantizeLinear", [x, step], [steps], output_dtype=TensorProto.FLOAT8E4M3FN)
        yield _node("DequantizeLinear", [steps, step], [result])
        return
    blocks = f"{name}.input_blocks"
    yield _node(
        "TRT_FP4DynamicQuantize",
        [x, step],
        [steps, blocks],
        domain="trt",
        axis=-1,
        block_size=BLOCK[scheme],
        scale_type=TensorProto.FLOAT8E4M3FN,
    )
    yield from _dequantize_twice(steps, blocks, step, result, dtype)


def _dequantize_twice(values: str, scale: str, global_scale: str, result: str, dtype: int) -> Iterator[NodeProto]:
    """NVFP4's two levels, in float32."""
    single = result if dtype == TensorProto.FLOAT else f"{result}.float32"
    yield _node("DequantizeLinear", [scale, global_scale], [f"{scale}.float32"])
    yield _node("DequantizeLinear", [values, f"{scale}.float32"], [single], axis=-1, block_size=BLOCK["nvfp4"])
    if single != result:
        yield _node("Cast", [single], [result], to=dtype)


def _allow_nvfp4(model: ModelProto) -> None:
    """FLOAT4E2M1 came with opset 23, which adds types to older operators and changes none."""
    for opset in model.opset_import:
        if opset.domain == "":
            opset.version = max(opset.version, 23)
    if all(opset.domain != "trt" for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid("trt", 1))
    model.ir_version = max(model.ir_version, 11)


def _node(kind: str, inputs: list[str], outputs: list[str], **attributes: Any) -> NodeProto:
    """A node named after its output: graphs of several ranks are joined by prefixing names."""
    return helper.make_node(kind, inputs, outputs, name=outputs[0], **attributes)
