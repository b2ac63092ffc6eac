"""Build a bundle: trace the graphs, put weights and quantisation in place, build engines, write everything down."""

from __future__ import annotations

import json
import os
import resource
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import ModelProto

from export import quantize, triton_repository
from export.builders import BUILDERS, build_engine, check_target, load_module
from export.bundle import (
    CHECKPOINT,
    DTYPES,
    QUANTIZED,
    BundleError,
    Settings,
    check_tensors,
    read_weights,
    write_descriptions,
    writing,
)
from export.calibrate import calibrate
from export.graph import Model, Weights
from export.inline import inline, store
from export.loop import to_loop
from export.qdq import quantize_graph
from export.tracing import trace
from export.weights import Weight, check_layout, engine_weights
from nemo_diffgemma.config import ModelConfig
from nemo_diffgemma.parallel.layout import ParallelLayout

GRAPHS = ("encode", "step", "loop")
QUANTIZATION = "hf_quant_config.json"


@dataclass(frozen=True)
class Built:
    """One graph of one rank: bytes of ONNX file and engine (0: none), seconds, peak memory so far (bytes)."""

    onnx_bytes: int
    engine_bytes: int
    seconds: float
    peak_memory: int


def build_bundle(
    checkpoint: Path | ModelConfig,
    out: Path,
    settings: Settings,
    builder: str = "onnx",
    targets: Sequence[str] = (),
    prompts: Sequence[Sequence[int]] = (),
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, Built]:
    """Write the bundle `out` of a released-format directory, or only its structure from a `ModelConfig`.

    `targets` are compute capabilities ("sm_90") where the builder takes any; `prompts` (token ids) calibrate the
    activations of FP8 and NVFP4. Returns what was built by `graph.rank{r}`. Raises a ValueError that says what to do
    before anything is written; nothing half-written stays.
    """
    config = checkpoint if isinstance(checkpoint, ModelConfig) else ModelConfig.from_pretrained(checkpoint)
    check_request(config, settings, builder, targets, prompts)
    weights = engine_weights(config, settings.layout)
    with writing(out) as partial:
        assets = partial / CHECKPOINT
        if isinstance(checkpoint, ModelConfig):
            assets.mkdir()
            (assets / "config.json").write_text(json.dumps(config.to_huggingface(), indent=2) + "\n")
        else:
            _link(checkpoint, assets)
            check_tensors(assets, weights)
        amax: dict[str, float] = {}
        if settings.quantization is not None:
            amax, weights = _quantize(config, settings, weights, partial, prompts, progress)
        built = _build_graphs(config, settings, weights, amax, partial, builder, targets, progress)
        triton_repository.write(partial, builder)
        write_descriptions(partial, config, settings, weights, builder, targets)
    return built


def check_request(
    config: ModelConfig, settings: Settings, builder: str, targets: Sequence[str], prompts: Sequence[Sequence[int]]
) -> None:
    """Raise a ValueError that says what to do where this cannot be built."""
    if builder not in BUILDERS or builder == "edge_llm":
        raise BundleError(f"builder={builder!r}; use one of {', '.join(BUILDERS)} (edge_llm: export.edge_llm)")
    if settings.dtype not in DTYPES:
        raise BundleError(f"dtype={settings.dtype!r}; use one of {', '.join(DTYPES)}")
    if settings.weights not in ("inputs", "inline", "none"):
        raise BundleError(
            f"weights={settings.weights!r}; use inputs (bound to a loaded engine) or inline (inside of it)"
        )
    unknown = [graph for graph in settings.graphs if graph not in GRAPHS]
    if unknown or "encode" not in settings.graphs or "step" not in settings.graphs:
        raise BundleError(f"graphs={list(settings.graphs)}; use [encode,step] or [encode,step,loop]")
    if settings.steps is not None and settings.steps < 1:
        raise BundleError(f"steps={settings.steps}; give at least 1, or null to let each call say how many")
    for name, size in vars(settings.limits).items():
        if size < 1:
            raise BundleError(f"max_{name}={size}; expected at least 1")
    if settings.limits.context > config.max_position_embeddings:
        raise BundleError(
            f"max_context={settings.limits.context} is beyond the {config.max_position_embeddings} positions of the "
            "model; give a smaller one"
        )
    check_layout(settings.layout, config)
    if settings.layout.world_size > 1 and "loop" in settings.graphs:
        raise BundleError(
            "graphs of several ranks keep the loop on the host (a collective inside of an engine's loop is unproven); "
            "use graphs=[encode,step]"
        )
    if settings.quantization is not None:
        given = prompts if settings.weights != "none" else [[0]]
        quantize.check(settings.quantization, config, settings.layout, given)
    check_target(builder, targets, settings.dtype, settings.quantization)
    if builder != "onnx":
        load_module(builder)  # raises where it cannot be loaded: not after minutes of tracing


# -- graphs ------------------------------------------------------------------------------------------------------------


def _build_graphs(
    config: ModelConfig,
    settings: Settings,
    weights: dict[str, Weight],
    amax: dict[str, float],
    partial: Path,
    builder: str,
    targets: Sequence[str],
    progress: Callable[[str], None],
) -> dict[str, Built]:
    built: dict[str, Built] = {}
    models: dict[str, ModelProto] = {}
    ranks = range(settings.layout.world_size)
    places = [store(weights, rank, settings.torch_dtype, partial) for rank in ranks if settings.weights == "inline"]
    for graph in settings.graphs:
        start = time.perf_counter()
        progress(f"{graph}: tracing")
        if graph == "loop":
            model = to_loop(models["step"], settings.steps)
        else:
            model = trace(graph, config, settings.layout, settings.torch_dtype)
            if settings.quantization is not None:
                model = quantize_graph(model, settings.quantization, amax)
            models[graph] = model
        traced = time.perf_counter() - start
        for rank in ranks:
            start = time.perf_counter()
            file = partial / settings.file(graph, rank)
            onnx.save(inline(model, weights, places[rank], settings.torch_dtype) if places else model, file)
            engine_bytes = 0
            if builder != "onnx":
                progress(f"{graph}, rank {rank}: building the engine")
                engine = partial / settings.file(graph, rank, "engine")
                engine_bytes = _engine(settings, config, builder, graph, file, engine, targets, rank)
            seconds = time.perf_counter() - start + (traced if rank == 0 else 0.0)
            built[f"{graph}.rank{rank}"] = Built(file.stat().st_size, engine_bytes, round(seconds, 2), _peak_memory())
    return built


def _engine(
    settings: Settings,
    config: ModelConfig,
    builder: str,
    graph: str,
    file: Path,
    engine: Path,
    targets: Sequence[str],
    rank: int,
) -> int:
    """Build one engine -> its bytes. With weights as inputs the graphs of all ranks are one, and so are the engines."""
    first = engine.with_name(settings.file(graph, 0, "engine"))
    if rank > 0 and settings.weights != "inline":
        link(first, engine)
        return engine.stat().st_size
    profile = settings.profile(graph, config)
    return build_engine(builder, file, engine, profile, world=settings.layout.world_size, targets=targets).bytes


def _peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# -- weights -----------------------------------------------------------------------------------------------------------


def _link(checkpoint: Path, target: Path) -> None:
    """The files of a released-format directory without another copy of the tensors, where the disk allows it."""
    target.mkdir()
    for file in sorted(checkpoint.iterdir()):
        if not file.is_file() or file.name.startswith(".") or file.name == QUANTIZATION:
            continue  # whether experts are quantised is this bundle's own affair
        if file.suffix == ".safetensors":
            link(file, target / file.name)
        else:
            shutil.copy(file, target / file.name)


def link(file: Path, target: Path) -> None:
    """A second name for a file that nobody changes, or a copy where the disk cannot."""
    try:
        os.link(file.resolve(), target)
    except OSError:
        shutil.copy(file, target)


def _quantize(
    config: ModelConfig,
    settings: Settings,
    weights: dict[str, Weight],
    partial: Path,
    prompts: Sequence[Sequence[int]],
    progress: Callable[[str], None],
) -> tuple[dict[str, float], dict[str, Weight]]:
    """Write the quantised expert matrices of every rank -> ranges of activations, and the weights left as they are."""
    scheme, dtype = settings.quantization, settings.torch_dtype
    assert scheme is not None
    kept = {name: weight for name, weight in weights.items() if not quantize.is_quantized(name)}
    (partial / CHECKPOINT / QUANTIZATION).write_text(json.dumps(quantize.hf_quant_config(scheme), indent=2) + "\n")
    if settings.weights == "none":
        return dict.fromkeys(weights, 1.0), kept  # any range will do for the structure
    amax: dict[str, float] = {}
    if scheme in quantize.QUANTIZE_ACTIVATIONS:
        progress("calibrating the activations")
        single = ParallelLayout()
        tensors = dict(read_weights(partial / CHECKPOINT, engine_weights(config, single), 0, dtype))
        amax = calibrate(Model(config, single, dtype), Weights(tensors), prompts)
        del tensors
    progress("quantising the experts")
    for rank in range(settings.layout.world_size):
        file = partial / QUANTIZED.format(rank=rank)
        quantize.write_quantized(file, partial / CHECKPOINT, weights, rank, scheme, dtype, amax)
    return amax, kept
