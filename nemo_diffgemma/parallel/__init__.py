"""Layouts, process groups and vocabulary-sharded arithmetic. What needs Megatron loads on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nemo_diffgemma.parallel.layout import LayoutError, ParallelLayout

if TYPE_CHECKING:
    from nemo_diffgemma.parallel.groups import (
        agree_error,
        current_layout,
        device,
        initialize,
        process_groups,
        shutdown,
    )

__all__ = [
    "LayoutError",
    "ParallelLayout",
    "agree_error",
    "current_layout",
    "device",
    "initialize",
    "process_groups",
    "shutdown",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("nemo_diffgemma.parallel.groups"), name)
    raise AttributeError(f"module 'nemo_diffgemma.parallel' has no attribute {name!r}")
