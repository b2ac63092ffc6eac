"""Values of GPU tensors that are not there: a small tensor whose values follow from the host's has a shadow on the CPU.

With shadows `.tolist()`, masks and the splits of an all-to-all are true. The choice of experts cannot be known, so it
is set: indices that `topk` gives are round robin, every expert gets as many tokens as any other. A comparison of what
is not known is false (nothing is finished, nothing accepted). What has no shadow reads 1.0 or 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_iter, tree_map

aten = torch.ops.aten

_MOST = 1 << 22  # elements of a shadow
_MOST_FLOATS = 1 << 16  # of floats that are made from nothing: noise is integers, masks of zeros are activations
_CONSTANTS = {
    aten.zeros.default: 0,
    aten.ones.default: 1,
    aten.zeros_like.default: 0,
    aten.ones_like.default: 1,
    aten.new_zeros.default: 0,
    aten.new_ones.default: 1,
}
_WITHOUT_VALUE = {
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.empty_strided.default,
    aten.new_empty_strided.default,
    aten.randn.default,
    aten.rand.default,
}
_JOINS = {aten.stack.default, aten.cat.default}
_FEW = 64  # elements of what is joined of known and unknown values: flags that the host reads at once
_FEW_FLAGS = 4096  # elements of booleans that are taken for False where nothing is known: logic over them is consistent
_NAME = "_dry_run_shadow"


def of(x: Any) -> Tensor | None:
    """The shadow of a tensor, if it has one and nothing unknown was written to its storage since."""
    if not isinstance(x, FakeTensor):
        return None
    value, writes = getattr(x, _NAME, (None, 0))
    return value if value is not None and writes == _unknown_writes(x) else None


def give(x: Tensor, value: Tensor) -> None:
    """Make `value` the shadow."""
    setattr(x, _NAME, (value, _unknown_writes(x)))


def forget(x: Any) -> None:
    """Something unknown was written: neither the tensor nor any view of its storage has values any more."""
    if isinstance(x, FakeTensor):
        setattr(x.untyped_storage(), _NAME, _unknown_writes(x) + 1)


def _unknown_writes(x: Tensor) -> int:
    return getattr(x.untyped_storage(), _NAME, 0)


def read(x: Tensor) -> Tensor:
    """What the host would read, as a CPU tensor of its own."""
    known = of(x) if isinstance(x, FakeTensor) else x
    if known is not None:
        return known.clone()
    return torch.full(x.shape, 1 if x.is_floating_point() else 0, dtype=x.dtype)


def on_cpu(func: Any, args: Any, kwargs: Any) -> Any:
    """`func` of the shadows."""

    def lower(x: Any) -> Any:
        if isinstance(x, FakeTensor):
            return of(x)
        return torch.device("cpu") if isinstance(x, torch.device) else x

    return func(*tree_map(lower, args), **tree_map(lower, kwargs))


def follow(func: Any, args: Any, kwargs: Any, fakes: list[FakeTensor], out: Any) -> None:
    """After an operation: its outputs have shadows where all of its inputs have."""
    if func is aten.topk.default:
        _round_robin(out[1], args[0].shape[-1])
        return
    small = all(x.numel() <= _MOST for x in tree_iter((out, args)) if isinstance(x, Tensor))
    if func in _CONSTANTS:
        if small and not out.is_floating_point():
            give(out, torch.full(out.shape, _CONSTANTS[func], dtype=out.dtype))
        return
    if func is aten.copy_.default:
        _copied(args[0], args[1], small)
        return
    if func in _JOINS and out.numel() <= _FEW and any(of(x) is not None for x in fakes):
        give(out, func([read(x) if isinstance(x, FakeTensor) else x for x in args[0]], *args[1:], **kwargs))
        return
    known = small and func not in _WITHOUT_VALUE and all(of(x) is not None for x in fakes)
    if known and not fakes:  # made from nothing: full, arange
        known = isinstance(out, Tensor) and (not out.is_floating_point() or out.numel() <= _MOST_FLOATS)
    if not known:
        for x in _written(func, args):
            forget(x)
        for x in tree_iter(out):
            if isinstance(x, FakeTensor) and x.dtype == torch.bool and x.numel() <= _FEW_FLAGS:
                give(x, torch.zeros(x.shape, dtype=torch.bool))
        return
    value = on_cpu(func, args, kwargs)
    for mine, theirs in zip(tree_iter(out), tree_iter(value), strict=False):
        if isinstance(mine, FakeTensor):
            give(mine, theirs)


def _written(func: Any, args: Any) -> list[Any]:
    writes = [arg.alias_info is not None and arg.alias_info.is_write for arg in func._schema.arguments]
    return [x for arg, write in zip(args, writes, strict=False) if write for x in tree_iter(arg)]


def _copied(target: Any, source: Any, small: bool) -> None:
    value = of(source) if isinstance(source, FakeTensor) else source
    if not isinstance(target, FakeTensor):
        return
    if value is None or not small:
        forget(target)
    elif (shadow := of(target)) is not None:
        shadow.copy_(value)
    else:
        give(target, value.to(target.dtype).expand(target.shape).clone())


def _round_robin(indices: Tensor, size: int) -> None:
    give(indices, torch.arange(indices.numel()).view(indices.shape) % size)
