"""From functions to ONNX: weights as inputs, batch and context lengths dynamic, nothing of the weights in memory.

Traced once for all ranks: what differs between ranks (which rows, which experts) is weights and the input `rank`.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from onnx import ModelProto
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from export.graph.bodies import graphs, read_by, rename
from export.graph.model import Model, Weights
from export.graph.weights import Weight, engine_weights
from nemo_diffgemma.config import GLOBAL, SLIDING, ModelConfig
from nemo_diffgemma.parallel.layout import ParallelLayout

OPSET = 22  # the first in which every operator used here takes bfloat16

STEP_OUTPUTS = ("next_canvas", "next_soft", "argmax", "entropy", "accepted", "accepted_count")


def past_names(layer: int) -> tuple[str, str]:
    """Inputs that hold the context of a layer, [B, G, columns, D]."""
    return f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"


def present_names(layer: int) -> tuple[str, str]:
    """Outputs of `encode`: keys and values of the new columns, [B, G, S, D]."""
    return f"present.{layer}.key", f"present.{layer}.value"


def trace(
    graph: str,
    config: ModelConfig,
    layout: ParallelLayout,
    dtype: torch.dtype,
    experts: str = "sparse",
    quantized: str | None = None,
) -> ModelProto:
    """ONNX of `encode` or `step` of one rank. Inputs that the graph does not read are left out.

    A graph that `quantize_graph` will be given is traced for where the `quantized` weights will lie: `inputs` or
    `inline`.
    """
    # made of real tensors: its rotary frequencies become constants
    module = (_Encode if graph == "encode" else _Step)(Model(config, layout, dtype, experts), quantized)
    outputs: tuple[str, ...] = STEP_OUTPUTS
    if graph == "encode":
        outputs = tuple(name for layer in range(config.num_hidden_layers) for name in present_names(layer))
    inputs, dynamic = example_inputs(graph, config, layout, dtype)
    return to_onnx(module, engine_weights(config, layout, experts), dtype, inputs, dynamic, outputs)


def to_onnx(
    module: nn.Module,
    weights: Mapping[str, Weight],
    dtype: torch.dtype,
    inputs: Mapping[str, Tensor],
    dynamic: Mapping[str, Mapping[int, str]],
    outputs: Sequence[str],
) -> ModelProto:
    """ONNX of a module that is called with `weights` and `inputs` by name and returns tensors called `outputs`.

    `dynamic` names the axes of inputs that may change from call to call.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, _quiet():
        held = {name: torch.empty(weight.shape, dtype=dtype) for name, weight in weights.items()}
        given = {name: mode.from_tensor(tensor) for name, tensor in inputs.items()}
        program = torch.export.export(
            module,
            (),
            dict(weights=held, inputs=given),
            dynamic_shapes=dict(
                weights=dict.fromkeys(held),
                inputs={name: dict.fromkeys(axes, torch.export.Dim.AUTO) for name, axes in dynamic.items()},
            ),
            strict=False,
        )
    with _quiet():
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=[*held, *given],
            output_names=[_OUTPUT + name for name in outputs],
            verbose=False,
        )
    assert exported is not None
    model = exported.model_proto
    _name_outputs(model)
    _keep_used_inputs(model)
    _name_axes(model, dynamic)
    _forget_origin(model)
    model.producer_name = "nemo_diffgemma"
    _empty(program, exported.exported_program)
    return model


def _empty(*programs: Any) -> None:
    """Let go of what torch's graphs hold: they outlive their programs, at full size with several hundred MB."""
    for program in programs:
        for node in program.graph.nodes:
            node.meta.clear()
    FakeTensorMode.cache_clear()
    gc.collect()


class _Step(nn.Module):
    def __init__(self, model: Model, quantized: str | None) -> None:
        super().__init__()
        self._model, self._quantized = model, quantized

    def forward(self, weights: dict[str, Tensor], inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        given = dict(inputs)
        past = _pop_past(given, self._model.config)
        return self._model.step(Weights(weights, self._quantized), past=past, **given)


class _Encode(_Step):
    def forward(self, weights: dict[str, Tensor], inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        given = dict(inputs)
        past = _pop_past(given, self._model.config)
        fresh = self._model.encode(Weights(weights, self._quantized), past=past, **given)
        return tuple(tensor for pair in fresh for tensor in pair)


def _pop_past(inputs: dict[str, Tensor], config: ModelConfig) -> list[tuple[Tensor, Tensor]]:
    names = [past_names(layer) for layer in range(config.num_hidden_layers)]
    return [(inputs.pop(key), inputs.pop(value)) for key, value in names]


def example_inputs(
    graph: str, config: ModelConfig, layout: ParallelLayout, dtype: torch.dtype, rows: int = 2, new: int = 5
) -> tuple[dict[str, Tensor], dict[str, dict[int, str]]]:
    """Inputs besides the weights, zeros, and which of their axes may change from call to call."""
    batch, chunk = "batch", "chunk"
    columns = {GLOBAL: "context_columns", SLIDING: "window_columns"}
    inputs: dict[str, Tensor] = {}
    dynamic: dict[str, dict[int, str]] = {}

    def add(name: str, shape: tuple[int, ...], dtype: torch.dtype, axes: dict[int, str]) -> None:
        inputs[name], dynamic[name] = torch.zeros(shape, dtype=dtype), axes

    if graph == "encode":
        add("input_ids", (rows, new), torch.int64, {0: batch, 1: chunk})
    else:
        shape = (rows, config.canvas_length)
        add("canvas", shape, torch.int64, {0: batch})
        add("soft", (*shape, config.hidden_size), dtype, {0: batch})
        add("temperature", (rows,), torch.float32, {0: batch})
        add("entropy_bound", (rows,), torch.float32, {0: batch})
        add("uniforms", shape, torch.float32, {0: batch})
        add("replacements", shape, torch.int64, {0: batch})
    add("first", (rows,), torch.int64, {0: batch})
    add("past_length", (rows,), torch.int64, {0: batch})
    add("rank", (), torch.int64, {})
    for layer in range(config.num_hidden_layers):
        head_dim, heads = config.heads_of_rank(layer, layout.tensor)
        kind = config.layer_kind(layer)
        held = 7 if kind == GLOBAL else 3
        for name in past_names(layer):
            add(name, (rows, heads, held, head_dim), dtype, {0: batch, 2: columns[kind]})
    return inputs, dynamic


_OUTPUT = "output."


def _name_outputs(model: ModelProto) -> None:
    """torch names values after its operators, `argmax` for one: outputs are renamed when theirs are out of the way."""
    ours = {value.name.removeprefix(_OUTPUT) for value in model.graph.output}

    def name(old: str) -> str:
        return "inner." + old if old in ours else old.removeprefix(_OUTPUT)

    for node in model.graph.node:
        rename(node, name)
    for value in model.graph.output:
        value.name = name(value.name)


def _keep_used_inputs(model: ModelProto) -> None:
    used = {name for node in model.graph.node for name in read_by(node)}
    kept = [value for value in model.graph.input if value.name in used]
    del model.graph.input[:]
    model.graph.input.extend(kept)


def _name_axes(model: ModelProto, dynamic: Mapping[str, Mapping[int, str]]) -> None:
    """torch names dynamic axes s41, s3, ...: call them what they are. Axes of bodies may be products, `4*batch`."""
    names: dict[str, str] = {}
    for value in model.graph.input:
        for axis, name in dynamic.get(value.name, {}).items():
            dim = value.type.tensor_type.shape.dim[axis]
            names[dim.dim_param] = name
            dim.dim_param = name
    for graph in graphs(model.graph):
        inside = graph.input if graph is not model.graph else []
        for value in (*inside, *graph.output):
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_param:
                    dim.dim_param = "*".join(names.get(factor, factor) for factor in dim.dim_param.split("*"))
        del graph.value_info[:]


def _forget_origin(model: ModelProto) -> None:
    """torch notes at every node from where it came: half of the file, with the paths of this machine."""
    del model.metadata_props[:]
    for graph in graphs(model.graph):
        for part in (graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
            del part.metadata_props[:]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporter tells the progress of its own passes."""
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.getLogger("torch.onnx").setLevel(level)
