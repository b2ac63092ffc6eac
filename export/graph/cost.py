"""Count what a graph computes, reads and sends from its ONNX; `export.roofline` says what counts.

Sizes come from the graph itself: its dynamic axes are fixed, then constants are folded and shapes inferred from node to
node. Tensors of the size of weights are never looked at, only their shapes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import NamedTuple

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from export.graph.bodies import bodies, graphs, read_by
from nemo_diffgemma.errors import UserError

_SMALL = 1024  # elements: initializers up to this many may hold shapes
_COLLECTIVE = "collective."  # prefix of the name of what stands for a collective
_NARROW: dict[int, str] = {  # types of dequantised operands that tensor cores multiply as they are
    TensorProto.FLOAT8E4M3FN: "fp8",
    TensorProto.FLOAT8E5M2: "fp8",
    TensorProto.FLOAT4E2M1: "nvfp4",
    TensorProto.INT8: "int8",
}
_TYPES: dict[int, str] = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
}
_FOUR_BITS = (TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1)
_VIEWS = ("Transpose", "Reshape", "Cast", "Identity", "Squeeze", "Unsqueeze")
_LOOKS_UP = ("Gather", "GatherElements", "GatherND")


class RooflineError(UserError):
    """A graph that cannot be counted, or a GPU that it cannot run on; the message says what to give instead."""


@dataclass(frozen=True)
class Cost:
    """FLOPs by type, bytes of memory traffic, bytes sent to other ranks; `weight_bytes` must fit into memory.

    `round_flops_by_dtype` and `round_bytes` come on top for every round of the loops over overloaded experts, one in
    each layer.
    """

    flops_by_dtype: Mapping[str, float]
    bytes: float
    collective_bytes: float
    weight_bytes: float
    round_flops_by_dtype: Mapping[str, float] = field(default_factory=dict)
    round_bytes: float = 0.0

    def divided(self, steps: int) -> Cost:
        """The share of one of `steps` equal steps. The weights stay what they are."""
        flops, more = (
            {dtype: flops / steps for dtype, flops in by_dtype.items()}
            for by_dtype in (self.flops_by_dtype, self.round_flops_by_dtype)
        )
        sent = self.collective_bytes / steps
        return Cost(flops, self.bytes / steps, sent, self.weight_bytes, more, self.round_bytes / steps)

    def with_rounds(self, rounds: float) -> Cost:
        """What a run costs in which the loops over overloaded experts have so many rounds, on average over layers."""
        flops = dict(self.flops_by_dtype)
        for dtype, more in self.round_flops_by_dtype.items():
            flops[dtype] = flops.get(dtype, 0.0) + rounds * more
        return replace(self, flops_by_dtype=flops, bytes=self.bytes + rounds * self.round_bytes)


class _Kind(NamedTuple):
    elements: int
    shape: tuple[int, ...]
    dtype: int

    @property
    def bytes(self) -> float:
        if self.dtype in _FOUR_BITS:
            return self.elements / 2
        return self.elements * helper.tensor_dtype_to_np_dtype(self.dtype).itemsize


def count(model: ModelProto, sizes: Mapping[str, int], weights: Collection[str] | None = None) -> Cost:
    """Cost of one run. `sizes` gives every dynamic axis a size; loops as long as a stack run `sizes["steps"]` times.

    Loops that end by a condition are those over overloaded experts: the cost of a round of each stands apart. One whose
    first condition is known beforehand has one turn, around products by quantised experts.
    `weights` names the weight inputs, or their prefix up to a dot (`<weight>.scale` is one too); None: every input of
    a fixed shape. Initializers are weights in any case. Raises `RooflineError` for an axis without size, and for a
    graph whose shapes cannot be inferred.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    held = constants | {
        v.name for v in model.graph.input if _is_fixed(v) and (weights is None or _is_of(v.name, weights))
    }
    twin = _inferred(_with_sizes(model, sizes))
    counter = _Counter(sizes, {value.name for value in model.graph.input} | constants, twin)
    run, one_round = _Sums(), _Sums()
    kinds = counter.walk(twin.graph, {}, 1, run, one_round)
    written = sum(kinds[value.name].bytes for value in twin.graph.output)
    weight_bytes = sum(kinds[name].bytes for name in held if name in kinds)
    return Cost(dict(run.flops), run.read + written, run.sent, weight_bytes, dict(one_round.flops), one_round.read)


def _is_fixed(value: ValueInfoProto) -> bool:
    return all(dim.HasField("dim_value") for dim in value.type.tensor_type.shape.dim)


def _is_of(name: str, weights: Collection[str]) -> bool:
    return name in weights or name.rpartition(".")[0] in weights


# -- shapes ------------------------------------------------------------------------------------------------------------


def _with_sizes(model: ModelProto, sizes: Mapping[str, int]) -> ModelProto:
    """A copy without dynamic axes and large constants, in which only operators with known shapes are left."""
    copy = ModelProto()
    copy.CopyFrom(model)
    large = [tensor for tensor in copy.graph.initializer if prod(tensor.dims) > _SMALL]
    small = [tensor for tensor in copy.graph.initializer if prod(tensor.dims) <= _SMALL]
    inputs = {value.name for value in copy.graph.input}
    del copy.graph.initializer[:]
    copy.graph.initializer.extend(small)
    copy.graph.input.extend(
        helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in large if t.name not in inputs
    )
    for graph in graphs(copy.graph):
        for value in [*graph.input, *graph.output]:
            for dim in value.type.tensor_type.shape.dim:
                if dim.HasField("dim_param"):
                    dim.dim_value = _size(dim.dim_param, sizes)
        del graph.value_info[:]
        nodes = [replacement for node in graph.node for replacement in _standard(node)]
        del graph.node[:]
        graph.node.extend(nodes)
    for graph in graphs(copy.graph):
        graph.value_info.extend(state for node in graph.node for state in _states(node))
    return copy


def _states(node: NodeProto) -> Iterator[ValueInfoProto]:
    """What a loop carries, with the shapes that its body says: shape inference takes them for variable."""
    if node.op_type == "Loop":
        body = next(bodies(node))
        for name, value in zip(node.output, body.output[1 : len(node.input) - 1], strict=False):
            state = ValueInfoProto()
            state.CopyFrom(value)
            state.name = name
            yield state


def _size(axis: str, sizes: Mapping[str, int]) -> int:
    """Size of an axis, in bodies of loops also a product, `4*batch`."""
    size = 1
    for factor in axis.split("*"):
        if not factor.isdecimal() and factor not in sizes:
            raise RooflineError(f"the graph has an axis {factor!r}, sizes give {', '.join(sizes)}; give it a size too")
        size *= int(factor) if factor.isdecimal() else sizes[factor]
    return size


def _standard(node: NodeProto) -> Iterator[NodeProto]:
    """A node, or ONNX operators with its shapes and types where it is TensorRT's own."""
    if node.op_type == "DistCollective":
        operation = next(a.s.decode() for a in node.attribute if a.name == "collective_operation")
        if operation != "all_reduce":
            raise RooflineError(f"node {node.name} is a collective {operation!r}; only all_reduce is counted")
        yield helper.make_node("Neg", list(node.input), list(node.output), name=_COLLECTIVE + node.output[0])
    elif node.op_type == "TRT_FP4DynamicQuantize":
        yield helper.make_node("Cast", [node.input[0]], [node.output[0]], to=TensorProto.FLOAT4E2M1)
        yield helper.make_node("Cast", [node.input[1]], [node.output[1]], to=TensorProto.FLOAT8E4M3FN)
    else:
        yield node


def _inferred(model: ModelProto) -> ModelProto:
    from onnxscript import ir, optimizer

    folded = ir.from_proto(model)
    optimizer.fold_constants(folded, onnx_shape_inference=True)
    return ir.to_proto(folded)


# -- counting ----------------------------------------------------------------------------------------------------------


@dataclass
class _Sums:
    """FLOPs by type, bytes read and bytes sent."""

    flops: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    read: float = 0.0
    sent: float = 0.0


class _Counter:
    """Sums over nodes. `sources` are the tensors that lie in memory when the graph starts."""

    def __init__(self, sizes: Mapping[str, int], sources: Collection[str], model: ModelProto) -> None:
        self._sizes, self._sources = sizes, sources
        self._constants = {
            name
            for graph in graphs(model.graph)
            for name in (
                *(tensor.name for tensor in graph.initializer),
                *(node.output[0] for node in graph.node if node.op_type == "Constant"),
            )
        }

    def walk(
        self, graph: GraphProto, outer: Mapping[str, _Kind], times: int, sums: _Sums, one_round: _Sums
    ) -> dict[str, _Kind]:
        """Add a graph that runs `times` times to `sums`, and a round of its loops over experts to `one_round`.

        Returns its tensors, and those around it.
        """
        kinds = {**outer, **_kinds(graph)}
        made = {name: node for node in graph.node for name in node.output}
        readers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in read_by(node):
                readers[name].append(node)
            if node.op_type in ("MatMul", "Gemm"):
                dtype, flops = _product(node, kinds, made)
                sums.flops[dtype] += times * flops
            elif node.name.startswith(_COLLECTIVE):
                sums.sent += times * _kind(node.input[0], kinds, node).bytes
            elif node.op_type == "Loop" and node.input[0]:
                turns = times * self._iterations(node, graph, made)
                self.walk(next(bodies(node)), kinds, turns, sums, one_round)
            elif node.op_type == "Loop":
                rest = sums if node.input[1] in self._constants else one_round
                self.walk(next(bodies(node)), kinds, times, rest, one_round)
            elif any(bodies(node)):
                raise RooflineError(f"node {node.name} ({node.op_type}) has a graph inside; only Loop is counted")
        for name, nodes in readers.items():
            if name in self._sources:  # what a body reads of them is counted there
                direct = [node for node in nodes if name in node.input]
                sums.read += times * kinds[name].bytes * _share_read(name, direct, kinds, readers)
        return kinds

    def _iterations(self, loop: NodeProto, graph: GraphProto, made: Mapping[str, NodeProto]) -> int:
        name = loop.input[0]
        for tensor in graph.initializer:
            if tensor.name == name:
                return int(onnx.numpy_helper.to_array(tensor))
        if name in made and made[name].op_type == "Constant":
            value = made[name].attribute[0]
            return value.i if value.type == onnx.AttributeProto.INT else int(onnx.numpy_helper.to_array(value.t))
        return _size("steps", self._sizes)


def _share_read(
    name: str, nodes: Sequence[NodeProto], kinds: Mapping[str, _Kind], readers: Mapping[str, list[NodeProto]]
) -> float:
    """The part of a tensor that `nodes` read: of one that is only looked up, dequantised or not, what is looked up."""
    share = 0.0
    for node in nodes:
        looked_up = 1.0
        if node.op_type in _LOOKS_UP and node.input[0] == name:
            looked_up = _kind(node.output[0], kinds, node).elements / _kind(name, kinds, node).elements
        if looked_up != 1.0:
            share += looked_up
        elif node.op_type in (*_VIEWS, *_LOOKS_UP, "DequantizeLinear") and node.output[0] in readers:
            share += _share_read(node.output[0], readers[node.output[0]], kinds, readers)
        elif node.op_type not in ("Shape", "Size"):
            return 1.0
    return min(share, 1.0)


def _kinds(graph: GraphProto) -> dict[str, _Kind]:
    kinds = {}
    for value in [*graph.value_info, *graph.input, *graph.output]:
        kind = value.type.tensor_type
        if kind.HasField("shape") and all(dim.HasField("dim_value") for dim in kind.shape.dim):
            shape = tuple(dim.dim_value for dim in kind.shape.dim)
            kinds[value.name] = _Kind(prod(shape), shape, kind.elem_type)
    for tensor in graph.initializer:
        kinds[tensor.name] = _Kind(prod(tensor.dims), tuple(tensor.dims), tensor.data_type)
    return kinds


def _kind(name: str, kinds: Mapping[str, _Kind], node: NodeProto) -> _Kind:
    if name not in kinds:
        raise RooflineError(
            f"the shape of {name!r} (node {node.name}, {node.op_type}) cannot be inferred; only graphs of "
            "export.graph.tracing, looped, quantised or inlined, can be counted"
        )
    return kinds[name]


def _product(node: NodeProto, kinds: Mapping[str, _Kind], made: Mapping[str, NodeProto]) -> tuple[str, int]:
    """Type and FLOPs of MatMul or Gemm: two for every element of the result and of the contracted axis."""
    left, result = (_kind(name, kinds, node) for name in (node.input[0], node.output[0]))
    transposed = node.op_type == "Gemm" and any(a.name == "transA" and a.i for a in node.attribute)
    contracted = left.shape[0] if transposed else left.shape[-1]
    stored = {_stored(name, kinds, made) for name in node.input[:2]}
    dtype = _NARROW.get(stored.pop()) if len(stored) == 1 else None
    return dtype or _TYPES.get(left.dtype, "float32"), 2 * result.elements * contracted


def _stored(name: str, kinds: Mapping[str, _Kind], made: Mapping[str, NodeProto]) -> int:
    """The type that an operand had before it was dequantised; 0 where it never was."""
    while name in made and made[name].op_type in (*_VIEWS, *_LOOKS_UP):
        name = made[name].input[0]
    if name in made and made[name].op_type == "DequantizeLinear":
        source = made[name].input[0]
        return kinds[source].dtype if source in kinds else 0
    return 0
