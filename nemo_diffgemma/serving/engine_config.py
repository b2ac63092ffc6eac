"""What an engine may use: memory, and work of one pass. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_diffgemma.errors import UserError


@dataclass
class EngineConfig:
    """What an engine may use. Raises `UserError` for what cannot be."""

    context_gb: float = 4.0  # of one rank, for keys and values
    typical_tokens: int = 4096  # of context of one request, for which the two kinds of layers share the memory
    max_running: int = 32  # requests that denoise at a time
    tokens_per_pass: int = 4096  # above which no more pieces of prompts join a pass

    def __post_init__(self) -> None:
        if self.max_running < 1 or self.tokens_per_pass < 1 or self.typical_tokens < 1 or not self.context_gb > 0:
            raise UserError(f"{self}; expected numbers above 0")
