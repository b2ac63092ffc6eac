"""Layouts, process groups and vocabulary-sharded arithmetic."""

from nemo_diffgemma.parallel.groups import agree_error, current_layout, device, initialize, process_groups, shutdown
from nemo_diffgemma.parallel.layout import LayoutError, ParallelLayout

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
