"""TensorRT engines from ONNX graphs, whichever TensorRT there is: the module is chosen at run time.

    tensorrt_rtx   TensorRT-RTX, for GeForce, RTX PRO and DGX Spark; builds without a GPU, for any listed target
    tensorrt       TensorRT 10.16 or 11, for H100, H200, B200; builds for the GPU of the machine it runs on
    tensorrt_llm   TensorRT-LLM 1.0 to 1.2.1: its Builder and Network around TensorRT's. Written against the source of
                   1.2.1 (tensorrt_llm/builder.py, network.py); not run here

    build_engine("tensorrt_rtx", Path("step.onnx"), Path("step.engine"), {"batch": (1, 1, 8)}, targets=["sm_89"])

Two builds of one graph differ in their bytes: compare what `inspect_network` tells, never engines.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from nemo_diffgemma.errors import UserError

BUILDERS = ("onnx", "tensorrt_rtx", "tensorrt", "tensorrt_llm", "edge_llm")
_FOR_LOCAL_GPU = ("tensorrt", "tensorrt_llm")

Profile = Mapping[str, tuple[int, int, int]]  # (least, optimal, most) of every dynamic axis
Shapes = dict[str, tuple[tuple[int, ...], ...]]  # the same three of every dynamic input

_INSTALL = {
    "tensorrt_rtx": "`pip install tensorrt-rtx-cu13==1.7.1.116`",
    "tensorrt": "`pip install --extra-index-url INDEX 'tensorrt-cu13>=10.16'` with the address of NVIDIA's own package "
    "index, which its installation guide names (PyPI has only a stub), or use NVIDIA's TensorRT container from NGC",
    "tensorrt_llm": "`pip install --extra-index-url INDEX tensorrt-llm==1.2.1` with the address of NVIDIA's index, in "
    "an environment of its own (1.0 to 1.2.1; 1.3 has no engine backend any more), or use builder=tensorrt",
}

# Least compute capability of a format: the hardware tables of TensorRT-RTX's and TensorRT's support matrices (BF16 from
# Ampere, FP8 from Ada, FP4 from Blackwell, INT4 weights from Ampere), and what to choose below it.
_LEAST = {
    "bfloat16": (80, "dtype=float16"),
    "int4": (80, "quantization=null"),
    "fp8": (89, "quantization=int4"),
    "nvfp4": (100, "quantization=fp8 (from sm_89) or int4"),
}
_FORMATS = {"BF16": "bfloat16", "INT4": "int4", "FP8": "fp8", "FP4": "nvfp4"}  # TensorRT's names -> ours


class BuilderError(UserError):
    """An engine that cannot be built; the message says why and what to do instead."""


@dataclass(frozen=True)
class TensorReport:
    """Input or output of a network: TensorRT's name of the dtype; -1 is a dynamic axis, `axes` its name at inputs."""

    dtype: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]


@dataclass(frozen=True)
class NetworkReport:
    """A parsed network: how many layers of each type, loop bodies included; `collectives` are the ranks of each."""

    layers: Mapping[str, int]
    inputs: Mapping[str, TensorReport]
    outputs: Mapping[str, TensorReport]
    collectives: tuple[int, ...]


@dataclass(frozen=True)
class EngineReport:
    """An engine on disk: its bytes, seconds to parse and build, (least, optimal, most) shape of every dynamic input.

    `scratch_bytes` of GPU memory are what it asks for beside weights, inputs and outputs; 0: TensorRT does not say.
    """

    bytes: int
    seconds: float
    scratch_bytes: int
    network: NetworkReport
    profile: Shapes


# -- what can be built -------------------------------------------------------------------------------------------------


def load_module(builder: str) -> ModuleType:
    """TensorRT's module behind a builder. Raises `BuilderError` where it is missing, a stub or of another version."""
    if builder not in _INSTALL:
        raise BuilderError(f"builder={builder!r} has no TensorRT; use one of {', '.join(_INSTALL)}")
    trt = _import("tensorrt" if builder == "tensorrt_llm" else builder, builder)
    if not hasattr(trt, "Builder"):
        raise BuilderError(
            f"the installed package {trt.__name__} is a stub without a builder; install it with {_INSTALL[builder]}"
        )
    # tensorrt_llm pins the TensorRT it wants
    module = _import("tensorrt_llm", builder) if builder == "tensorrt_llm" else trt
    installed = str(getattr(module, "__version__", ""))
    version = tuple(int(part) for part in re.findall(r"\d+", installed)[:2])
    if builder == "tensorrt" and version < (10, 16):
        raise BuilderError(
            f"tensorrt {installed} is installed; 10.16 or later is needed: install it with {_INSTALL[builder]}"
        )
    if builder == "tensorrt_llm" and not (1, 0) <= version < (1, 3):
        raise BuilderError(f"tensorrt_llm {installed} is installed, which cannot build engines; {_INSTALL[builder]}")
    return trt


def _import(name: str, builder: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:  # stubs and half-installed packages raise what they like
        raise BuilderError(
            f"builder={builder} needs the package {name}, which cannot be imported ({type(error).__name__}: {error}); "
            f"install it with {_INSTALL[builder]}"
        ) from error


def check_target(builder: str, targets: Sequence[str], dtype: str, quantization: str | None = None) -> None:
    """Raise `BuilderError` where an engine in `dtype` with experts in `quantization` cannot run on `targets`.

    Targets are compute capabilities, "sm_89"; none are given for the GPU at hand. Looks at names only.
    """
    _check_formats(targets, [name for name in (dtype, quantization) if name is not None])
    for target in targets:
        if builder == "tensorrt_rtx" and _capability(target) // 10 in (9, 10, 11):
            raise BuilderError(
                f"TensorRT-RTX has no {target}: it builds for GeForce, RTX PRO and DGX Spark; for H100, H200, B200 and "
                "GB200 use builder=tensorrt on a machine with that GPU"
            )


def check_world(builder: str, world: int) -> None:
    """Raise `BuilderError` where a builder cannot make engines of `world` ranks."""
    if builder == "tensorrt_llm" and world > 1:
        raise BuilderError(
            f"the TensorRT of TensorRT-LLM 1.2 has no exchanges between ranks, and the layout has {world}; use "
            "builder=tensorrt"
        )


def _check_formats(targets: Sequence[str], formats: Iterable[str]) -> None:
    for target in targets:
        for name in formats:
            least, instead = _LEAST.get(name, (0, ""))
            if _capability(target) < least:
                raise BuilderError(f"{target} cannot compute {name}, which starts with sm_{least}; use {instead}")


def _capability(target: str) -> int:
    digits = re.fullmatch(r"sm_(\d{2,3})", target)
    if digits is None:
        raise BuilderError(f"target {target!r} is no compute capability; give sm_89, sm_120, ... or a file of conf/gpu")
    return int(digits[1])


# -- building ----------------------------------------------------------------------------------------------------------


def inspect_network(builder: str, onnx_file: Path, world: int = 1) -> NetworkReport:
    """What TensorRT makes of a graph, parsed but not built. Raises `BuilderError`."""
    return _report(_Build(builder, onnx_file, world))


def build_engine(
    builder: str,
    onnx_file: Path,
    engine_file: Path,
    profile: Profile,
    world: int = 1,
    targets: Sequence[str] = (),
) -> EngineReport:
    """Build the engine of one rank of `world` and write it, whole or not at all.

    `profile` has (least, optimal, most) for every dynamic axis by its name in the ONNX. Weights may lie in files beside
    the graph. Raises `BuilderError`.
    """
    start = time.perf_counter()
    build = _Build(builder, onnx_file, world)
    check_target(builder, targets, "float32")
    _check_formats(targets, sorted(_FORMATS[name] for name in build.dtypes() & set(_FORMATS)))
    config, shapes = build.configure(profile, targets)
    plan = build.run(config)
    partial = None
    try:
        with tempfile.NamedTemporaryFile(
            dir=engine_file.parent, prefix=f".{engine_file.name}.", delete=False
        ) as stream:
            partial = Path(stream.name)
            stream.write(plan)
        partial.chmod(0o644)
        os.replace(partial, engine_file)
    except BaseException:
        if partial is not None:
            partial.unlink(missing_ok=True)
        raise
    seconds = round(time.perf_counter() - start, 2)
    return EngineReport(engine_file.stat().st_size, seconds, build.log.scratch_bytes, _report(build), shapes)


class _Build:
    """One parsed network with the builder that can build it."""

    def __init__(self, builder: str, onnx_file: Path, world: int) -> None:
        self.trt = trt = load_module(builder)
        self.file, self.world = onnx_file, world
        check_world(builder, world)
        if not onnx_file.is_file():
            raise BuilderError(f"there is no graph {onnx_file}; write it first with export/build.py builder=onnx")
        self.llm: Any = importlib.import_module("tensorrt_llm") if builder == "tensorrt_llm" else None
        self.log = logger(trt)
        self.log.messages.clear()
        if self.llm is not None:
            self.wrapper = self.llm.builder.Builder()
            self.wrapped = self.wrapper.create_network()  # strongly typed, as ours
            self.builder, self.network = self.wrapper.trt_builder, self.wrapped.trt_network
        else:
            self.builder = trt.Builder(self.log)
            strong = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)  # without effect from TensorRT 11 on
            self.network = self.builder.create_network(strong)
        self.parser = trt.OnnxParser(self.network, self.log)  # holds the weights of the network
        if not self.parser.parse_from_file(str(onnx_file)):
            raise BuilderError(f"TensorRT cannot read {onnx_file}: {self._parser_errors()}")
        self._set_ranks()

    def _parser_errors(self) -> str:
        errors = []
        for error in map(self.parser.get_error, range(self.parser.num_errors)):
            place = f"node {error.node_name()!r} ({error.node_operator()}): " if error.node_operator() else ""
            errors.append(place + error.desc().strip())
        return "; ".join(dict.fromkeys([*errors, self._logged()]))  # the log may know the file that is missing

    def _logged(self) -> str:
        return "; ".join(dict.fromkeys(self.log.messages)) or "no reason was logged"

    def layers(self) -> Iterator[Any]:
        return map(self.network.get_layer, range(self.network.num_layers))

    def collectives(self) -> list[Any]:
        # the parser gives them as plain layers, on which num_ranks cannot be seen
        kind = getattr(self.trt.LayerType, "DIST_COLLECTIVE", None)
        collectives = [layer for layer in self.layers() if kind is not None and layer.type == kind]
        for layer in collectives:
            layer.__class__ = self.trt.IDistCollectiveLayer
        return collectives

    def _set_ranks(self) -> None:
        collectives = self.collectives()
        if collectives and self.world < 2:
            raise BuilderError(
                f"{self.file} has {len(collectives)} exchanges between ranks, but world={self.world}; give the number "
                "of ranks that it was traced for"
            )
        for layer in collectives:
            layer.num_ranks = self.world

    def dtypes(self) -> set[str]:
        """Every dtype in the network, TensorRT's names."""
        outputs = {layer.get_output(i).dtype.name for layer in self.layers() for i in range(layer.num_outputs)}
        return outputs | {tensor.dtype.name for tensor in map(self.network.get_input, range(self.network.num_inputs))}

    def configure(self, profile: Profile, targets: Sequence[str]) -> tuple[Any, Shapes]:
        """TensorRT's configuration (for TensorRT-RTX with targets), and what its optimisation profile holds."""
        llm_config = self.wrapper.create_builder_config("float32") if self.llm is not None else None
        config = self.builder.create_builder_config() if llm_config is None else llm_config.trt_builder_config
        shapes = self.builder.create_optimization_profile()
        config.clear_flag(self.trt.BuilderFlag.TF32)  # float32 is float32: TF32 would cost three digits
        exchanges = getattr(self.trt.PreviewFeature, "MULTIDEVICE_RUNTIME_10_16", None)  # TensorRT 11 needs no asking
        if self.world > 1 and exchanges is not None:
            config.set_preview_feature(exchanges, True)
        inputs = map(self.network.get_input, range(self.network.num_inputs))
        dynamic = [tensor.name for tensor in inputs if self._add_shape(shapes, tensor, profile)]
        if dynamic and config.add_optimization_profile(shapes) < 0:
            raise BuilderError(f"TensorRT refuses the profile {dict(profile)} of {self.file}: {self._logged()}")
        if targets and hasattr(config, "num_compute_capabilities"):  # else it builds for the GPU at hand
            self._set_targets(config, targets)
        held = {name: tuple(tuple(shape) for shape in shapes.get_shape(name)) for name in dynamic}
        return config if llm_config is None else llm_config, held

    def _add_shape(self, shapes: Any, tensor: Any, profile: Profile) -> bool:
        """Whether the profile has to say something about an input."""
        name, shape = tensor.name, tuple(tensor.shape)
        axes = [tensor.get_dimension_name(axis) or "" if size < 0 else None for axis, size in enumerate(shape)]
        for wanted in (axis for axis in axes if axis is not None):
            if wanted not in profile:
                raise BuilderError(
                    f"input {name} {list(shape)} of {self.file} needs sizes for {wanted or 'an unnamed axis'!r}; the "
                    f"profile has {', '.join(profile) or 'none'}: add (least, optimal, most)"
                )
            if sorted(profile[wanted]) != list(profile[wanted]):
                raise BuilderError(
                    f"profile of {wanted}: {profile[wanted]}; expected (least, optimal, most), ascending"
                )
        if any(axes):
            shapes.set_shape(
                name,
                *(tuple(profile[a][i] if a else size for a, size in zip(axes, shape, strict=True)) for i in range(3)),
            )
        return any(axes)

    def _set_targets(self, config: Any, targets: Sequence[str]) -> None:
        known = self.trt.ComputeCapability.__members__
        names = [f"SM{_capability(target)}" for target in targets]
        for name, target in zip(names, targets, strict=True):
            if name not in known:
                offered = ", ".join(f"sm_{other[2:]}" for other in known if other.startswith("SM"))
                raise BuilderError(f"{self.trt.__name__} {self.trt.__version__} has no target {target}; use {offered}")
        config.num_compute_capabilities = len(names)
        for i, name in enumerate(names):
            config.set_compute_capability(known[name], i)

    def run(self, config: Any) -> Any:
        """The serialised engine."""
        self.log.messages.clear()
        self.log.scratch_bytes = 0
        plan = None
        if self.llm is not None:
            try:
                plan = self.wrapper.build_engine(self.wrapped, config)
            except AssertionError as error:  # how it says that there is none; its logger has said why
                self.log.messages.append(f"TensorRT-LLM: {error}")
        else:
            plan = self.builder.build_serialized_network(self.network, config)
        if plan is None:
            raise BuilderError(f"TensorRT cannot build an engine of {self.file}: {self._logged()}")
        return plan


def local_target(builder: str) -> tuple[str, ...]:
    """The target of this machine's GPU if `builder` builds for no other; empty without a GPU."""
    import torch

    if builder not in _FOR_LOCAL_GPU or not torch.cuda.is_available():
        return ()
    return ("sm_{}{}".format(*torch.cuda.get_device_capability()),)


def check_local_target(builder: str, targets: Sequence[str]) -> None:
    """Raise `BuilderError` if `builder` builds only for this machine's GPU and `targets` name another."""
    local = local_target(builder)
    if local and targets and set(targets) != set(local):
        raise BuilderError(
            f"TensorRT builds for the GPU at hand, {local[0]}, but the target is {', '.join(targets)}; build on a "
            "machine with the target GPU, or leave out gpu="
        )


def _report(build: _Build) -> NetworkReport:
    network = build.network

    def describe(tensor: Any) -> TensorReport:
        axes = tuple((size < 0 and tensor.get_dimension_name(axis)) or "" for axis, size in enumerate(tensor.shape))
        return TensorReport(tensor.dtype.name, tuple(tensor.shape), axes)

    inputs, outputs = (
        map(network.get_input, range(network.num_inputs)),
        map(network.get_output, range(network.num_outputs)),
    )
    return NetworkReport(
        layers=dict(sorted(Counter(layer.type.name for layer in build.layers()).items())),
        inputs={tensor.name: describe(tensor) for tensor in inputs},
        outputs={tensor.name: describe(tensor) for tensor in outputs},
        collectives=tuple(layer.num_ranks for layer in build.collectives()),
    )


@functools.cache
def logger(trt: ModuleType) -> Any:
    """The one logger of a TensorRT module, which keeps the first it is given.

    Errors are kept for messages of ours, and what an engine asks for, which only an engine on a GPU would tell else.
    """

    class Log(trt.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[str] = []
            self.scratch_bytes = 0

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.messages.append(message.strip())
            elif scratch := re.search(r"Max Scratch Memory: (\d+) bytes", message):
                self.scratch_bytes = int(scratch[1])

    return Log()
