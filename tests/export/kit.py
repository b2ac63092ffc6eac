"""Graphs and engines of tiny models, traced once a session: a trace takes seconds.

What one of pytest-xdist's processes has traced, the others read from a file.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path

import onnx
import torch
from onnx import ModelProto

from export.engine.engine import Engine, Limits
from export.engine.onnx_session import OnnxSession
from export.graph.loop import to_loop
from export.graph.tracing import past_names, trace
from export.graph.weights import engine_weights, read_weights
from nemo_diffgemma import DiffusionGemma, ModelConfig, ParallelLayout
from tests.parity.generations import DAMP, SUBLAYERS
from tests.reference import tiny_config

SINGLE = ParallelLayout()
LIMITS = Limits(batch=8, context=64, chunk=16)  # prompts longer than a chunk are encoded in several calls


@functools.cache
def config(size: str) -> ModelConfig:
    return ModelConfig.from_huggingface(tiny_config(size).to_dict())


folder = Path("not given yet")  # of the session's traces: tests/export/conftest.py


@functools.cache
def traced(
    graph: str,
    config: ModelConfig,
    layout: ParallelLayout,
    dtype: torch.dtype,
    experts: str = "sparse",
    quantized: str | None = None,
) -> ModelProto:
    """`export.tracing.trace`; tests must not change what it gives."""
    asked = repr((graph, config, layout, dtype, experts, quantized))
    file = folder / f"{hashlib.sha256(asked.encode()).hexdigest()}.onnx"
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # who comes second waits for the first one's
        if not file.exists():
            model = trace(graph, config, layout, dtype, experts, quantized)
            onnx.save(model, file)
            return model
    return onnx.load(file)


def graph(
    name: str,
    size: str = "short",
    layout: ParallelLayout = SINGLE,
    dtype: torch.dtype = torch.float32,
    experts: str = "sparse",
) -> ModelProto:
    """A traced graph of one of the sizes of tests/reference."""
    return traced(name, config(size), layout, dtype, experts)


def calm(checkpoint: Callable[..., Path], size: str = "short") -> Path:
    """A checkpoint whose tokens rounding does not change (see tests/parity/generations.py)."""
    return checkpoint(size, damp=DAMP, sublayers=SUBLAYERS)


def own_inputs(graph: str, config: ModelConfig, layout: ParallelLayout = SINGLE) -> set[str]:
    """What a graph takes besides weights."""
    layers = range(config.num_hidden_layers)
    # `encode` ends with the keys and values of the last layer, whose context nobody reads
    past = {name for layer in (layers[:-1] if graph == "encode" else layers) for name in past_names(layer)}
    tokens = {
        "encode": {"input_ids"},
        "step": {"canvas", "soft", "temperature", "entropy_bound", "uniforms", "replacements"},
        "loop": {"canvas", "soft", "temperatures", "entropy_bound", "uniforms", "replacements"},
    }[graph]
    return past | tokens | {"first", "past_length"} | ({"rank"} if layout.world_size > 1 else set())


@functools.cache
def network(path: Path) -> DiffusionGemma:
    return DiffusionGemma.from_huggingface(path)


def engine(
    path: Path,
    size: str = "short",
    layout: ParallelLayout = SINGLE,
    dtype: torch.dtype = torch.float32,
    loop: int | str | None = "none",
    experts: str = "sparse",
) -> Engine:
    """The model of a checkpoint in ONNX Runtime, all ranks; `loop` is a number of steps or None for any."""
    ranks = range(layout.world_size)
    needed = engine_weights(config(size), layout, experts)
    weights = [dict(read_weights(path, needed, rank, dtype)) for rank in ranks]
    models = {name: graph(name, size, layout, dtype, experts) for name in ("encode", "step")}
    if loop != "none":
        models["loop"] = to_loop(models["step"], loop)  # type: ignore[arg-type]
    sessions = {name: OnnxSession([model] * len(ranks), weights) for name, model in models.items()}
    steps = loop if isinstance(loop, int) else None
    return Engine(config(size), layout, dtype, sessions, LIMITS, path, ranks, steps)
