"""What a dry run plays, and what comes of it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import yaml

from nemo_diffgemma.config import GLOBAL, SLIDING, ModelConfig
from nemo_diffgemma.dry_run.ledger import Numbers
from nemo_diffgemma.errors import UserError
from nemo_diffgemma.lora.config import LoraGroup
from nemo_diffgemma.parallel.layout import ParallelLayout
from nemo_diffgemma.repository import CONF
from nemo_diffgemma.schema import ModelGroup, OptimGroup

FEWEST_STEPS = 3
PROMPTS = {"train": (256,), "generate": (1024,)}  # by verb
VERBS = tuple(PROMPTS)
RESPONSES = (768,)


class DryRunError(UserError):
    """Something that cannot be played as it was asked for."""


@dataclass(frozen=True)
class Case:
    """One rank of one layout doing one thing. `prompts` and `responses` hold a length for each row of a micro-batch."""

    verb: str
    model: ModelGroup
    optim: OptimGroup
    layout: ParallelLayout
    world: int
    rank: int
    prompts: tuple[int, ...]
    responses: tuple[int, ...]
    micro_batches: int = 1
    canvases: int = 1  # that a generation makes
    steps: int = 48  # denoising steps of each
    temporary_gb: float = 2.0  # more in one allocation is a violation

    def __post_init__(self) -> None:
        """Raises `DryRunError`, `LayoutError` or `ConfigurationError`."""
        self.model.check()
        if self.verb not in VERBS:
            raise DryRunError(f"verb={self.verb!r}; use one of {', '.join(VERBS)}")
        self.layout.check_world(self.world)
        if not 0 <= self.rank < self.world:
            raise DryRunError(f"rank={self.rank} of world={self.world}; expected 0 to {self.world - 1}")
        config = self.config
        self.layout.check(config)
        if len(self.prompts) != len(self.responses) or not self.prompts or min(self.prompts + self.responses) < 1:
            raise DryRunError(
                f"prompts={list(self.prompts)} and responses={list(self.responses)}; expected a length of at least 1 "
                "for each row, as many in one as in the other"
            )
        if min(self.micro_batches, self.canvases, self.steps) < 1:
            raise DryRunError("micro_batches, canvases and denoising steps must be at least 1")
        if self.verb == "generate" and self.steps < FEWEST_STEPS:
            raise DryRunError(
                f"{self.steps} denoising steps; a dry run tells one in the steady state from at least {FEWEST_STEPS}"
            )

    @cached_property
    def config(self) -> ModelConfig:
        return ModelConfig(**self.model.architecture)

    @property
    def layers(self) -> tuple[int, int]:
        """Numbers of sliding and of global layers."""
        kinds = self.config.layer_types
        return kinds.count(SLIDING), kinds.count(GLOBAL)

    def with_layers(self, sliding: int, of_all: int) -> Case:
        """The same with `sliding` sliding layers and then `of_all` global ones."""
        kinds = [SLIDING] * sliding + [GLOBAL] * of_all
        architecture: dict[str, Any] = {
            **self.model.architecture,
            "num_hidden_layers": len(kinds),
            "layer_types": kinds,
        }
        return dataclasses.replace(self, model=dataclasses.replace(self.model, architecture=architecture))


def released(
    layout: ParallelLayout,
    verb: str = "train",
    recompute: str = "full",
    canvases: int = 1,
    lora: LoraGroup | None = None,
    **more: Any,
) -> Case:
    """The released network on rank 0 of the smallest world; `canvases` are scored of a row, `more` are other fields.

    One row: prompt 256 and response 768 to train, prompt 1024 to generate.
    """
    model = ModelGroup(**yaml.safe_load((CONF / "model" / "diffusiongemma_26b_a4b.yaml").read_text()))
    model.lora = lora or model.lora
    model.recompute, model.objective.canvases_per_example = recompute, canvases
    fields: dict[str, Any] = dict(world=layout.world_size, rank=0, prompts=PROMPTS[verb], responses=RESPONSES)
    return Case(**{**dict(verb=verb, model=model, optim=OptimGroup(), layout=layout), **fields, **more})


@dataclass
class Measured:
    """Numbers of a run (ledger.py), violations and how often each, and the largest temporaries by phase and line."""

    numbers: Numbers
    violations: dict[str, int]
    largest: dict[tuple[str, str], int] = field(default_factory=dict)

    def sum(self, name: str, *rest: str) -> float:
        """Sum of the numbers whose keys begin so."""
        start = (name, *rest)
        return sum(number for key, number in self.numbers.items() if key[: len(start)] == start)

    @property
    def phases(self) -> list[str]:
        """In the order in which they came."""
        return list(dict.fromkeys(key[1] for key in self.numbers if key[0] == "peak_gb"))
