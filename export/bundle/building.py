"""Build a bundle: trace the graphs, put weights and quantisation in place, build engines, write everything down."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import onnx
import psutil

from export.bundle import triton_repository
from export.bundle.format import (
    CHECKPOINT,
    DTYPES,
    QUANTIZED,
    BundleError,
    Settings,
    write_descriptions,
    writing,
)
from export.engine.builders import (
    BUILDERS,
    build_engine,
    check_local_target,
    check_target,
    check_world,
    load_module,
    local_target,
)
from export.graph.experts import FORMS, ROOM, capacity, is_less_work, takes_all
from export.graph.inline import Place, inline, places_in, store
from export.graph.loop import to_loop
from export.graph.model import Model, Weights
from export.graph.tracing import trace
from export.graph.weights import Weight, check_layout, check_tensors, engine_weights, read_weights
from export.quantization import schemes
from export.quantization.calibration import calibrate
from export.quantization.qdq import quantize_graph
from nemo_diffgemma.checkpoint.assets import FOLDERS
from nemo_diffgemma.cli.child_process import call_in_child, peak_memory
from nemo_diffgemma.config import ModelConfig
from nemo_diffgemma.parallel.layout import ParallelLayout
from nemo_diffgemma.parallel.team import ALONE, Team

GRAPHS = ("encode", "step", "loop")
QUANTIZATION = "hf_quant_config.json"
_LARGEST_TOP_K = 3840  # of TensorRT's TopK layer
_MOST_COPIES = 2 * 10**9  # bytes


@dataclass(frozen=True)
class Built:
    """One graph of one rank: bytes of ONNX file and engine (0: none), seconds, most bytes in memory.

    `scratch_bytes` is the GPU memory that the engine asks for beside its weights (0: not known).

    When engines are built, tracing and building run in child processes: `peak_memory` then adds what this process
    holds meanwhile.
    """

    onnx_bytes: int
    engine_bytes: int
    seconds: float
    peak_memory: int
    scratch_bytes: int = 0


def build_bundle(
    checkpoint: Path | ModelConfig,
    out: Path,
    settings: Settings,
    builder: str = "onnx",
    targets: Sequence[str] = (),
    prompts: Sequence[Sequence[int]] = (),
    progress: Callable[[str], None] = lambda what: None,
    team: Team = ALONE,
) -> dict[str, Built]:
    """Write the bundle `out` of a released-format directory, or only its structure from a `ModelConfig`.

    `targets` are compute capabilities ("sm_90"), by default that of the GPU at hand where TensorRT builds for it;
    `prompts` (token ids) calibrate the activations of FP8 and NVFP4. The processes of `team` share the ranks; all call
    this with equal arguments. Returns what was built by `graph.rank{r}`. Raises a `UserError` that says what to do
    before anything is written; nothing half-written stays.
    """
    config = checkpoint if isinstance(checkpoint, ModelConfig) else ModelConfig.from_pretrained(checkpoint)
    targets = targets or local_target(builder)
    check_request(config, settings, builder, targets, prompts)
    settings = replace(settings, graphs=tuple(graph for graph in GRAPHS if graph in settings.graphs))
    if team.size > settings.layout.world_size:
        raise BundleError(
            f"{team.size} processes for the {settings.layout.world_size} ranks of layout {settings.layout}; start one "
            "a rank, or fewer"
        )
    weights = engine_weights(config, settings.layout, settings.experts)
    with writing(out, team) as partial:
        with team.all_or_none():
            if team.is_rank_zero:
                _prepare(checkpoint, config, weights, partial / CHECKPOINT)
        work = _Work(config, settings, partial, builder, tuple(targets), progress, team)
        amax: dict[str, float] = {}
        if settings.quantization is not None:
            amax, weights = _quantize(work, weights, prompts)
        built = _build_graphs(work, weights, amax)
        with team.all_or_none():
            if team.is_rank_zero:
                if settings.layout.world_size == 1 and settings.weights != "none":
                    triton_repository.write(partial, builder)
                write_descriptions(partial, config, settings, builder, targets)
    return built


@dataclass(frozen=True)
class _Work:
    """What every part of a build needs to know."""

    config: ModelConfig
    settings: Settings
    partial: Path
    builder: str
    targets: tuple[str, ...]
    progress: Callable[[str], None]
    team: Team

    @property
    def ranks(self) -> Sequence[int]:
        """The ranks that this process builds."""
        return self.team.share_of(range(self.settings.layout.world_size))


def _prepare(checkpoint: Path | ModelConfig, config: ModelConfig, weights: dict[str, Weight], assets: Path) -> None:
    if isinstance(checkpoint, ModelConfig):
        assets.mkdir()
        (assets / "config.json").write_text(json.dumps(config.to_huggingface(), indent=2) + "\n")
    else:
        assets.mkdir()
        link_checkpoint(checkpoint, assets, skip=[QUANTIZATION])  # experts are quantised here or not at all
        check_tensors(assets, weights)


def check_request(
    config: ModelConfig, settings: Settings, builder: str, targets: Sequence[str], prompts: Sequence[Sequence[int]]
) -> None:
    """Raise a `UserError` that says what to do where this cannot be built."""
    if builder not in BUILDERS or builder == "edge_llm":
        raise BundleError(f"builder={builder!r}; use one of {', '.join(BUILDERS)} (edge_llm: export.bundle.edge_llm)")
    if settings.dtype not in DTYPES:
        raise BundleError(f"dtype={settings.dtype!r}; use one of {', '.join(DTYPES)}")
    if settings.weights not in ("inputs", "inline", "none"):
        raise BundleError(
            f"weights={settings.weights!r}; use inputs (bound to a loaded engine) or inline (inside of it)"
        )
    if settings.experts not in FORMS:
        raise BundleError(
            f"experts={settings.experts!r}; use one of {', '.join(FORMS)}, or null for what suits the model"
        )
    if sorted(settings.graphs) not in (["encode", "step"], sorted(GRAPHS)):
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
    _check_room(config, settings, builder)
    if settings.layout.world_size > 1 and "loop" in settings.graphs:
        raise BundleError(
            "graphs of several ranks keep the loop on the host (a collective inside of an engine's loop is unproven); "
            "use graphs=[encode,step]"
        )
    if settings.quantization is not None:
        given = prompts if settings.weights != "none" else [[0]]
        schemes.check(settings.quantization, config, settings.layout, settings.experts, given)
    check_world(builder, settings.layout.world_size)
    check_target(builder, targets, settings.dtype, settings.quantization)
    check_local_target(builder, targets)
    if builder != "onnx":
        load_module(builder)  # raises where it cannot be loaded: not after minutes of tracing


def _check_room(config: ModelConfig, settings: Settings, builder: str) -> None:
    """Raise `BundleError` where a chunk is so long that TensorRT cannot find the tokens of an expert."""
    top_k, experts, chunk = config.top_k_experts, config.num_experts, settings.limits.chunk
    room = chunk if takes_all(top_k, experts) else capacity(chunk, top_k, experts)
    if builder != "onnx" and settings.experts == "sparse" and room > _LARGEST_TOP_K:
        longest = _LARGEST_TOP_K * experts // min(experts, ROOM * top_k)
        raise BundleError(
            f"max_chunk={chunk} gives every expert room for {room} tokens of a row, but TensorRT's top-k ends at "
            f"{_LARGEST_TOP_K}; use max_chunk={longest} or less, or experts=dense"
        )


def suitable_experts(config: ModelConfig, layout: ParallelLayout, quantization: str | None, weights: str) -> str:
    """The form in which the experts are computed unless another is asked for.

    `sparse`, unless that multiplies as many rows, as with the 8 experts of the Sudoku model, blocks of the quantisation
    do not divide the width of an expert, or quantised experts are `inline`: TensorRT-RTX 1.7.1 then fuses them into the
    products of the dense form, and keeps them twice for the sparse one. Raises `LayoutError` for a layout that engines
    cannot have.
    """
    check_layout(layout, config)
    if not is_less_work(config.top_k_experts, config.num_experts, config.num_experts // layout.expert):
        return "dense"
    if quantization in schemes.SCHEMES and (
        weights == "inline" or not schemes.fits(quantization, config, layout, "sparse")
    ):
        return "dense"
    return "sparse"


def suitable_graphs(config: ModelConfig, layout: ParallelLayout, quantization: str | None, experts: str) -> list[str]:
    """The graphs of a bundle unless others are asked for.

    No `loop` with several ranks, nor where TensorRT-RTX 1.7.1 would keep 16-bit copies of many experts: in a loop over
    steps it does so for those of every layer that are sparse or quantised, 46 GB in the released model.
    """
    sizes = {name: prod(w.shape) for name, w in engine_weights(config, layout, experts).items()}
    copies = 2 * sum(size for name, size in sizes.items() if schemes.is_quantized(name))
    copied = experts == "sparse" or quantization is not None
    if layout.world_size > 1 or (copied and copies > _MOST_COPIES):
        return [graph for graph in GRAPHS if graph != "loop"]
    return list(GRAPHS)


# -- graphs ------------------------------------------------------------------------------------------------------------


def _build_graphs(work: _Work, weights: dict[str, Weight], amax: dict[str, float]) -> dict[str, Built]:
    settings, team, inlined = work.settings, work.team, work.settings.weights == "inline"
    places: dict[int, dict[str, Place]] = {}
    with team.all_or_none():
        if inlined:
            places = {rank: _places(work, weights, rank) for rank in work.ranks}
    # with weights as inputs the graphs of all ranks are one, and so are the engines
    mine = work.ranks if inlined else range(settings.layout.world_size) if team.is_rank_zero else ()
    built: dict[str, Built] = {}
    for graph in settings.graphs:
        begun, memory = time.perf_counter(), 0
        with team.all_or_none():
            if team.is_rank_zero:
                work.progress(f"tracing {graph}")
                _, memory = _call(work, trace_graph, graph, work.config, settings, amax, work.partial)
        start = begun if team.is_rank_zero else time.perf_counter()  # it was traced once for all ranks
        with team.all_or_none():
            for rank in mine:
                built[f"{graph}.rank{rank}"] = _build(work, graph, rank, places.get(rank), start, memory)
                start = time.perf_counter()
    if team.is_rank_zero:
        for graph in settings.graphs:
            _common(work.partial, graph).unlink()
    graphs = {name: one for part in team.gather(built) for name, one in part.items()}
    return {name: graphs[name] for name in sorted(graphs, key=lambda name: _order(settings, name))}


def _places(work: _Work, weights: dict[str, Weight], rank: int) -> dict[str, Place]:
    """Write the weights of a rank -> where each lies, quantised ones too."""
    places = store(weights, rank, work.settings.torch_dtype, work.partial)
    if work.settings.quantization is not None:
        places |= places_in(work.partial / QUANTIZED.format(rank=rank), work.partial)
    return places


def _call[T](work: _Work, function: Callable[..., T], *arguments: object) -> tuple[T, int]:
    """Call `function` -> its result and peak memory in bytes; in a child process when engines need the memory."""
    if work.builder == "onnx":
        return function(*arguments), peak_memory()
    held = psutil.Process().memory_info().rss
    result, most = call_in_child(function, *arguments)
    return result, max(held + most, peak_memory())


def _common(folder: Path, graph: str) -> Path:
    """The graph of all ranks, while the bundle is built."""
    return folder / f".{graph}.onnx"


def _order(settings: Settings, name: str) -> tuple[int, int]:
    graph, rank = name.split(".rank")
    return settings.graphs.index(graph), int(rank)


def trace_graph(graph: str, config: ModelConfig, settings: Settings, amax: dict[str, float], folder: Path) -> None:
    """Write the graph of all ranks; the loop is made of the step."""
    if graph == "loop":
        model = to_loop(onnx.load(_common(folder, "step")), settings.steps)
    else:
        quantized = ("inline" if settings.weights == "inline" else "inputs") if settings.quantization else None
        model = trace(graph, config, settings.layout, settings.torch_dtype, settings.experts, quantized)
        if settings.quantization is not None:
            model = quantize_graph(model, settings.quantization, amax)
    onnx.save(model, _common(folder, graph))


def _build(work: _Work, graph: str, rank: int, places: dict[str, Place] | None, start: float, memory: int) -> Built:
    """Graph and engine of one rank; work on them began at `start`, and tracing took `memory` bytes."""
    settings = work.settings
    file, engine = (work.partial / settings.file(graph, rank, suffix) for suffix in ("onnx", "engine"))
    scratch = 0
    if places is None:
        shutil.copy(_common(work.partial, graph), file)
    else:
        onnx.save(inline(onnx.load(_common(work.partial, graph)), places), file)
    if work.builder != "onnx" and places is None and rank > 0:
        link(engine.with_name(settings.file(graph, 0, "engine")), engine)
    elif work.builder != "onnx":
        work.progress(f"{graph}, rank {rank}: building the engine")
        world, profile = settings.layout.world_size, settings.profile(graph, work.config)
        report, most = _call(work, build_engine, work.builder, file, engine, profile, world, work.targets)
        memory, scratch = max(memory, most), report.scratch_bytes
    engine_bytes = engine.stat().st_size if work.builder != "onnx" else 0
    seconds = round(time.perf_counter() - start, 2)
    return Built(file.stat().st_size, engine_bytes, seconds, max(memory, peak_memory()), scratch)


# -- weights -----------------------------------------------------------------------------------------------------------


def link_checkpoint(checkpoint: Path, target: Path, skip: Sequence[str]) -> None:
    """The files of a released-format directory, without another copy of the tensors where the disk allows it."""
    for file in sorted(checkpoint.iterdir()):
        if file.is_dir() and file.name in FOLDERS:
            shutil.copytree(file, target / file.name)
        if not file.is_file() or file.name.startswith(".") or file.name in skip:
            continue
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
    work: _Work, weights: dict[str, Weight], prompts: Sequence[Sequence[int]]
) -> tuple[dict[str, float], dict[str, Weight]]:
    """Write the quantised expert matrices of every rank -> ranges of activations, and the weights left as they are."""
    scheme, dtype, assets = work.settings.quantization, work.settings.torch_dtype, work.partial / CHECKPOINT
    assert scheme is not None
    kept = {name: weight for name, weight in weights.items() if not schemes.is_quantized(name)}
    amax: dict[str, float] = {}
    with work.team.all_or_none():
        if work.team.is_rank_zero:
            (work.partial / QUANTIZATION).write_text(json.dumps(schemes.hf_quant_config(scheme), indent=2) + "\n")
            if scheme in schemes.QUANTIZE_ACTIVATIONS and work.settings.weights != "none":
                work.progress("calibrating the activations")
                single, form = ParallelLayout(), work.settings.experts
                tensors = dict(read_weights(assets, engine_weights(work.config, single, form), 0, dtype))
                amax = calibrate(Model(work.config, single, dtype, form), Weights(tensors), prompts)
                del tensors
    if work.settings.weights == "none":
        return dict.fromkeys(weights, 1.0), kept  # any range will do for the structure
    amax = work.team.from_rank_zero(amax)
    work.progress("quantising the experts")
    with work.team.all_or_none():
        for rank in work.ranks:
            file = work.partial / QUANTIZED.format(rank=rank)
            schemes.write_quantized(file, assets, weights, rank, scheme, dtype, amax)
    return amax, kept
