"""A parallel layout: sizes of the axes over which a model is cut, checked where they are chosen.

ParallelLayout(tensor=2, expert=2).world_size         # 2: the smallest world; any multiple adds replicas
ParallelLayout(tensor=3).check(config)                # raises LayoutError with the sizes that fit
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nemo_diffgemma.config import ModelConfig
from nemo_diffgemma.errors import UserError
from nemo_diffgemma.json_files import brief, is_whole


class LayoutError(UserError):
    """A layout that this model or this world cannot have."""


@dataclass(frozen=True)
class ParallelLayout:
    """Sizes of the parallel axes. Sequence parallelism is on exactly when `tensor` > 1.

    Dense weights are cut over `tensor`; experts are dealt over `expert` and each expert is cut over `expert_tensor`.
    """

    tensor: int = 1
    expert: int = 1
    expert_tensor: int = 1
    pipeline: int = 1
    context: int = 1

    def __post_init__(self) -> None:
        for axis, size in vars(self).items():
            if not is_whole(size, 1):
                raise LayoutError(f"layout {axis}={brief(size)} must be a whole number of at least 1")
        for axis in ("pipeline", "context"):
            if getattr(self, axis) != 1:
                raise LayoutError(
                    f"layout {axis}={getattr(self, axis)} is not supported yet; use {axis}=1 and cut over tensor or "
                    "expert instead"
                )

    @property
    def world_size(self) -> int:
        """Number of processes of one replica."""
        return self.pipeline * math.lcm(self.tensor * self.context, self.expert * self.expert_tensor)

    def replicas(self, world: int) -> int:
        """Data-parallel replicas of the dense weights in a world of `world` processes."""
        self.check_world(world)
        return world // (self.tensor * self.context * self.pipeline)

    def check_world(self, world: int) -> None:
        """Raise `LayoutError` unless `world` processes are a whole number of replicas."""
        if world < 1 or world % self.world_size:
            raise LayoutError(
                f"layout {self} needs {self.world_size} processes or a multiple of it, but there are {world}; start "
                f"`torchrun --nproc-per-node {self.world_size}` or change parallel.*"
            )

    def check(self, config: ModelConfig) -> None:
        """Raise `LayoutError` where the sizes of `config` cannot be divided by this layout."""
        self._divides(
            "tensor",
            {
                "attention heads": config.num_attention_heads,
                "rows of intermediate_size": config.intermediate_size,
                "rows of the padded vocabulary": config.padded_vocab_size,
            },
        )
        for name in ("num_key_value_heads", "num_global_key_value_heads"):
            heads = getattr(config, name)
            if heads % self.tensor and self.tensor % heads:
                raise LayoutError(
                    f"layout tensor={self.tensor} and {name}={heads}: one must divide the other; use tensor="
                    f"{_choices(heads)} or a multiple of {heads}"
                )
        self._divides("expert", {"experts": config.num_experts})
        self._divides("expert_tensor", {"rows of moe_intermediate_size": config.moe_intermediate_size})

    def _divides(self, axis: str, counts: dict[str, int]) -> None:
        size = getattr(self, axis)
        for what, count in counts.items():
            if count % size:
                fitting = math.gcd(*counts.values())
                raise LayoutError(
                    f"layout {axis}={size} cannot divide {count} {what}; "
                    f"use {axis}={_choices(fitting)} (see conf/parallel/*.yaml)"
                )

    def __str__(self) -> str:
        named = [f"{axis}={size}" for axis, size in vars(self).items() if size > 1]
        return ",".join(named) or "single"


def _choices(number: int) -> str:
    fitting = [str(n) for n in range(1, number + 1) if number % n == 0]
    return fitting[0] if len(fitting) == 1 else f"{', '.join(fitting[:-1])} or {fitting[-1]}"
