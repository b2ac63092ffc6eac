"""Q/DQ nodes for the expert products of a traced graph; `schemes` says which tensors stand for a matrix.

A quantised graph can be looped, inlined and joined as any other, but not the other way round:

    model = to_loop(quantize_graph(trace("step", config, layout, dtype), "int4"), 48)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from export.graph.bodies import bodies
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
    """A copy of a traced graph whose expert products are quantised, those in bodies of loops too.

    `amax` (largest absolute activation by weight name) is for nvfp4, whose activation scales are constants.
    Raises `QuantizationError` where there is nothing to quantise: weights must be inputs still, and outside of a loop.
    """
    quantized = ModelProto()
    quantized.CopyFrom(model)
    kinds = {v.name: v.type.tensor_type for v in model.graph.input if is_quantized(v.name)}
    matrices = {name: _Matrix(name, scheme, kind.elem_type, len(kind.shape.dim)) for name, kind in kinds.items()}
    if not _quantize(quantized.graph, matrices, {name: name for name in matrices}, "", None):
        raise QuantizationError(
            "the graph has no product by an expert matrix that is an input; quantise what `trace` gives, not what "
            "to_loop or inline made of it"
        )
    inputs = list(quantized.graph.input)
    del quantized.graph.input[:]
    for value in inputs:
        if value.name in matrices:
            _replace_input(quantized.graph, value, scheme, amax or {})
        else:
            quantized.graph.input.append(value)
    if scheme == "nvfp4":
        _allow_nvfp4(quantized)
    return quantized


class _Matrix(NamedTuple):
    """An expert matrix that was an input of the graph: ONNX type and number of axes."""

    name: str
    scheme: str
    dtype: int
    rank: int


def _quantize(
    graph: GraphProto, matrices: Mapping[str, _Matrix], outer: Mapping[str, str], place: str, turn: str | None
) -> int:
    """Quantise the products of a graph and of its bodies, in place -> how many there are.

    `outer` tells which names are views of which matrix; `place` makes names of this graph unlike those around it. Each
    graph has Q/DQ nodes of its own: TensorRT fuses those beside a product, and what a body needs costs nothing while
    the body does not run. In a loop they wait for `turn`, a number that the loop changes.
    """
    views, count, made = dict(outer), 0, set[str]()
    nodes: list[NodeProto] = []
    for number, node in enumerate(graph.node):
        for body in bodies(node):
            count += _quantize(body, matrices, views, f"{place}.{number}", _turn(body))
        matrix = _matrix_of(node, views)
        for index, name in enumerate(node.input):
            if name in matrices:
                if name not in made:
                    nodes += _weight_nodes(matrices[name], place, turn)
                    made.add(name)
                node.input[index] = f"{name}{place}.dequantized"
        if matrix and node.op_type in _PRODUCTS:
            count += 1
            if matrices[matrix].scheme in QUANTIZE_ACTIVATIONS:
                nodes += _activation_nodes(node.input[0], matrices[matrix], place)
                node.input[0] = f"{matrix}{place}.input"
        elif matrix:
            views[node.output[0]] = matrix
        nodes.append(node)
    kept = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)
    return count


def _turn(body: GraphProto) -> str:
    """What a loop counts: its first value where that is a whole number (its own count may be absent), or its turns."""
    first = body.input[2]
    counts = first.type.tensor_type.elem_type == TensorProto.INT64 and not first.type.tensor_type.shape.dim
    return first.name if counts else body.input[0].name


_PRODUCTS = ("MatMul", "Gemm")  # torch writes MatMul after Transpose, or Gemm
_VIEWS = ("Transpose", "Reshape", "Gather")  # Gather: some of the experts


def _matrix_of(node: NodeProto, views: Mapping[str, str]) -> str | None:
    """The matrix that a node multiplies by, or of which it makes a view."""
    if node.op_type in _PRODUCTS:
        return views.get(node.input[1])
    return views.get(node.input[0]) if node.op_type in _VIEWS else None


def _replace_input(graph: GraphProto, value: ValueInfoProto, scheme: str, amax: Mapping[str, float]) -> None:
    kind = value.type.tensor_type
    shape = [dim.dim_value for dim in kind.shape.dim]
    for key, spec in packed_inputs(value.name, shape, scheme, TORCH_DTYPES[kind.elem_type]).items():
        if scheme == "nvfp4" and key.endswith(".input_scale"):
            step = input_scale(value.name, scheme, amax.get(value.name), torch.float32)
            graph.initializer.append(helper.make_tensor(key, spec.onnx_type, spec.shape, [float(step)]))
        else:
            graph.input.append(helper.make_tensor_value_info(key, spec.onnx_type, spec.shape))


def _weight_nodes(matrix: _Matrix, place: str, turn: str | None) -> Iterator[NodeProto]:
    name, scheme, dtype, rank = matrix
    result = f"{name}{place}.dequantized"
    scale = f"{name}.global_scale" if scheme == "nvfp4" else f"{name}.scale"
    if turn is not None:
        yield from _delayed(scale, turn, f"{result}.delayed")
        scale = f"{result}.delayed"
    if scheme == "fp8":
        yield _node("DequantizeLinear", [name, scale], [result])
    elif scheme == "int4":
        yield _node("DequantizeLinear", [name, scale], [result], axis=rank - 1, block_size=BLOCK[scheme])
    else:
        yield from _dequantize_twice(name, f"{name}.scale", scale, result, dtype)


def _delayed(scale: str, turn: str, result: str) -> Iterator[NodeProto]:
    """`scale` as a function of `turn`, which is never negative: else TensorRT dequantises ahead of the loop."""
    yield helper.make_node("Constant", [], [f"{result}.zero"], name=f"{result}.zero", value_int=0)
    yield helper.make_node("Constant", [], [f"{result}.axis"], name=f"{result}.axis", value_ints=[0])
    yield _node("Min", [turn, f"{result}.zero"], [f"{result}.index"])
    yield _node("Unsqueeze", [scale, f"{result}.axis"], [f"{result}.row"])
    yield _node("Gather", [f"{result}.row", f"{result}.index"], [result], axis=0)


def _activation_nodes(x: str, matrix: _Matrix, place: str) -> Iterator[NodeProto]:
    result = f"{matrix.name}{place}.input"
    step, steps, blocks = f"{matrix.name}.input_scale", f"{result}_quantized", f"{result}_blocks"
    if matrix.scheme == "fp8":
        yield _node("QuantizeLinear", [x, step], [steps], output_dtype=TensorProto.FLOAT8E4M3FN)
        yield _node("DequantizeLinear", [steps, step], [result])
        return
    yield _node(
        "TRT_FP4DynamicQuantize",
        [x, step],
        [steps, blocks],
        domain="trt",
        axis=-1,
        block_size=BLOCK[matrix.scheme],
        scale_type=TensorProto.FLOAT8E4M3FN,
    )
    yield from _dequantize_twice(steps, blocks, step, result, matrix.dtype)


def _dequantize_twice(values: str, scale: str, global_scale: str, result: str, dtype: int) -> Iterator[NodeProto]:
    """NVFP4's two levels, in float32."""
    single = result if dtype == TensorProto.FLOAT else f"{result}.float32"
    yield _node("DequantizeLinear", [scale, global_scale], [f"{result}.scale"])
    yield _node("DequantizeLinear", [values, f"{result}.scale"], [single], axis=-1, block_size=BLOCK["nvfp4"])
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
