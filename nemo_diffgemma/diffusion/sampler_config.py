"""Settings of the entropy-bound sampler, without torch: what reads, checks or sends them need not load it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_diffgemma.errors import UserError
from nemo_diffgemma.json_files import brief, is_number, is_whole, read_object


@dataclass(frozen=True)
class SamplerConfig:
    """Settings of generation, with Hugging Face's names and defaults. Bounds and thresholds are in nats.

    `stability_threshold` steps must have had the same arg-max canvas, and the mean entropy must be below
    `confidence_threshold`, for a canvas to be finished early. Without `eos_token_id` nothing ends a row early;
    without `pad_token_id` nothing is padded. Start from `DiffusionGemma.sampler_defaults` to keep the checkpoint's.
    """

    max_denoising_steps: int = 48
    entropy_bound: float = 0.1
    t_min: float = 0.4
    t_max: float = 0.8
    stability_threshold: int = 1
    confidence_threshold: float = 0.005
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        _check(vars(self), "sampler.")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], source: str = "") -> SamplerConfig:
        """From a `generation_config.json` or another mapping; keys that are not the sampler's are left aside.

        Raises `UserError` for a value that means nothing, naming `source`, where the mapping comes from.
        """
        known = {field.name: field.default for field in dataclasses.fields(cls)}
        nested = values.get("sampler_config")
        if nested is not None and not isinstance(nested, Mapping):
            raise UserError(f"{source or 'sampler.'}sampler_config={brief(nested)}; expected an object of settings")
        kind = (nested or {}).get("_cls_name", _SAMPLER)
        if kind != _SAMPLER:
            raise UserError(f"{source or 'sampler.'}sampler_config._cls_name={brief(kind)}; expected {_SAMPLER!r}")
        chosen = {k: v for k, v in {**values, **(nested or {})}.items() if k in known and v is not None}
        if source:
            _check({**known, **chosen}, source)
        return cls(**chosen)

    def with_overrides(self, given: Mapping[str, Any]) -> SamplerConfig:
        """These settings with the given ones in place; None keeps one as it is."""
        return self.from_mapping({**vars(self), **{name: value for name, value in given.items() if value is not None}})

    @classmethod
    def of_checkpoint(cls, directory: Path | None, model: Any) -> SamplerConfig:
        """From the generation_config.json in `directory`, if it is there; special ids else from the `ModelConfig`.

        Raises `UserError` naming the file and the key.
        """
        file = None if directory is None else directory / "generation_config.json"
        is_there = file is not None and file.is_file()
        values = read_object(file) if is_there and file is not None else {}
        values.setdefault("eos_token_id", model.eos_token_id)
        values.setdefault("pad_token_id", model.pad_token_id)
        source = f"{file}: " if is_there else "sampler."
        config = cls.from_mapping(values, source)
        config.check_ids(model.vocab_size, source)
        return config

    def check_ids(self, vocab_size: int, source: str = "sampler.") -> None:
        """Raise `UserError` unless padding is a token of the vocabulary, and so is one of the ids that end a row.

        A checkpoint with a smaller vocabulary may keep other ids of its family: they never come up.
        """
        if self.pad_token_id is not None and self.pad_token_id >= vocab_size:
            raise UserError(
                f"{source}pad_token_id={self.pad_token_id} is outside the vocabulary; expected an id from 0 to "
                f"{vocab_size - 1}"
            )
        if self.eos_ids and min(self.eos_ids) >= vocab_size:
            raise UserError(
                f"{source}eos_token_id={brief(self.eos_token_id)} is outside the vocabulary; expected ids from 0 to "
                f"{vocab_size - 1}"
            )

    def to_huggingface(self) -> dict[str, Any]:
        """As in the released generation_config.json; transformers reads no integers where it expects floats."""
        return {
            "max_denoising_steps": self.max_denoising_steps,
            "sampler_config": {"_cls_name": _SAMPLER, "entropy_bound": float(self.entropy_bound)},
            "t_min": float(self.t_min),
            "t_max": float(self.t_max),
            "stability_threshold": self.stability_threshold,
            "confidence_threshold": float(self.confidence_threshold),
            "eos_token_id": list(self.eos_token_id) if isinstance(self.eos_token_id, tuple) else self.eos_token_id,
            "pad_token_id": self.pad_token_id,
        }

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """End-of-sequence ids as a tuple, empty when there are none."""
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else tuple(self.eos_token_id)

    def temperature(self, remaining: int) -> float:
        """Linear from `t_max` at the first step to just above `t_min` at the last (never `t_min` itself)."""
        return self.t_min + (self.t_max - self.t_min) * remaining / self.max_denoising_steps

    @property
    def temperatures(self) -> list[float]:
        """Those of all steps, first step first."""
        return [self.temperature(remaining) for remaining in range(self.max_denoising_steps, 0, -1)]


_SAMPLER = "EntropyBoundSamplerConfig"  # transformers' name of the only one
_COLDEST = 1e-30  # logits are divided by temperatures in float32


def _check(values: Mapping[str, Any], source: str) -> None:
    """Raise `UserError` for the first setting that means nothing. transformers refuses zeros as bounds; here a bound of
    0 accepts the most certain position alone, and a confidence threshold of 0 never stops early.
    """

    def require(fine: bool, name: str, expected: str) -> None:
        if not fine:
            raise UserError(f"{source}{name}={brief(values[name])}; expected {expected}")

    require(is_whole(values["max_denoising_steps"], 1), "max_denoising_steps", "at least 1, a whole number")
    require(is_whole(values["stability_threshold"]), "stability_threshold", "0 or more steps, a whole number")
    for name in ("entropy_bound", "confidence_threshold"):
        require(is_number(values[name]) and values[name] >= 0, name, "a finite number of nats, 0 or more")
    for name in ("t_min", "t_max"):
        require(is_number(values[name]), name, "a finite number")
    low, high = values["t_min"], values["t_max"]
    if not 0 <= low < high or low + (high - low) / values["max_denoising_steps"] < _COLDEST:
        raise UserError(
            f"{source}t_min={low}, t_max={high}; expected 0 <= t_min < t_max, and {_COLDEST:g} or more at the last step"
        )
    pad, eos = values["pad_token_id"], values["eos_token_id"]
    require(pad is None or is_whole(pad), "pad_token_id", "a token id, or null for none")
    ids = eos if isinstance(eos, list | tuple) else () if eos is None else (eos,)
    require(all(is_whole(id) for id in ids), "eos_token_id", "a token id, a list of them, or null for none")
