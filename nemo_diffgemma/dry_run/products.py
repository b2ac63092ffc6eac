"""FLOPs of products, the kernels of attention, and products that run in float32 in a bfloat16 model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

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
        return next(x.shape[0] for x in (args[1], args[0], args[2]) if isinstance(x, Tensor) and x.dim() != 2)
    return 1


def record(ledger: Ledger, func: Any, args: Any, kwargs: Any, out: Any, model_dtype: torch.dtype) -> None:
    """Count FLOPs and attention kernels of an operation; float32 products of a bfloat16 model are violations."""
    packet = func._overloadpacket
    if packet is aten._grouped_mm:  # 2D x 3D: rows x k x n; 2D x 2D: m x tokens x n
        ledger.add("tflop", "grouped_mm", number=2e-12 * args[0].shape[0] * args[0].shape[1] * args[1].shape[-1])
    elif packet in flop_registry:
        flops = flop_registry[packet](*args, **kwargs, out_val=out)
        ledger.add("tflop", packet.__name__.strip("_"), number=1e-12 * flops)
    if packet in _ATTENTION:
        attention(ledger, _ATTENTION[packet], args[0])
    if model_dtype != torch.float32 and packet in _PRODUCTS and _inputs(packet, args)[0].dtype == torch.float32:
        where = place()
        if not any(name in ALLOWED_FLOAT32 for name in where.names):
            shapes = " x ".join(str(list(x.shape)) for x in _inputs(packet, args))
            ledger.violate(f"a float32 product in a {str(model_dtype)[6:]} model: {shapes} at {where}")


def attention(ledger: Ledger, kernel: str, q: Tensor) -> None:
    """Count a call of an attention kernel."""
    ledger.add("attention", f"{kernel}, width {q.shape[-1]}, {str(q.dtype)[6:]}")


def _inputs(packet: Any, args: Any) -> tuple[Tensor, Tensor]:
    return args[1:3] if packet in (aten.addmm, aten.baddbmm) else args[:2]
