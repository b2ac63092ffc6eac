"""The dispatch mode of a dry run: operations on CPU tensors run as they are, operations on GPU tensors on shapes alone.

GPU tensors are torch's fake tensors, made under a FakeTensorMode that is entered for one operation at a time: so all
logic of the host (noise, choice of canvases, counts) stays real. Everything is counted here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

from nemo_diffgemma.dry_run import communication, flex, products, shadows, waits
from nemo_diffgemma.dry_run.ledger import Ledger, place
from nemo_diffgemma.dry_run.memory import Memory

aten, c10d, prim = torch.ops.aten, torch.ops.c10d, torch.ops.prim

_MAKE_NOTHING = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.empty_strided.default,
    aten.new_empty_strided.default,
}


class MixedDevicesError(Exception):
    """An operation on CPU and GPU tensors that a GPU would refuse; the run ends there."""


class DryRun(TorchDispatchMode):
    """Counts in `ledger`, tracks `memory`. `model_dtype` says which products may be float32."""

    def __init__(self, model_dtype: torch.dtype) -> None:
        super().__init__()
        self.model_dtype = model_dtype
        self.ledger = Ledger()
        self.memory = Memory(self.ledger)
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # asked thousands of times
        kwargs = kwargs or {}
        leaves = list(tree_iter((args, kwargs)))
        fakes = [x for x in leaves if isinstance(x, FakeTensor)]
        if not fakes and not any(isinstance(x, torch.device) and x.type == "cuda" for x in leaves):
            return func(*args, **kwargs)
        if func.namespace == "c10d":
            return self._communicate(func, args, kwargs)
        if (kind := waits.wait_of(func, args, kwargs)) is not None:
            waits.record(self.ledger, kind)
        if func is aten._local_scalar_dense.default:
            return shadows.read(args[0]).item()
        if func is aten.record_stream.default:
            return None
        if func is aten._to_copy.default and fakes and "cpu" in str(kwargs.get("device")):
            return self._copy_to_host(args[0], kwargs)
        if func is aten.copy_.default and not isinstance(args[0], FakeTensor):
            self.ledger.add("launches")
            return args[0].copy_(shadows.read(args[1]))
        if kind == waits.SHAPE and func not in waits.WRITES_AT_INDICES:
            return self._sized_by_values(func, args, kwargs, fakes)
        out = self._on_shapes(func, args, kwargs)
        self._count(func, args, kwargs, out)
        for x in tree_iter(out):
            if isinstance(x, FakeTensor) and x.device.type == "cuda":
                self.memory.track(x)
        shadows.follow(func, args, kwargs, fakes, out)
        return out

    # -- one operation -------------------------------------------------------------------------------------------

    def _on_shapes(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run on shapes. Real CPU tensors among the arguments take part with theirs."""
        if not func._schema.returns:  # foreach and fused updates in place
            return None

        def shape_only(x: Any) -> Any:
            if isinstance(x, Tensor) and not isinstance(x, FakeTensor):
                return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype)
            return x

        if func is aten._grouped_mm.default and products.runs_as_loop(*args[:2]):
            with self._fake:  # torch's own function of shapes knows the grouped kernel only
                return args[0].new_empty(products.grouped_shape(*args[:3]))
        try:
            with self._fake:
                return func(*tree_map(shape_only, args), **tree_map(shape_only, kwargs))
        except RuntimeError as error:
            if "device" not in str(error).lower():
                raise
            where = place()
            self.ledger.violate(f"CPU and GPU tensors in one operation, {func.name()}, at {where}")
            raise MixedDevicesError(f"{func.name()} at {where}: {error}") from error

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        returns = func._schema.returns
        if func in _MAKE_NOTHING or (returns and all(_is_view(x) for x in returns)):
            return
        if func is flex.BACKWARD or func is flex.FORWARD:
            flex.record(self.ledger, func, args)
            return
        self.ledger.add("launches", number=products.launches_of(func, args))
        products.record(self.ledger, func, args, kwargs, out, self.model_dtype)

    def _communicate(self, func: Any, args: Any, kwargs: Any) -> Any:
        communication.record(self.ledger, func, args)
        if "coalesced" in func.name():
            out = self._on_shapes(c10d._allgather_base_.default, communication.borrowed(args), {})[1]
        else:
            out = self._on_shapes(func, args, kwargs)
        communication.follow(func, args, communication.group_of(args).size())
        return out

    # -- values --------------------------------------------------------------------------------------------------

    def _copy_to_host(self, x: FakeTensor, kwargs: Any) -> Tensor:
        self.ledger.add("launches")
        value = shadows.read(x).to(kwargs.get("dtype") or x.dtype)
        return value.pin_memory() if kwargs.get("non_blocking") else value

    def _sized_by_values(self, func: Any, args: Any, kwargs: Any, fakes: list[FakeTensor]) -> Tensor:
        """An operation whose shape depends on values: by its shadows, else as many as the mask has."""
        self.ledger.add("launches", number=2)  # what counts, and what writes
        value = None
        if all(shadows.of(x) is not None for x in fakes):
            value = shadows.on_cpu(func, args, kwargs)
            if not isinstance(value, Tensor):
                raise NotImplementedError(f"a dry run cannot follow {func.name()} at {place()}")
            shape, dtype = value.shape, value.dtype
        else:
            masks = [x for x in (args[1] if func is aten.index.Tensor else ()) if x is not None]
            mask = shadows.of(masks[0]) if len(masks) == 1 and isinstance(masks[0], FakeTensor) else None
            if mask is None:
                raise NotImplementedError(f"a dry run knows no values of what {func.name()} at {place()} depends on")
            shape, dtype = (int(mask.sum()), *args[0].shape[mask.dim() :]), args[0].dtype  # type: ignore[assignment]
        with self._fake:
            out = torch.empty(shape, dtype=dtype, device="cuda")
        self.memory.track(out)
        if value is not None:
            shadows.give(out, value)
        return out


def _is_view(returned: Any) -> bool:
    return returned.alias_info is not None and not returned.alias_info.is_write
