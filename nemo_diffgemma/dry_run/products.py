"""FLOPs of products, the kernels of attention, and products that run in float32 in a bfloat16 model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from nemo_diffgemma.dry_run import shadows
from nemo_diffgemma.dry_run.ledger import Ledger, place

aten = torch.ops.aten

_PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten._grouped_mm}
_ATTENTION = {
    aten._scaled_dot_product_flash_attention: "flash",
    aten._scaled_dot_product_efficient_attention: "memory-efficient",
    aten._scaled_dot_product_cudnn_attention: "cuDNN",
}

# file:function -> why its products may be float32 in a bfloat16 model
ALLOWED_FLOAT32: dict[str, str] = {}


def runs_as_loop(a: Tensor, b: Tensor) -> bool:
    """Whether torch multiplies groups one by one, with their ends read by the host.

    Its grouped kernel takes bfloat16 on sm_90 and sm_100 only (aten/src/ATen/native/cuda/GroupedBlas.cpp).
    """
    major = torch.cuda.get_device_capability()[0]
    return major not in (9, 10) or a.dtype != torch.bfloat16 or b.dtype != torch.bfloat16


def launches_of(func: Any, args: Any) -> int:
    """Kernels of an operation: one, but for grouped products that run as a loop."""
    if func is aten._grouped_mm.default and runs_as_loop(args[0], args[1]):
        a, b, ends = args[:3]
        return (ends if ends is not None else a if a.dim() == 3 else b).shape[0]
    return 1


def grouped_shape(a: Tensor, b: Tensor, ends: Tensor | None) -> tuple[int, ...]:
    """Of the result: a group is a matrix of a 3D operand, or a slice of what both 2D operands share."""
    if a.dim() == b.dim() == 2:
        assert ends is not None
        return (ends.shape[0], a.shape[0], b.shape[1])
    return (*a.shape[:-1], b.shape[-1]) if b.dim() == 3 else (a.shape[1], b.shape[1])


def record(ledger: Ledger, func: Any, args: Any, kwargs: Any, out: Any, model_dtype: torch.dtype) -> None:
    """Count FLOPs and attention kernels of an operation; float32 products of a bfloat16 model are violations."""
    packet = func._overloadpacket
    if packet is aten._grouped_mm:
        ledger.add("tflop", "grouped_mm", number=2e-12 * _grouped_multiplications(*args[:3]))
    elif packet in flop_registry:
        flops = flop_registry[packet](*args, **kwargs, out_val=out)
        ledger.add("tflop", packet.__name__.strip("_"), number=1e-12 * flops)
    if packet in _ATTENTION:
        attention(ledger, _ATTENTION[packet], args[0])
    if model_dtype != torch.float32 and packet in _PRODUCTS and _inputs(packet, args)[0].dtype == torch.float32:
        where = place()
        if not where.is_among(ALLOWED_FLOAT32):
            shapes = " x ".join(str(list(x.shape)) for x in _inputs(packet, args))
            ledger.violate(f"a float32 product in a {str(model_dtype)[6:]} model: {shapes} at {where}")


def _grouped_multiplications(a: Tensor, b: Tensor, ends: Tensor | None) -> int:
    """2D x 3D: rows x k x n, 2D x 2D: m x rows x n; rows behind the end of the last group are not multiplied."""
    rows = a.shape[0] if b.dim() == 3 else a.shape[1]
    values = shadows.of(ends)
    if values is not None:
        rows = min(rows, int(values[-1]))
    return rows * (a.shape[1] if b.dim() == 3 else a.shape[0]) * b.shape[-1]


def attention(ledger: Ledger, kernel: str, q: Tensor) -> None:
    """Count a call of an attention kernel."""
    ledger.attention_calls += 1
    ledger.add("attention", f"{kernel}, width {q.shape[-1]}, {str(q.dtype)[6:]}")


def _inputs(packet: Any, args: Any) -> tuple[Tensor, Tensor]:
    return args[1:3] if packet in (aten.addmm, aten.baddbmm) else args[:2]
