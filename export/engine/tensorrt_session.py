"""One TensorRT engine on one GPU: weights bound once, calls replayed as CUDA Graphs.

    session = EngineSession("tensorrt", Path("step.rank0.engine"))
    session.bind(weights)                       # tensors on the GPU are used where they lie, others are copied there
    outputs = session.run({"canvas": ..., ...})

The first call with certain shapes is launched as it is; the second captures a CUDA Graph, with an execution context and
input buffers of its own, which later calls with these shapes replay. What can be checked of a call is checked before
the GPU sees it, by functions that need none. `tests/gpu/test_engines.py` runs all of this; it has not been run yet.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from export.engine.builders import BuilderError, load_module, logger
from export.engine.engine import EngineError
from nemo_diffgemma.parallel.agreement import all_ranks
from nemo_diffgemma.parallel.team import own_device

GRAPHS_KEPT = 4  # an execution context each; generation needs one of `step` or `loop` at a time

_DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT8": torch.int8,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "UINT8": torch.uint8,
    "BOOL": torch.bool,
    "FP8": torch.float8_e4m3fn,
    "INT4": torch.uint8,  # two to a byte
    "FP4": torch.uint8,
}
_PACKED = ("INT4", "FP4")


# -- checks that need no GPU -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slot:
    """An input of an engine: TensorRT's name of its dtype, and shapes from `least` to `most` (equal where fixed)."""

    kind: str
    least: tuple[int, ...]
    most: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return _DTYPES[self.kind]


Geometry = tuple[tuple[str, tuple[int, ...]], ...]


def geometry(given: Mapping[str, Tensor]) -> Geometry:
    """What decides whether a captured call can be replayed: names and shapes, in an order of their own."""
    return tuple(sorted((name, tuple(tensor.shape)) for name, tensor in given.items()))


def check_inputs(slots: Mapping[str, Slot], given: Mapping[str, Tensor]) -> None:
    """Raise `EngineError` where names, dtypes or shapes are not what the engine takes."""
    missing, unknown = sorted(slots.keys() - given.keys()), sorted(given.keys() - slots.keys())
    if missing or unknown:
        wrong = [f"lacks {_few(missing)}"] * bool(missing) + [f"does not take {_few(unknown)}"] * bool(unknown)
        raise EngineError(
            f"the call {' and '.join(wrong)}; inputs of the engine are {_few(sorted(slots))} (bind gives weights)"
        )
    for name, slot in slots.items():
        check_input(name, slot, given[name])


def check_input(name: str, slot: Slot, tensor: Tensor) -> None:
    """Raise `EngineError` where dtype or shape of one input are not what the engine takes."""
    if tensor.dtype != slot.dtype:
        raise EngineError(
            f"input {name} is {tensor.dtype}, but the engine was built for {slot.dtype}; build it with the dtype "
            "of the weights, and give ids as int64"
        )
    shape = list(tensor.shape)
    if slot.kind in _PACKED and shape:
        shape[-1] *= 2
    if len(shape) != len(slot.least):
        raise EngineError(f"input {name} has shape {shape}; expected {_range(slot)}")
    for axis, (size, least, most) in enumerate(zip(shape, slot.least, slot.most, strict=True)):
        if not least <= size <= most:
            allowed = least if least == most else f"{least} to {most}"
            raise EngineError(
                f"input {name} has shape {shape}, but the engine takes {_range(slot)}: axis {axis} has {size}, and "
                f"{allowed} is allowed; {_how_to_rebuild(name, len(shape), axis, size)}"
            )


def _range(slot: Slot) -> str:
    sizes = (str(a) if a == b else f"{a}..{b}" for a, b in zip(slot.least, slot.most, strict=True))
    return f"[{', '.join(sizes)}]"


def _how_to_rebuild(name: str, axes: int, axis: int, size: int) -> str:
    stacked = name == "temperatures" or (name in ("uniforms", "replacements") and axes == 3)  # of all steps of `loop`
    if name.startswith("past_key_values.") and axis == 2:
        return f"shorten the context, or build with max_context={size} or more"
    if name == "input_ids" and axis == 1:
        return f"send the prompt in smaller chunks, or build with max_chunk={size}"
    if stacked and axis == 0:
        return f"ask for a number of steps that the engine has, or build with steps={size} (or steps=null)"
    if not name.startswith("model.") and axis == int(stacked):
        return f"send fewer rows, or build with max_batch_size={size}"
    return "the engine belongs to a model of other sizes: build it from this checkpoint"


def _few(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


# -- the engine --------------------------------------------------------------------------------------------------------


class EngineSession:
    """An engine file on CUDA device `device`, by default this process's own; of `world` ranks, one process each.

    Raises `EngineError` without a GPU, without the package of `builder`, or for a file this TensorRT cannot read.
    """

    def __init__(self, builder: str, engine_file: Path, device: int | None = None, world: int = 1) -> None:
        self._device = cuda_device(builder, device)
        try:
            self._trt = load_module(builder)
        except BuilderError as error:
            raise EngineError(str(error)) from error
        with torch.cuda.device(self._device):
            self._runtime, self._engine = _deserialize(self._trt, builder, engine_file)
            self._world = world
            self._stream = torch.cuda.Stream()
            self._context = self._new_context()
        self._slots, self._outputs = _describe(self._trt, self._engine)
        self._bound: dict[str, Tensor] = {}
        self._eager_before: OrderedDict[Geometry, None] = OrderedDict()
        self._captured: OrderedDict[Geometry, _Captured] = OrderedDict()
        self._capturable = True

    @property
    def inputs(self) -> tuple[str, ...]:
        """Inputs that `run` wants: all that are not bound."""
        return tuple(name for name in self._slots if name not in self._bound)

    def bind(self, weights: Mapping[str, Tensor]) -> None:
        """Set weights for all calls to come; those that this engine does not read are left alone."""
        for name, tensor in weights.items():
            if name in self._slots:
                check_input(name, self._slots[name], tensor)
                self._bound[name] = tensor.to(self._device).contiguous()
        self._captured.clear()
        self._set_weights(self._context)

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name, on the device, the caller's own. Raises `EngineError` for what the engine does not take."""
        check_inputs({name: self._slots[name] for name in self.inputs}, inputs)
        key = geometry(inputs)
        with torch.cuda.device(self._device):
            if key in self._eager_before and key not in self._captured and self._can_capture():
                self._capture(key, inputs)
            if key in self._captured:
                self._captured.move_to_end(key)
                return self._captured[key].replay(inputs)
            _remember(self._eager_before, key, None, 8 * GRAPHS_KEPT)
            placed = {name: tensor.to(self._device).contiguous() for name, tensor in inputs.items()}
            outputs = self._prepare(self._context, placed)
            self._launch(self._context)
            return outputs

    def _prepare(self, context: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Give a context its inputs -> the outputs it will fill."""
        for name, tensor in inputs.items():
            if not context.set_input_shape(name, tuple(tensor.shape)):
                raise EngineError(f"TensorRT refuses shape {list(tensor.shape)} of {name}: {self._logged()}")
            context.set_tensor_address(name, tensor.data_ptr())
        outputs = {}
        for name, dtype in self._outputs.items():
            shape = tuple(context.get_tensor_shape(name))
            if min(shape, default=0) < 0:
                raise EngineError(
                    f"TensorRT cannot tell the shape of output {name} beforehand: {list(shape)}; use graph `step`"
                )
            outputs[name] = torch.empty(shape, dtype=dtype, device=self._device)
            context.set_tensor_address(name, outputs[name].data_ptr())
        return outputs

    def _launch(self, context: Any) -> None:
        if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise EngineError(f"TensorRT could not run the engine: {self._logged()}")

    def _can_capture(self) -> bool:
        # TensorRT-RTX compiles kernels while it runs, and tells when it is done
        ready = getattr(self._context, "is_stream_capturable", None)
        return self._capturable and (ready is None or ready(self._stream.cuda_stream))

    def _capture(self, key: Geometry, inputs: Mapping[str, Tensor]) -> None:
        """Put a graph for this geometry into `_captured`, or give up capturing for good: calls can be launched too.

        All ranks do it or none: one that has no memory for it would run fewer exchanges than the others wait for.
        """
        while len(self._captured) >= GRAPHS_KEPT:
            self._captured.popitem(last=False)  # its memory first
        graph, prepared = None, self._attempt(self._own_buffers, inputs)
        if self._all(prepared is not None) and prepared and self._launched_before(prepared[0]):
            graph = self._attempt(self._recorded, prepared[0])
        if self._all(graph is not None) and prepared and graph:
            self._captured[key] = _Captured(graph, *prepared)
        else:
            self._capturable = False

    def _attempt[Made](self, make: Callable[..., Made], given: Any) -> Made | None:
        try:
            return make(given)
        except (RuntimeError, EngineError) as error:  # out of memory is a RuntimeError
            logging.getLogger(__name__).warning("no CUDA Graph of this engine, calls are launched: %s", error)
            return None

    def _all(self, flag: bool) -> bool:
        return flag if self._world == 1 else all_ranks(flag, self._device)

    def _own_buffers(self, inputs: Mapping[str, Tensor]) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
        """An execution context, inputs and outputs of a captured call's own."""
        context = self._new_context()
        self._set_weights(context)
        buffers = {name: tensor.to(self._device, copy=True).contiguous() for name, tensor in inputs.items()}
        return context, buffers, self._prepare(context, buffers)

    def _launched_before(self, context: Any) -> bool:
        """One call, so that nothing is allocated or copied to the device while capturing.

        An engine with exchanges raises its errors, as in any call: other ranks wait for this one, and only the end of
        its process ends that.
        """
        return self._warm_up(context) if self._world > 1 else bool(self._attempt(self._warm_up, context))

    def _warm_up(self, context: Any) -> bool:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._launch(context)
        self._stream.synchronize()
        return True

    def _recorded(self, context: Any) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # the outer one restores the caller's stream after a capture that has failed as well
        with torch.cuda.stream(self._stream), torch.cuda.graph(graph, stream=self._stream):
            self._launch(context)
        return graph

    def _new_context(self) -> Any:
        context = self._engine.create_execution_context()
        if context is None:
            raise EngineError(
                f"no memory for another execution of the engine ({self._logged()}); build with a smaller "
                "max_batch_size or max_context"
            )
        if self._world > 1:
            if not hasattr(context, "set_communicator"):
                raise EngineError(f"{self._trt.__name__} {self._trt.__version__} runs one rank only; use TensorRT 11")
            if not context.set_communicator(_communicator(self._device)):
                raise EngineError(f"TensorRT refuses the NCCL communicator: {self._logged()}")
        return context

    def _set_weights(self, context: Any) -> None:
        for name, tensor in self._bound.items():
            context.set_input_shape(name, self._slots[name].most)
            context.set_tensor_address(name, tensor.data_ptr())

    def _logged(self) -> str:
        return "; ".join(logger(self._trt).messages[-3:]) or "no reason was logged"


class _Captured:
    """A captured call: inputs are copied into its buffers, those that have not changed since the last call are not."""

    def __init__(
        self, graph: torch.cuda.CUDAGraph, context: Any, buffers: dict[str, Tensor], outputs: dict[str, Tensor]
    ) -> None:
        self._graph, self._context, self._buffers, self._outputs = graph, context, buffers, outputs
        self._last: dict[str, tuple[Tensor, int]] = {}

    def replay(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for name, tensor in inputs.items():
            last, version = self._last.get(name, (None, -1))
            counted = not tensor.is_inference()  # else nobody counts its changes
            if last is tensor and counted and version == tensor._version:
                continue  # the context of a canvas is the same at every step
            self._buffers[name].copy_(tensor, non_blocking=True)
            self._last[name] = tensor, tensor._version if counted else -1
        self._graph.replay()
        return {name: tensor.clone() for name, tensor in self._outputs.items()}


def _remember(kept: OrderedDict[Geometry, Any], key: Geometry, value: Any, most: int) -> None:
    kept[key] = value
    kept.move_to_end(key)
    while len(kept) > most:
        kept.popitem(last=False)


def cuda_device(builder: str, device: int | None = None) -> torch.device:
    """The device, by default this process's own. Raises `EngineError` where it is not there."""
    if not torch.cuda.is_available():
        raise EngineError(
            f"provider={builder} needs an NVIDIA GPU and its driver; on this machine use provider=onnxruntime"
        )
    device = own_device() if device is None else device
    if not 0 <= device < torch.cuda.device_count():
        raise EngineError(f"device={device}; this machine has CUDA devices 0 to {torch.cuda.device_count() - 1}")
    return torch.device("cuda", device)


def _deserialize(trt: Any, builder: str, file: Path) -> tuple[Any, Any]:
    """(what must outlive the engine, the engine)."""
    if not file.is_file():
        raise EngineError(f"there is no engine {file}; build it with export/build.py builder={builder}")
    logger(trt).messages.clear()
    plan = np.memmap(file, np.uint8, mode="r")  # with weights inside, a copy would fill the host's memory
    if builder == "tensorrt_llm":  # its Session is TensorRT's runtime, engine and a first context
        runtime = importlib.import_module("tensorrt_llm.runtime").Session.from_serialized_engine(plan)
        engine = runtime.engine
    else:
        runtime = trt.Runtime(logger(trt))
        engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise EngineError(
            f"{trt.__name__} {trt.__version__} cannot read {file}: {'; '.join(logger(trt).messages)}; "
            "engines belong to the TensorRT version and GPU they were built for: build it again here"
        )
    return runtime, engine


def _describe(trt: Any, engine: Any) -> tuple[dict[str, Slot], dict[str, torch.dtype]]:
    slots: dict[str, Slot] = {}
    outputs: dict[str, torch.dtype] = {}
    for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
        kind = engine.get_tensor_dtype(name).name
        if engine.get_tensor_mode(name) != trt.TensorIOMode.INPUT:
            outputs[name] = _DTYPES[kind]
            continue
        if engine.get_tensor_location(name) == trt.TensorLocation.HOST:
            raise EngineError(
                f"engine input {name} is a shape tensor; graphs of export/build.py have none: build the engine with it"
            )
        fixed = tuple(engine.get_tensor_shape(name))
        least, _, most = (
            engine.get_tensor_profile_shape(name, 0) if engine.num_optimization_profiles else (fixed, fixed, fixed)
        )
        slots[name] = Slot(kind, tuple(least) if -1 in fixed else fixed, tuple(most) if -1 in fixed else fixed)
    return slots, outputs


@functools.cache
def _communicator(device: torch.device) -> Any:
    """NCCL communicator of all processes in the capsule that TensorRT takes, named as in its sample attention_mdtrt."""
    import torch.distributed as dist

    torch.cuda.set_device(device)  # what torch itself exchanges between the processes goes over this GPU too
    if not dist.is_initialized():
        dist.init_process_group("nccl", device_id=device)
    group = dist.new_group(backend="nccl", device_id=device)  # torch keeps it, and with it the communicator
    dist.all_reduce(torch.zeros(1, device=device), group=group)  # torch makes the communicator at first use
    pointer = group._get_backend(device)._comm_ptr()
    make = ctypes.pythonapi.PyCapsule_New
    make.restype, make.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return make(pointer, b"ncclComm_t", None)
