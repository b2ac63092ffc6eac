"""Build a bundle: ONNX graphs of the block denoiser, and TensorRT engines of them, from a checkpoint.

    python export/build.py checkpoint=<directory> out=bundles/mine                          # ONNX only
    python export/build.py checkpoint=<directory> out=bundles/mine builder=tensorrt_rtx gpu=rtx_5090 dtype=bfloat16
    python export/build.py checkpoint=<directory> out=bundles/mine builder=tensorrt gpu=h100 dtype=bfloat16
    python export/build.py checkpoint=<directory> out=bundles/mine parallel=tp2_ep2
    python export/build.py model=diffusiongemma_26b_a4b out=/tmp/try builder=tensorrt_rtx  # no weights: is it built?

A checkpoint is a Hugging Face directory, a sharded checkpoint or a .nemo. TensorRT-RTX builds without a GPU. The last
line is JSON: bundle, graphs (ONNX and engine bytes, seconds, peak memory in bytes).
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from export.roofline import Gpu
from nemo_diffgemma.cli.output import Results, table
from nemo_diffgemma.cli.start import start
from nemo_diffgemma.repository import user_path
from nemo_diffgemma.schema import DTYPES, ClusterGroup, ConfigurationError, ModelGroup, ParallelGroup
from nemo_diffgemma.scratch import scratch_directory

if TYPE_CHECKING:
    from export.bundle.building import Built
    from export.bundle.format import Settings
    from nemo_diffgemma.parallel import ParallelLayout
    from nemo_diffgemma.parallel.team import Team

_MAX_CONTEXT = 8192  # columns, where nothing else was asked for


@dataclass
class BuildConfig:
    """Configuration of `export/build.py`."""

    checkpoint: str | None = None  # Hugging Face directory, sharded checkpoint or .nemo
    model: ModelGroup = field(default_factory=ModelGroup)  # instead of a checkpoint: build the structure only
    out: str = "???"  # directory of the bundle; must not exist
    builder: str = "onnx"  # tensorrt_rtx, tensorrt, tensorrt_llm, edge_llm
    gpu: Gpu | None = None  # gpu=<file of conf/gpu>: engines for that GPU
    dtype: str = "float32"  # float16, bfloat16
    steps: int | None = 48  # of the loop; null: each call says how many
    graphs: list[str] | None = None  # null: encode and step, and loop where it is of one rank and asks for little
    weights: str = "inputs"  # inline: inside of the engine
    experts: str | None = None  # sparse: those chosen; dense: all; null: what suits the model
    quantization: str | None = None  # of the experts: fp8, int4, nvfp4
    calibration: str | None = None  # file with one prompt a line; fp8 and nvfp4 need it
    max_batch_size: int = 8
    max_context: int | None = None  # columns, prompt and finished canvases; null: 8192, or the model's positions
    max_chunk: int = 1024  # columns of one call of encode
    parallel: ParallelGroup = field(default_factory=ParallelGroup)  # ranks of the engines
    cluster: ClusterGroup = field(default_factory=ClusterGroup)  # one process a rank
    dry_run: bool = False  # show the script of a cluster, submit nothing


def build(config: BuildConfig, results: Results) -> dict[str, Any]:
    """Build one bundle."""
    from export.bundle.building import build_bundle
    from export.bundle.format import check_free
    from nemo_diffgemma.parallel.team import Team

    _check(config)
    checkpoint = user_path(config.checkpoint) if config.checkpoint else None
    targets = () if config.gpu is None else (config.gpu.compute_capability,)
    layout, out = config.parallel.layout(), user_path(config.out)
    check_free(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    team = Team.of_processes()
    with ExitStack() as stack:
        folder: Path | None = None
        with team.all_or_none():
            if team.is_rank_zero:
                scratch = scratch_directory(out.absolute().parent, f"{out.name}.source", private=True)
                folder = stack.enter_context(scratch)
        shared = team.from_rank_zero(folder) or Path()
        with team.all_or_none():
            source = (
                _structure(config.model) if checkpoint is None else _released_format(checkpoint, shared, layout, team)
            )
        if config.builder == "edge_llm":
            _write_for_edge_llm(source, out, team)
            results.show(f"a checkpoint for tensorrt-edgellm-export is in {config.out}")
            return {"bundle": config.out, "graphs": {}}
        with team.all_or_none():
            settings = _settings(config, source)
            prompts = _prompts(config.calibration, source) if config.calibration else ()
        bar = tqdm(
            total=0, bar_format="{desc} [{elapsed}]", delay=0.5, file=sys.stderr, disable=not results.is_rank_zero
        )
        with bar:
            progress = bar.set_description_str
            built = build_bundle(source, out, settings, config.builder, targets, prompts, progress, team)
            progress("done")
    results.show(_table(built))
    results.show(f"bundle: {config.out}")
    return {"bundle": config.out, "graphs": {name: dataclasses.asdict(graph) for name, graph in built.items()}}


def _check(config: BuildConfig) -> None:
    """Raise `ConfigurationError` for keys that do not go together."""
    if config.builder == "edge_llm" and not config.checkpoint:
        raise ConfigurationError("builder=edge_llm rewrites a checkpoint; give checkpoint=<directory>")
    if bool(config.checkpoint) == bool(config.model.architecture):
        raise ConfigurationError("give one of checkpoint=<directory> and model=<file of conf/model>, not both or none")
    if config.weights == "inline" and not config.checkpoint:
        raise ConfigurationError(
            "weights=inline puts a checkpoint's weights into the engines, and model= has none; give "
            "checkpoint=<directory>, or leave weights out to see whether the engines can be built"
        )
    if config.parallel.replicas != 1:
        raise ConfigurationError("parallel.replicas: every replica runs the same engines; leave it out")
    read = ("checkpoint", "model", "out", "builder", "cluster", "dry_run")  # by builder=edge_llm
    plain = BuildConfig()
    unread = [name for name in vars(plain) if name not in read and getattr(config, name) != getattr(plain, name)]
    if config.builder == "edge_llm" and unread:
        raise ConfigurationError(
            f"builder=edge_llm writes the checkpoint as it is, so {', '.join(unread)} would change nothing; leave out "
            "(tensorrt-edgellm-export and its engine builder have settings of their own)"
        )


def _settings(config: BuildConfig, source: Any) -> Settings:
    """What was asked for; what was not is chosen so that this model can have it: a default never refuses."""
    from export.bundle.building import suitable_experts, suitable_graphs
    from export.bundle.format import Settings
    from export.engine.engine import Limits
    from nemo_diffgemma.config import ModelConfig

    model = source if isinstance(source, ModelConfig) else ModelConfig.from_pretrained(source)
    layout = config.parallel.layout()
    weights = config.weights if config.checkpoint is not None else "none"
    experts = config.experts or suitable_experts(model, layout, config.quantization, config.weights)
    graphs = config.graphs
    if graphs is None:
        graphs = suitable_graphs(model, layout, config.quantization, experts)
    context = config.max_context
    if context is None:
        context = min(_MAX_CONTEXT, model.max_position_embeddings)
    return Settings(
        dtype=config.dtype,
        layout=layout,
        graphs=tuple(graphs),
        steps=config.steps,
        weights=weights,
        experts=experts,
        quantization=config.quantization,
        limits=Limits(config.max_batch_size, context, config.max_chunk),
    )


def _write_for_edge_llm(source: Any, out: Path, team: Team) -> None:
    from export.bundle.edge_llm import write_checkpoint

    with team.all_or_none():
        if team.is_rank_zero:
            write_checkpoint(source, out)


def _table(built: Mapping[str, Built]) -> str:
    rows = []
    for name, graph in built.items():
        sizes = [f"{size / 1e6:.2f}" for size in (graph.onnx_bytes, graph.engine_bytes)]
        rows.append([name, *sizes, f"{graph.seconds:.1f}", f"{graph.peak_memory / 1e9:.2f}"])
        rows[-1].append(f"{graph.scratch_bytes / 1e9:.2f}" if graph.scratch_bytes else "")
    return table(["graph", "ONNX MB", "engine MB", "seconds", "peak GB", "scratch GB on the GPU"], rows)


def _structure(model: ModelGroup) -> Any:
    from nemo_diffgemma.config import ModelConfig

    return ModelConfig(**model.architecture)


def _released_format(checkpoint: Path, folder: Path, layout: ParallelLayout, team: Team) -> Path:
    """The checkpoint as a Hugging Face directory: a sharded checkpoint is converted by all, a `.nemo` holds one.

    `folder` is where all processes see it, on all nodes.
    """
    if (checkpoint / "config.json").is_file():
        return checkpoint
    from nemo_diffgemma.checkpoint import nemo_archive
    from nemo_diffgemma.checkpoint.open import format_of
    from nemo_diffgemma.parallel import ParallelLayout, initialize

    if format_of(checkpoint) == "nemo":
        if team.is_rank_zero:  # `unpack` would do it on every node, under TMPDIR: the bundle's links are made from here
            nemo_archive.extract(checkpoint, folder)
        return folder / nemo_archive.WEIGHTS
    initialize(layout if team.size % layout.world_size == 0 else ParallelLayout())
    from nemo_diffgemma import DiffusionGemma
    from nemo_diffgemma.checkpoint.contents import contents

    network = DiffusionGemma.from_checkpoint(checkpoint, DTYPES[contents(str(checkpoint)).dtype])
    network.merge_adapters()
    network.save_huggingface(folder / "checkpoint")
    return folder / "checkpoint"


def _prompts(file: str, source: Any) -> list[list[int]]:
    from nemo_diffgemma.tokenizer import Text

    place = user_path(file)
    try:
        lines = [line for line in place.read_text("utf-8").splitlines() if line.strip()] if place.is_file() else []
    except UnicodeDecodeError as error:
        raise ConfigurationError(
            f"calibration={file} is not UTF-8 text ({error}); convert it, with iconv say"
        ) from None
    if not lines:
        raise ConfigurationError(f"calibration={file} is no file, or empty; give one prompt a line, some tens of them")
    text = Text(source if isinstance(source, Path) else None)
    if text.tokenizer is None:  # then token ids, as everywhere without a tokenizer
        try:
            return [[int(word) for word in line.split()] for line in lines]
        except ValueError:
            raise ConfigurationError(
                f"{source} has no tokenizer, so calibration={file} must hold token ids, separated by spaces"
            ) from None
    return [text.encode(line, chat=True) for line in lines]


if __name__ == "__main__":
    start(build, BuildConfig, "export_build")
