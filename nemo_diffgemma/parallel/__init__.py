"""Layouts and process groups. What needs Megatron loads on first use."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any
from unittest import mock

from nemo_diffgemma.parallel.layout import LayoutError, ParallelLayout

if TYPE_CHECKING:
    from nemo_diffgemma.parallel.groups import (
        current_layout,
        device,
        initialize,
        process_groups,
        shutdown,
    )

__all__ = [
    "LayoutError",
    "ParallelLayout",
    "current_layout",
    "device",
    "initialize",
    "process_groups",
    "shutdown",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        _import_megatron()
        return getattr(import_module("nemo_diffgemma.parallel.groups"), name)
    raise AttributeError(f"module 'nemo_diffgemma.parallel' has no attribute {name!r}")


def _import_megatron() -> None:
    """On a CPU without torch's compiler, which takes four seconds to load.

    Megatron decorates its fused kernels with torch.compile when it is imported; those that run here run as they are.
    """
    if "megatron.core" in sys.modules:
        return
    import torch

    if torch.cuda.is_available():
        return
    with mock.patch.object(torch, "compile", lambda function=None, **_: function or (lambda decorated: decorated)):
        import_module("megatron.core")
