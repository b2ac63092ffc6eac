"""What an engine runs, and what it may use: memory, and work of one pass. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field

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


@dataclass
class ServedModel:
    """Keys of launch/serve.py and launch/replica.py that say what an engine runs."""

    checkpoint: str | None = None  # Hugging Face directory, sharded checkpoint or .nemo
    dtype: str = "float32"  # of a checkpoint: or bfloat16
    adapters: dict[str, str] = field(default_factory=dict)  # name: directory of a LoRA adapter, asked for as a model
    bundle: str | None = None  # instead of checkpoint=: a directory that export/build.py has written
    provider: str = "onnxruntime"  # of a bundle: or tensorrt_rtx, tensorrt, tensorrt_llm

    def check_model(self) -> None:
        """Raise `UserError` unless there is one model, with keys of its kind alone."""
        if (self.checkpoint is None) == (self.bundle is None):
            raise UserError(f"checkpoint={self.checkpoint} bundle={self.bundle}; give one of them")
        if self.bundle is not None and self.dtype != "float32":
            raise UserError(f"dtype={self.dtype}: a bundle has the one that it was built with; leave it out")
        if self.bundle is not None and self.adapters:
            raise UserError("adapters=...: a bundle has none beside it; give checkpoint=... in place of bundle=")
        if self.bundle is None and self.provider != "onnxruntime":
            raise UserError(f"provider={self.provider} runs a bundle; give bundle=... in place of checkpoint=")
