"""Export: engines of the block denoiser. `open_bundle` is the door for Python; `export/README.md` the guide."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from export.bundle.opening import open_bundle

__all__ = ["open_bundle"]


def __getattr__(name: str) -> Any:
    if name == "open_bundle":
        from export.bundle.opening import open_bundle

        return open_bundle
    raise AttributeError(f"module 'export' has no attribute {name!r}")
