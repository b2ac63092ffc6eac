"""A bundle: the graphs and engines of one checkpoint, and all that is needed to run them, in one directory.

    config.json           architecture, mapping over ranks, quantisation, what was built (TensorRT-LLM's shape)
    {encode,step,loop}.rank{r}.onnx, .engine
    weights.json          which part of which tensor every weight input is
    profiles.json         sizes that the engines take
    hf_quant_config.json  how experts are quantised, where they are
    build_info.json       versions, targets, checksums; written last, so a bundle without it is half-built
    checkpoint/           the released-format directory: tensors, tokenizer, template, generation settings
    triton/               a model repository for Triton

A bundle is written under a temporary name and renamed when complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from onnx import TensorProto
from torch import Tensor

from export.engine.engine import LOOP_STEPS, Limits
from export.graph.weights import Weight, WeightsError, engine_weights, read_weights
from export.quantization.schemes import ALGORITHMS, is_quantized, load_quantized, packed_inputs
from nemo_diffgemma.checkpoint.tensor_files import TensorFiles
from nemo_diffgemma.config import ModelConfig
from nemo_diffgemma.diffusion.sampler_config import SamplerConfig
from nemo_diffgemma.errors import UserError
from nemo_diffgemma.json_files import read_object
from nemo_diffgemma.parallel.layout import ParallelLayout
from nemo_diffgemma.parallel.team import ALONE, Team
from nemo_diffgemma.repository import user_path
from nemo_diffgemma.scratch import follow_umask, scratch_directory

FORMAT = 4
CHECKPOINT, TRITON = "checkpoint", "triton"
CONFIG, WEIGHTS, PROFILES, BUILD_INFO = "config.json", "weights.json", "profiles.json", "build_info.json"
QUANTIZED = "quantized.rank{rank}.safetensors"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_HASHED = (".json", ".onnx", ".engine", ".bin")


class BundleError(UserError):
    """A directory that is no complete bundle of this version; the message says what is wrong and what to do."""


@dataclass(frozen=True)
class Settings:
    """What was asked for when a bundle was built.

    `experts` is one of `export.graph.experts.FORMS`, `quantization` one of `schemes.SCHEMES` or None; `weights` is
    `inputs`, `inline` or `none` (structure only); `steps` None lets `loop` run any number of steps.
    """

    dtype: str = "float32"
    layout: ParallelLayout = field(default_factory=ParallelLayout)
    graphs: tuple[str, ...] = ("encode", "step", "loop")
    steps: int | None = 48
    weights: str = "inputs"
    experts: str = "sparse"
    quantization: str | None = None
    limits: Limits = field(default_factory=lambda: Limits(batch=8, context=8192, chunk=1024))

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def profile(self, graph: str, config: ModelConfig) -> dict[str, tuple[int, int, int]]:
        """(least, optimal, most) of every dynamic axis of a graph."""
        window = max(1, config.sliding_window - 1)
        sizes = {
            "batch": (1, 1, self.limits.batch),
            "context_columns": (1, min(1024, self.limits.context), self.limits.context),
            "window_columns": (1, min(window, self.limits.context), min(window, self.limits.context)),
        }
        if graph == "encode":
            sizes["chunk"] = (1, min(512, self.limits.chunk), self.limits.chunk)
        if graph == "loop" and self.steps is None:
            sizes["steps"] = (1, 48, LOOP_STEPS)
        return sizes

    def file(self, graph: str, rank: int, kind: str = "onnx") -> str:
        return f"{graph}.rank{rank}.{kind}"


@dataclass(frozen=True)
class Bundle:
    """A complete bundle on disk.

    `weights` are the inputs that come from the checkpoint, `packed` those that quantised matrices have become (nvfp4:
    and constants of its graphs).
    """

    path: Path
    config: ModelConfig
    settings: Settings
    weights: Mapping[str, Weight]
    packed: frozenset[str]
    info: Mapping[str, Any]

    @property
    def assets(self) -> Path:
        return self.path / CHECKPOINT

    @property
    def weight_inputs(self) -> frozenset[str]:
        """Names of all weights, of any rank, that a graph may have as inputs."""
        return self.packed.union(self.weights)

    def load_weights(self, rank: int, packed: bool = True) -> Iterator[tuple[str, Tensor]]:
        """The weight inputs of a rank, one after the other; inline ones are in the graphs. Raises `WeightsError`.

        `packed=False` leaves out those that quantised matrices have become.
        """
        if self.settings.weights == "none":
            raise WeightsError(
                f"{self.path} was built without weights, to see that its engines can be built; build it again with "
                "checkpoint=<directory>"
            )
        return iter(()) if self.settings.weights == "inline" else self.stored_weights(rank, packed)

    def stored_weights(self, rank: int, packed: bool = True) -> Iterator[tuple[str, Tensor]]:
        """All weights of a rank as the graphs take them, wherever they are when an engine runs."""
        yield from read_weights(self.assets, self.weights, rank, self.settings.torch_dtype)
        if packed and self.settings.quantization is not None:
            yield from load_quantized(self.quantized(rank), self.settings.quantization)

    def quantized(self, rank: int) -> Path:
        """The file of a rank's quantised matrices."""
        return self.path / QUANTIZED.format(rank=rank)


# -- writing -----------------------------------------------------------------------------------------------------------


def check_free(target: Path) -> None:
    """Raise `BundleError` where something is in the way."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise BundleError(f"out={target} exists and is not empty; choose another name or remove it")


@contextlib.contextmanager
def writing(target: Path, team: Team = ALONE) -> Iterator[Path]:
    """A temporary directory beside `target` that becomes it when the block ends well, and vanishes otherwise.

    All processes of `team` get the same directory; rank 0 makes and renames it.
    """
    partial = target
    with contextlib.ExitStack() as stack:
        with team.all_or_none():
            check_free(target)
            if team.is_rank_zero:
                target.parent.mkdir(parents=True, exist_ok=True)
                partial = stack.enter_context(scratch_directory(target.absolute().parent, target.name))
        partial = team.from_rank_zero(partial)
        yield partial
        with team.all_or_none():
            if team.is_rank_zero:
                follow_umask(partial)
                if target.exists():
                    target.rmdir()
                partial.rename(target)


def write_descriptions(
    directory: Path,
    config: ModelConfig,
    settings: Settings,
    builder: str,
    targets: Sequence[str],
) -> None:
    """Everything but graphs, engines and checkpoint; last of all build_info.json, with checksums of the rest."""
    _write(directory / CONFIG, _describe(config, settings, SamplerConfig.of_checkpoint(directory / CHECKPOINT, config)))
    _write(directory / WEIGHTS, _describe_weights(directory / CHECKPOINT, config, settings))
    _write(directory / PROFILES, {graph: settings.profile(graph, config) for graph in settings.graphs})
    _write(
        directory / BUILD_INFO,
        {
            "format": FORMAT,
            "builder": builder,
            "targets": list(targets),
            "versions": _versions(),
            "files": {
                str(file.relative_to(directory)): _fingerprint(file)
                for file in sorted(directory.rglob("*"))
                if file.is_file() and directory / TRITON not in file.parents  # which is there to be edited
            },
        },
    )


def _describe_weights(checkpoint: Path, config: ModelConfig, settings: Settings) -> dict[str, Any]:
    """For every weight: file, key, slice of each rank and transform. Without weights files are null.

    A quantised matrix lies packed, as the `inputs` that it has become, in the file of its rank, under their own names;
    its slice and transform are those of what was quantised.
    """
    described: dict[str, Any] = {"checkpoint": {}, "quantized": {}}
    with TensorFiles(checkpoint) as files:
        for name, weight in engine_weights(config, settings.layout, settings.experts).items():
            file = files.files[weight.key].name if weight.key in files.files else None
            entry = {"file": file, **dataclasses.asdict(weight)}
            if settings.quantization is None or not is_quantized(name):
                described["checkpoint"][name] = entry
                continue
            packed = packed_inputs(name, weight.shape, settings.quantization, settings.torch_dtype)
            inputs = {
                key: {"dtype": TensorProto.DataType.Name(spec.onnx_type), "shape": spec.shape}
                for key, spec in packed.items()
            }
            described["quantized"][name] = {**entry, "file": file and QUANTIZED, "inputs": inputs}
    return described


def _describe(config: ModelConfig, settings: Settings, sampler: SamplerConfig) -> dict[str, Any]:
    layout, limits = settings.layout, settings.limits
    sizes = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in ("source", "dtype")}
    return {
        "version": FORMAT,
        "pretrained_config": {
            "architecture": "DiffusionGemmaForBlockDiffusion",
            "dtype": settings.dtype,
            **sizes,
            "mapping": {
                "world_size": layout.world_size,
                "tp_size": layout.tensor,
                "pp_size": 1,
                "moe_tp_size": layout.expert_tensor,
                "moe_ep_size": layout.expert,
            },
            "quantization": {"quant_algo": ALGORITHMS.get(settings.quantization or ""), "kv_cache_quant_algo": None},
        },
        "build_config": {
            "max_batch_size": limits.batch,
            "max_input_len": limits.chunk,
            "max_seq_len": limits.context,
            "strongly_typed": True,
            "graphs": list(settings.graphs),
            "weights": settings.weights,
            "experts": settings.experts,
        },
        "diffusion_config": {"steps": settings.steps, **dataclasses.asdict(sampler)},
    }


def _versions() -> dict[str, str]:
    from importlib import metadata

    names = (
        "nemo_diffgemma",
        "torch",
        "onnx",
        "onnxscript",
        "onnxruntime",
        "tensorrt",
        "tensorrt-rtx-cu13",
        "tensorrt-llm",
    )
    versions = {}
    for name in (*names, "nvidia-modelopt"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def _fingerprint(file: Path) -> dict[str, Any]:
    """Size, and a checksum of what a build writes itself: not of the checkpoint's tensors."""
    fingerprint: dict[str, Any] = {"bytes": file.stat().st_size}
    if file.suffix in _HASHED or file.match(QUANTIZED.format(rank="*")):
        with file.open("rb") as stream:
            fingerprint["sha256"] = hashlib.file_digest(stream, "sha256").hexdigest()
    return fingerprint


def _write(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=1) + "\n")


# -- reading -----------------------------------------------------------------------------------------------------------


def read_bundle(path: str | Path) -> Bundle:
    """Raises `BundleError` for what is no bundle, half-built, of another version, damaged, or lacks a file."""
    place = user_path(path)
    if not (place / BUILD_INFO).is_file():
        half = place.is_dir() and any(place.glob("*.onnx"))
        raise BundleError(
            f"{path} is {'a half-built' if half else 'not a'} bundle: it has no {BUILD_INFO}; "
            + ("remove it and build it again" if half else "give a directory that export/build.py has written")
        )
    info = read_object(place / BUILD_INFO, BundleError)
    with _naming(place / BUILD_INFO):
        files = {name: int(expected["bytes"]) for name, expected in info["files"].items()}
    if info.get("format") != FORMAT:
        raise BundleError(
            f"{path} is a bundle of format {info.get('format')}, this version reads format "
            f"{FORMAT}; build it again from its checkpoint directory with export/build.py"
        )
    for name, size in files.items():
        file = place / name
        if not file.is_file():
            raise BundleError(f"{path} lacks {name}; copy the bundle again, all of it (each rank needs its files)")
        if file.stat().st_size != size:
            raise BundleError(
                f"{file} has {file.stat().st_size} bytes, but {BUILD_INFO} says {size}; copy the bundle again"
            )
    with _naming(place / CONFIG):
        settings = _settings_of(read_object(place / CONFIG, BundleError))
    with _naming(place / WEIGHTS):
        held = read_object(place / WEIGHTS, BundleError)
        weights = {name: Weight.from_json(entry) for name, entry in held["checkpoint"].items()}
        packed = frozenset(name for entry in held["quantized"].values() for name in entry["inputs"])
    return Bundle(place, ModelConfig.from_pretrained(place / CHECKPOINT), settings, weights, packed, info)


@contextlib.contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Turn what a missing key or a value of a wrong type raises into a `BundleError` that names the file."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{file} is damaged ({error!r}); copy the bundle again") from None


def verify_checksums(bundle: Bundle) -> None:
    """Compare every recorded checksum. Raises `BundleError` naming the first file that differs."""
    for name, expected in bundle.info["files"].items():
        fingerprint = _fingerprint(bundle.path / name)
        if any(fingerprint.get(key) != value for key, value in expected.items()):
            raise BundleError(
                f"{bundle.path / name} is not what was built: its checksum differs; copy the bundle again"
            )


def _settings_of(described: Mapping[str, Any]) -> Settings:
    pretrained, build = described["pretrained_config"], described["build_config"]
    mapping, algorithm = pretrained["mapping"], pretrained["quantization"]["quant_algo"]
    return Settings(
        dtype=pretrained["dtype"],
        layout=ParallelLayout(mapping["tp_size"], mapping["moe_ep_size"], mapping["moe_tp_size"]),
        graphs=tuple(build["graphs"]),
        steps=described["diffusion_config"]["steps"],
        weights=build["weights"],
        experts=build["experts"],
        quantization=next((scheme for scheme, name in ALGORITHMS.items() if name == algorithm), None),
        limits=Limits(build["max_batch_size"], build["max_seq_len"], build["max_input_len"]),
    )
