"""Graphs with graphs inside: the bodies of loops, which read names of the graphs around them.

Every change of names, of inputs or of nodes has to reach them too. Names in a body are unlike all names around it, as
ONNX wants it; bodies beside each other may share theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from onnx import GraphProto, NodeProto


def bodies(node: NodeProto) -> Iterator[GraphProto]:
    """The graphs that a node holds, not those inside of them."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g


def graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """A graph and all graphs inside of it, outer ones first."""
    yield graph
    for node in graph.node:
        for body in bodies(node):
            yield from graphs(body)


def read_by(node: NodeProto) -> set[str]:
    """Every name that a node reads from the graph it stands in: its inputs, and what its bodies take from there."""
    names = set(filter(None, node.input))
    for body in bodies(node):
        made = {value.name for value in (*body.input, *body.initializer)}
        made |= {name for inner in body.node for name in inner.output}
        inside = {name for inner in body.node for name in read_by(inner)} | {value.name for value in body.output}
        names |= inside - made
    return names


def rename(node: NodeProto, new: Callable[[str], str]) -> None:
    """Rename what a node reads and makes, and every value of its bodies; an absent input stays absent."""
    for names in (node.input, node.output):
        names[:] = [new(name) if name else name for name in names]
    for body in bodies(node):
        for inner in body.node:
            rename(inner, new)
        for value in (*body.input, *body.output, *body.initializer, *body.value_info):
            value.name = new(value.name)
