"""Keys of adapters in a run's configuration, and the sizes of adapters that they ask for."""

from __future__ import annotations

from dataclasses import dataclass, field

from nemo_diffgemma.config import ModelConfig
from nemo_diffgemma.errors import ConfigurationError
from nemo_diffgemma.lora.targets import EXPERTS, chosen_linears, expert_matrices, linears
from nemo_diffgemma.model.adapter_size import AdapterSize

EXPERT_FORMS = ("none", "each", "shared")


@dataclass
class LoraGroup:
    """Adapters on linears, and on the experts. Without `rank` there are none."""

    rank: int | None = None
    alpha: float | None = None  # scale * rank; null: twice the rank
    dropout: float = 0.0  # of what goes into A, of linears; experts have none, as with PEFT
    rslora: bool = False  # scale by the root of the rank (arXiv 2312.03732)
    targets: list[str] = field(default_factory=lambda: ["attention", "mlp"])  # router, self_conditioning, patterns
    experts: str = "none"  # each: an adapter an expert; shared: one for all of a layer

    def check(self) -> None:
        """Raise `ConfigurationError` for values that mean nothing."""
        if self.rank is None:
            return
        if self.rank < 1:
            raise ConfigurationError(f"model.lora.rank={self.rank}; expected 1 or more, or null for no adapters")
        if self.experts not in EXPERT_FORMS:
            raise ConfigurationError(f"model.lora.experts={self.experts!r}; use one of {', '.join(EXPERT_FORMS)}")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigurationError(f"model.lora.dropout={self.dropout}; expected at least 0 and below 1")
        if self.alpha is not None and self.alpha <= 0:
            raise ConfigurationError(f"model.lora.alpha={self.alpha}; expected more than 0, or null for twice the rank")
        if not self.targets and self.experts == "none":
            raise ConfigurationError(
                "model.lora.targets=[] and model.lora.experts=none leave nothing to adapt; name targets (attention, "
                "mlp) or use model.lora.experts=each"
            )

    def sizes(self, model: ModelConfig) -> dict[str, AdapterSize]:
        """Size of every adapter by module name. Raises `ConfigurationError` where a target names nothing."""
        self.check()
        assert self.rank is not None
        shapes = {name: linears(model)[name] for name in chosen_linears(model, self.targets)}
        if self.experts != "none":
            shapes |= expert_matrices(model)
        for name, shape in shapes.items():
            if self.rank > min(shape):
                raise ConfigurationError(
                    f"model.lora.rank={self.rank} is more than {name} has ({shape[0]} rows, {shape[1]} columns); use "
                    f"model.lora.rank={min(min(one) for one in shapes.values())} or less, or other targets"
                )
        alpha, shared = 2.0 * self.rank if self.alpha is None else self.alpha, self.experts == "shared"
        return {name: AdapterSize(self.rank, alpha, self.rslora, shared and name.endswith(EXPERTS)) for name in shapes}
