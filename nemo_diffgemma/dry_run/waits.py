"""Where the host would wait for the GPU: reads of values, copies that are not asynchronous, shapes that depend on data.

A copy waits unless it is `non_blocking`, and one to the host also unless its target is pinned (the CUDA runtime API's
"synchronization behavior"; torch synchronises the stream after a copy that may block). `ALLOWED` names the functions
that may wait; any other wait is a violation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from nemo_diffgemma.dry_run.ledger import Ledger, place
from nemo_diffgemma.dry_run.products import runs_as_loop

aten = torch.ops.aten

ITEM = "reads a number"
TO_HOST = "copies to pageable memory"
TO_GPU = "copies to the GPU, blocking"
SHAPE = "shape depends on values"
INDEX = "indices from the host"
LOOP = "grouped product as a loop"
SYNCHRONISE = "synchronises"

_NUMBERS = "nemo_diffgemma/transfer.py:values < nemo_diffgemma"
# file:function, or that < file:function of a caller further out -> why it may wait
ALLOWED = {
    "nemo_diffgemma/diffusion/generate.py:generate": "whether all rows are finished, once a canvas",
    "nemo_diffgemma/model/fixed_step.py:__call__": "records a CUDA graph, once for each geometry",
    "nemo_diffgemma/parallel/agreement.py:_vote < nemo_diffgemma/model/fixed_step.py:_record": "all ranks or none",
    f"{_NUMBERS}/model/experts.py:_over_group": "rows of the experts here, once a layer and pass with gradient",
    f"{_NUMBERS}/model/dispatch.py:most_of_all": "the most tokens of a replica, once a pass",
    f"{_NUMBERS}/training/nemo_model.py:training_step": "loss and gradient norm for the log, once a step",
}

ALLOWED_KINDS = {LOOP: "all that torch has on this GPU; the figures show how many"}

_SHAPES_FROM_VALUES = {
    aten.masked_select.default,
    aten.nonzero.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.bincount.default,
}
WRITES_AT_INDICES = {aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}


def wait_of(func: Any, args: Any, kwargs: Any) -> str | None:
    """The kind of wait that an operation is, if it is one."""
    if func is aten._local_scalar_dense.default or func is aten.equal.default:
        return ITEM
    if func in _SHAPES_FROM_VALUES or (func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None):
        return SHAPE
    if func is aten._to_copy.default:
        return _of_cast(args[0], kwargs)
    if func is aten.copy_.default:
        return _of_copy(args[0], args[1], (args[2] if len(args) > 2 else kwargs.get("non_blocking")) or False)
    if func is aten.index.Tensor or func in WRITES_AT_INDICES:
        indices = [x for x in args[1] if x is not None]
        if func in WRITES_AT_INDICES and _is_masked_fill(args, indices):
            return None
        if any(x.dtype in (torch.bool, torch.uint8) for x in indices):
            return SHAPE
        return INDEX if any(not isinstance(x, FakeTensor) and x.dim() for x in indices) else None
    if func is aten._grouped_mm.default and runs_as_loop(args[0], args[1]):
        return LOOP
    return None


def _is_masked_fill(args: Any, indices: list[Tensor]) -> bool:
    """Whether torch runs it as `masked_fill_`: one mask and a number of the host (TensorAdvancedIndexing.cpp)."""
    value, accumulate = args[2], args[3] if len(args) > 3 else False
    is_number = not isinstance(value, FakeTensor) and value.numel() == 1
    return is_number and not accumulate and len(indices) == 1 and indices[0].dtype in (torch.bool, torch.uint8)


def _of_cast(x: Tensor, kwargs: Any) -> str | None:
    target = kwargs.get("device")
    if target is None or kwargs.get("non_blocking"):  # torch takes pinned memory for an asynchronous copy to the host
        return None
    to_gpu = torch.device(target).type == "cuda"
    if isinstance(x, FakeTensor) and x.device.type == "cuda":
        return None if to_gpu else TO_HOST
    return TO_GPU if to_gpu else None


def _of_copy(target: Tensor, source: Tensor, non_blocking: bool) -> str | None:
    if not isinstance(target, FakeTensor):
        return None if non_blocking and target.is_pinned() else TO_HOST
    return None if isinstance(source, FakeTensor) or non_blocking else TO_GPU


def record(ledger: Ledger, kind: str) -> None:
    """Count a wait; a violation, unless its function or its kind is allowed.

    Raises RuntimeError while a CUDA graph is captured, as CUDA does.
    """
    where = place()
    if ledger.captured is not None:
        if kind not in ALLOWED_KINDS:
            ledger.violate(f"a wait while a CUDA graph is captured: {kind} at {where}")
        raise RuntimeError(f"operation not permitted when stream is capturing: {kind} at {where}")
    ledger.add("waits")
    ledger.add("wait", kind, str(where))
    if kind not in ALLOWED_KINDS and not where.is_among(ALLOWED):
        ledger.violate(f"a wait of the host: {kind} at {where}")
