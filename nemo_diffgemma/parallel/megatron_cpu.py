"""Megatron-Core 0.19 on a CPU with gloo: one contained module, a no-op where CUDA is available.

Megatron asks `torch.cuda` for the current device, for streams and for random states even where nothing runs on a GPU.
Here the name `torch` inside `megatron.core.*` modules is rebound to a stand-in whose factories send "cuda" to the CPU
and whose `.cuda` answers for it. PyTorch itself is left alone: other code in the process sees the real one.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import sys
import types
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
# Megatron loads these on first use; they must be loaded before the name `torch` is rebound in them.
_LAZY = (
    "dist_checkpointing.strategies.async_utils",
    "dist_checkpointing.strategies.filesystem_async",
    "dist_checkpointing.strategies.state_dict_saver",
    "dist_checkpointing.strategies.torch",
    "distributed.param_and_grad_buffer",
    "optimizer.clip_grads",
    "optimizer.distrib_optimizer",
    "optimizer.optimizer",
    "pipeline_parallel.p2p_communication",
    "pipeline_parallel.schedules",
)
_enabled = False


def enable() -> None:
    """Make Megatron usable without CUDA. Idempotent; does nothing where CUDA is available."""
    global _enabled
    if torch.cuda.is_available():
        return
    if not _enabled:
        for name in _LAZY:
            importlib.import_module(f"megatron.core.{name}")
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = _STAND_IN  # type: ignore[attr-defined]
    if _enabled:
        return
    _enabled = True
    _random_states()
    _cuda_type_names_where_asserted()


# -- the stand-in for `torch` ----------------------------------------------------------------------------------------


class _Stream:
    """A stream (and event) that has always finished."""

    stream_id = device_index = cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None

    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> Any:
        return event or _Stream()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return 0


class _Cuda:
    Stream = Event = _Stream

    def current_device(self) -> torch.device:
        return _CPU

    def current_stream(self, *args: Any) -> _Stream:
        return _Stream()

    def stream(self, stream: Any) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def synchronize(self, *args: Any) -> None: ...
    def empty_cache(self) -> None: ...
    def get_rng_state(self, *args: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, *args: Any) -> None:
        torch.set_rng_state(state)

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


class _Torch(types.ModuleType):
    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = _Cuda()
        for name in ("tensor", "zeros", "ones", "empty", "full", "arange", "as_tensor", "rand", "randn"):
            setattr(self, name, self._on_cpu(getattr(torch, name)))

    @staticmethod
    def _on_cpu(factory: Any) -> Any:
        @functools.wraps(factory)
        def make(*args: Any, **kwargs: Any) -> torch.Tensor:
            device = kwargs.get("device")
            if device is not None and torch.device(device).type == "cuda":
                kwargs["device"] = _CPU
            return factory(*args, **kwargs)

        return make

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


_STAND_IN = _Torch()


# -- places that need more than the stand-in -------------------------------------------------------------------------


def _random_states() -> None:
    import megatron.core.tensor_parallel.random as random

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


class _CudaTypeNames(TorchFunctionMode):
    """Within it `x.type()` says 'torch.cuda.FloatTensor' and `x.cuda()` is `x`: Megatron's optimizers assert on it."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.cuda:
            return args[0]
        result = function(*args, **(kwargs or {}))
        if function is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.", 1)
        return result


def _cuda_type_names_where_asserted() -> None:
    from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer

    def wrap(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with _CudaTypeNames():
                return function(*args, **kwargs)

        setattr(owner, name, call)

    wrap(distrib_optimizer.DistributedOptimizer, "__init__")
    wrap(optimizer.Float16OptimizerWithFloat16Params, "__init__")
    wrap(clip_grads, "clip_grad_by_total_norm_fp32")
    wrap(optimizer, "clip_grad_by_total_norm_fp32")
