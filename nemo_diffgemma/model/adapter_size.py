"""Size of an adapter, and how its parameters are told from weights: what needs no Megatron."""

from __future__ import annotations

from dataclasses import dataclass

CHILD = "adapters"  # name of the adapters among the children of a linear


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name is one of an adapter."""
    return f".{CHILD}." in name


@dataclass(frozen=True)
class AdapterSize:
    """Rank and scale of an adapter; `parts` are ranks and scales for context and canvas tokens where they differ."""

    rank: int
    alpha: float
    rslora: bool = False
    shared: bool = False  # of experts: one for all of a layer
    parts: tuple[tuple[int, float], tuple[int, float]] | None = None

    @property
    def scale(self) -> float:
        """What `B A` is multiplied with (rslora: arXiv 2312.03732)."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)
