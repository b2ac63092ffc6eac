"""ONNX Runtime behind the interface that every engine has: `run` one graph on the ranks of a bundle.

All ranks of a bundle run in this one process: their graphs are joined, every collective becoming a sum over them. So a
bundle for several GPUs can be opened, and its numbers checked, without any.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import onnx
import torch
from onnx import ModelProto, helper
from torch import Tensor

from export.graph.bodies import rename

Tensors = Mapping[str, Tensor]


class Session(Protocol):
    """A graph, ready to run, with its weights."""

    def run(self, shared: Tensors, ranked: Sequence[Tensors]) -> list[dict[str, Tensor]]:
        """Outputs of each rank that lives in this process; `ranked` are inputs that differ between those ranks."""


class OnnxSession:
    """Graphs of all ranks of a bundle in ONNX Runtime on the CPU.

    `weights` holds the weight inputs of each rank; `directory` is where files lie that the graphs refer to.
    """

    def __init__(self, models: Sequence[ModelProto], weights: Sequence[Tensors], directory: Path | None = None) -> None:
        import onnxruntime

        self._ranks = len(models)
        model = join(models)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        if directory is not None:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(directory))
        self._session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        wanted = [value.name for value in self._session.get_inputs()]
        self._names = {name: _rank_and_name(name, self._ranks) for name in wanted}
        self._weights = {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(weights[rank][inner].numpy())
            for name, (rank, inner) in self._names.items()
            if inner in weights[rank]
        }
        self._outputs = [value.name for value in self._session.get_outputs()]

    def run(self, shared: Tensors, ranked: Sequence[Tensors]) -> list[dict[str, Tensor]]:
        import onnxruntime

        feed: dict[str, Any] = dict(self._weights)
        for name, (rank, inner) in self._names.items():
            if name not in feed:
                given = ranked[rank][inner] if inner in ranked[rank] else shared[inner]
                feed[name] = onnxruntime.OrtValue.ortvalue_from_numpy(given.contiguous().numpy())
        values = self._session.run_with_ort_values(self._outputs, feed)
        outputs: list[dict[str, Tensor]] = [{} for _ in range(self._ranks)]
        for name, value in zip(self._outputs, values, strict=True):
            rank, inner = _rank_and_name(name, self._ranks)
            outputs[rank][inner] = torch.from_numpy(value.numpy())
        return outputs


def join(models: Sequence[ModelProto]) -> ModelProto:
    """One graph that computes what the graphs of all ranks compute together. Names are prefixed `0/`, `1/`, ...

    Rank graphs have the same nodes in the same order; a graph of one rank is returned as it is.
    """
    if len(models) == 1:
        return models[0]
    graphs = [model.graph for model in models]
    nodes = []
    for same in zip(*(graph.node for graph in graphs), strict=True):
        if same[0].op_type == "DistCollective":
            parts = [f"{rank}/{node.input[0]}" for rank, node in enumerate(same)]
            nodes.append(helper.make_node("Sum", parts, [f"sum/{same[0].output[0]}"]))
            nodes += [
                helper.make_node("Identity", [nodes[-1].output[0]], [f"{rank}/{node.output[0]}"])
                for rank, node in enumerate(same)
            ]
        else:
            nodes += [_prefixed(node, rank) for rank, node in enumerate(same)]
    inputs, outputs, constants = (
        [_prefixed_value(value, rank) for rank, graph in enumerate(graphs) for value in getattr(graph, field)]
        for field in ("input", "output", "initializer")
    )
    opsets = [opset for opset in models[0].opset_import if opset.domain == ""]
    joined = helper.make_graph(nodes, "joined", inputs, outputs, constants)
    return helper.make_model(joined, opset_imports=opsets, ir_version=models[0].ir_version)


def _prefixed(node: onnx.NodeProto, rank: int) -> onnx.NodeProto:
    copied = onnx.NodeProto()
    copied.CopyFrom(node)
    copied.name = f"{rank}/{node.name}"
    rename(copied, lambda name: f"{rank}/{name}")
    return copied


def _prefixed_value(value: Any, rank: int) -> Any:
    copied = type(value)()
    copied.CopyFrom(value)
    copied.name = f"{rank}/{value.name}"
    return copied


def _rank_and_name(name: str, ranks: int) -> tuple[int, str]:
    if ranks == 1:
        return 0, name
    rank, _, inner = name.partition("/")
    return int(rank), inner
