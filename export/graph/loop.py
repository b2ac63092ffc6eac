"""The loop over denoising steps inside one graph: a traced `step` becomes the body of an ONNX Loop.

The canvas and its soft embedding are carried; temperature, uniforms and replacements are taken from stacks, one entry a
step; weights, context and padding stay outside. What does not change from step to step (masks, rotary tables) is
computed once, before the loop.
"""

from __future__ import annotations

import copy

from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from export.graph.bodies import read_by, rename

CARRIED = {"canvas": "next_canvas", "soft": "next_soft"}
STACKED = {"temperature": "temperatures", "uniforms": "uniforms", "replacements": "replacements"}
OF_EVERY_STEP = ("entropy", "accepted_count")
OUTPUTS = (*CARRIED.values(), "argmax", *OF_EVERY_STEP)


def to_loop(step: ModelProto, steps: int | None) -> ModelProto:
    """`step` repeated `steps` times; None: as often as the stacks are long.

    Inputs `temperatures` [N, B], `uniforms` and `replacements` [N, B, C] instead of one step's. Outputs: `next_canvas`,
    `next_soft` and `argmax` after the last step, and of every step `entropy` [N, B, C] and `accepted_count` [N, B].
    """
    graph = step.graph
    inputs, results = ({value.name: value for value in values} for values in (graph.input, graph.output))
    before, inside = _split(step)
    names = {name: f"body.{name}" for name in (*CARRIED, *STACKED, *(n for node in inside for n in node.output))}
    taken = [_value(inputs[name], names[name]) for name in CARRIED] + [_value(results["argmax"], "body.last_argmax")]
    body = helper.make_graph(
        [
            *(helper.make_node("Gather", [STACKED[name], "body.index"], [names[name]], axis=0) for name in STACKED),
            *(_renamed(node, names) for node in inside),
            helper.make_node("Identity", ["body.go_on"], ["body.still"]),
        ],
        "denoising_step",
        [_scalar("body.index", TensorProto.INT64), _scalar("body.go_on", TensorProto.BOOL), *taken],
        [_scalar("body.still", TensorProto.BOOL), *(_value(results[name], names[name]) for name in OUTPUTS)],
    )
    loop = helper.make_node(
        "Loop", ["loop.count", "loop.true", *CARRIED, "canvas"], list(OUTPUTS), name="denoising_loop", body=body
    )  # any [B, C] ids may stand for the arg-max of no step
    outer = helper.make_graph(
        [*before, *_count(steps), loop],
        "loop",
        [_stacked(value, STACKED[name], steps) if name in STACKED else value for name, value in inputs.items()],
        [_stacked(results[name], name, steps) if name in OF_EVERY_STEP else results[name] for name in OUTPUTS],
        [*graph.initializer, helper.make_tensor("loop.true", TensorProto.BOOL, [], [True])],
    )
    return helper.make_model(
        outer, opset_imports=step.opset_import, ir_version=step.ir_version, producer_name=step.producer_name
    )


def _split(step: ModelProto) -> tuple[list[NodeProto], list[NodeProto]]:
    """Nodes that can run once before the loop, and the others.

    What is made of weights alone stays inside: outside, a transposed copy of every weight would have to be kept.
    """
    small = {"first", "past_length", "rank"} | {i.name for i in step.graph.initializer}
    outer = {value.name for value in step.graph.input} - {*CARRIED, *STACKED}
    before, inside = [], []
    for node in step.graph.node:
        sizes_only = node.op_type == "Shape" and node.input[0] in outer
        if sizes_only or read_by(node) <= small:
            small.update(node.output)
            before.append(node)
        else:
            inside.append(node)
    return before, inside


def _renamed(node: NodeProto, names: dict[str, str]) -> NodeProto:
    node = copy.deepcopy(node)
    rename(node, lambda name: names.get(name, name))
    return node


def _count(steps: int | None) -> list[NodeProto]:
    """`loop.count`, the number of steps."""
    if steps is not None:
        return [helper.make_node("Constant", [], ["loop.count"], value_int=steps)]
    return [
        helper.make_node("Shape", [STACKED["temperature"]], ["loop.shape"]),
        helper.make_node("Constant", [], ["loop.first_axis"], value_int=0),
        helper.make_node("Gather", ["loop.shape", "loop.first_axis"], ["loop.count"], axis=0),
    ]


def _scalar(name: str, kind: int) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, [])


def _dims(value: ValueInfoProto) -> list[int | str]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def _value(value: ValueInfoProto, name: str) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, value.type.tensor_type.elem_type, _dims(value))


def _stacked(value: ValueInfoProto, name: str, steps: int | None) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, value.type.tensor_type.elem_type, [steps or "steps", *_dims(value)])
