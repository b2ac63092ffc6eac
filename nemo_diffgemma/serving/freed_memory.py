"""Memory of a process that stays its own when it is freed.

Each pass of an engine on a CPU asks for the same large tensors. glibc by default gives those back to the kernel and
takes them anew, and the kernel clears every page again: of a pass of benchmarks/serve.py that was a tenth.
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # of <malloc.h>
_NEVER, _AHEAD = -1, 64 << 20  # bytes


def keep_freed_memory() -> None:
    """From now on. Where the C library is not glibc nothing happens."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER), (_TOP_PAD, _AHEAD)):
            mallopt(option, value)
