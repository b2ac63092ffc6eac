"""The sizes of a DiffusionGemma network, in Hugging Face's field names, read from and written to `config.json`.

Only the text model is described here; whatever else a released configuration holds (vision tower, image token ids) is
carried in `source` and written back untouched.

    config = ModelConfig.from_pretrained("path/to/checkpoint")
    config.layer_kind(5), config.heads(5)       # "full_attention", HeadSizes(head_dim=512, key_value_heads=2)
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from nemo_diffgemma.errors import UserError

SLIDING, GLOBAL = "sliding_attention", "full_attention"

# Switches of the Gemma 4 family that this network must not have, with the value that means "absent".
_ABSENT: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "attention_dropout": (0.0, 0, None),
    "attn_logit_softcapping": (None,),
    "hidden_activation": ("gelu_pytorch_tanh",),
    "hidden_size_per_layer_input": (None, 0),
    "num_kv_shared_layers": (None, 0),
    "tie_word_embeddings": (True,),
    "use_bidirectional_attention": (None, "vision"),
    "use_double_wide_mlp": (None, False),
}


class ConfigError(UserError):
    """A configuration that this model cannot have; the message says which key, its value and what to write."""


class HeadSizes(NamedTuple):
    """Attention sizes of one layer."""

    head_dim: int
    key_value_heads: int


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of the text network; see `reference` section 1.1 of the design notes for the released values.

    `layer_types` names the kind of every layer, `sliding_attention` or `full_attention` ("global"); the last layer is
    always global. `source` is the configuration file this one was read from, if any.
    """

    vocab_size: int = 262_144
    hidden_size: int = 2816
    intermediate_size: int = 2112
    num_hidden_layers: int = 30
    num_attention_heads: int = 16
    num_key_value_heads: int = 8
    head_dim: int = 256
    num_global_key_value_heads: int = 2
    global_head_dim: int = 512
    num_experts: int = 128
    top_k_experts: int = 8
    moe_intermediate_size: int = 704
    sliding_window: int = 1024
    layer_types: tuple[str, ...] = ()
    rope_theta: float = 10_000.0
    global_rope_theta: float = 1_000_000.0
    global_partial_rotary_factor: float = 0.25
    rms_norm_eps: float = 1e-6
    final_logit_softcapping: float = 30.0
    max_position_embeddings: int = 262_144
    initializer_range: float = 0.02
    canvas_length: int = 256
    pad_token_id: int = 0
    eos_token_id: int | tuple[int, ...] = 1
    bos_token_id: int = 2
    source: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        kinds = tuple(self.layer_types) or tuple(
            SLIDING if (i + 1) % 6 else GLOBAL for i in range(self.num_hidden_layers)
        )
        object.__setattr__(self, "layer_types", (*kinds[:-1], GLOBAL))  # transformers forces the last one as well
        if not isinstance(self.eos_token_id, int):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        self._validate()

    def layer_kind(self, layer: int) -> str:
        """`sliding_attention` or `full_attention`."""
        return self.layer_types[layer]

    def heads(self, layer: int) -> HeadSizes:
        """Head width and number of key/value heads of a layer; the number of query heads is the same for all."""
        if self.layer_types[layer] == GLOBAL:
            return HeadSizes(self.global_head_dim, self.num_global_key_value_heads)
        return HeadSizes(self.head_dim, self.num_key_value_heads)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding table: the next multiple of 128 in every layout, so shapes never change."""
        return -(-self.vocab_size // 128) * 128

    # -- config.json ---------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, path: str | Path) -> ModelConfig:
        """Read `config.json` of a released-format directory. Raises `ConfigError` naming the file and the key."""
        file = Path(path) / "config.json"
        if not file.is_file():
            raise ConfigError(f"{path} has no config.json; give a directory in the released Hugging Face format")
        try:
            raw = json.loads(file.read_text())
        except json.JSONDecodeError as error:
            raise ConfigError(f"{file} is not valid JSON ({error}); copy it again from the checkpoint") from None
        return cls.from_huggingface(raw)

    @classmethod
    def from_huggingface(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Build from a parsed `config.json`, in either spelling of the per-layer head sizes."""
        text = raw.get("text_config")
        if not isinstance(text, Mapping) or raw.get("model_type", "diffusion_gemma") != "diffusion_gemma":
            raise ConfigError(
                f"config.json describes model_type={raw.get('model_type')!r} "
                f"{'with' if isinstance(text, Mapping) else 'without'} a text_config; expected model_type "
                "'diffusion_gemma' with a text_config, as in google/diffusiongemma-26B-A4B-it"
            )
        _refuse_foreign_features(text, raw)
        names = {f.name for f in dataclasses.fields(cls)} - {"source", "layer_types", "canvas_length"}
        values = {name: text[name] for name in names if text.get(name) is not None}
        missing = [name for name in _REQUIRED if name not in values]
        if missing:
            raise ConfigError(f"text_config lacks {', '.join(missing)}; add them to config.json")
        values["layer_types"] = tuple(text.get("layer_types") or ())
        values["canvas_length"] = raw.get("canvas_length") or 256
        _read_rope(text.get("rope_parameters"), values)
        config = cls(**{**_HUGGINGFACE_DEFAULTS, **values}, source=raw)
        heads = config._read_global_heads(text)
        return dataclasses.replace(
            config, global_head_dim=heads.head_dim, num_global_key_value_heads=heads.key_value_heads
        )

    def _read_global_heads(self, text: Mapping[str, Any]) -> HeadSizes:
        """Head sizes of the global layers: two fields in the released file, `per_layer_config` in what HF saves."""
        if text.get("per_layer_config") is None:
            return HeadSizes(
                text.get("global_head_dim") or 512, text.get("num_global_key_value_heads") or self.num_key_value_heads
            )
        overrides = {int(layer): dict(sizes) for layer, sizes in text["per_layer_config"].items()}
        found = set()
        for layer, kind in enumerate(self.layer_types):
            sizes = HeadSizes(
                overrides.get(layer, {}).get("head_dim", self.head_dim),
                overrides.get(layer, {}).get("num_key_value_heads", self.num_key_value_heads),
            )
            if kind == SLIDING and sizes != (self.head_dim, self.num_key_value_heads):
                raise ConfigError(
                    f"per_layer_config gives sliding layer {layer} other head sizes {tuple(sizes)} than head_dim and "
                    "num_key_value_heads; only global layers may differ"
                )
            if kind == GLOBAL:
                found.add(sizes)
        if len(found) != 1:
            raise ConfigError(f"per_layer_config gives the global layers different head sizes {sorted(found)}")
        return found.pop()

    def to_huggingface(self) -> dict[str, Any]:
        """What to write as `config.json`: the file this was read from, or a new one that transformers loads."""
        if self.source is not None:
            return dict(self.source)
        text = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name
            not in {"source", "canvas_length", "rope_theta", "global_rope_theta", "global_partial_rotary_factor"}
        }
        text |= {
            "model_type": "diffusion_gemma_text",
            "layer_types": list(self.layer_types),
            "eos_token_id": self.eos_token_id if isinstance(self.eos_token_id, int) else list(self.eos_token_id),
            "hidden_activation": "gelu_pytorch_tanh",
            "rope_parameters": {
                SLIDING: {"rope_type": "default", "rope_theta": self.rope_theta},
                GLOBAL: {
                    "rope_type": "proportional",
                    "partial_rotary_factor": self.global_partial_rotary_factor,
                    "rope_theta": self.global_rope_theta,
                },
            },
        }
        return {
            "architectures": ["DiffusionGemmaForBlockDiffusion"],
            "model_type": "diffusion_gemma",
            "canvas_length": self.canvas_length,
            "tie_word_embeddings": True,
            "text_config": text,
            "vision_config": _SMALLEST_VISION,
        }

    # -- checks --------------------------------------------------------------------------------------------------

    def _validate(self) -> None:
        def require(fine: bool, message: str) -> None:
            if not fine:
                raise ConfigError(message)

        for name in _POSITIVE:
            value = getattr(self, name)
            require(isinstance(value, int) and value > 0, f"{name}={value!r} must be a positive whole number")
        require(
            len(self.layer_types) == self.num_hidden_layers,
            f"layer_types names {len(self.layer_types)} layers but num_hidden_layers={self.num_hidden_layers}; "
            "list one kind for each layer",
        )
        unknown = sorted(set(self.layer_types) - {SLIDING, GLOBAL})
        require(not unknown, f"layer_types has {unknown}; use '{SLIDING}' and '{GLOBAL}'")
        for name in ("num_key_value_heads", "num_global_key_value_heads"):
            require(
                self.num_attention_heads % getattr(self, name) == 0,
                f"{name}={getattr(self, name)} does not divide num_attention_heads={self.num_attention_heads}",
            )
        require(
            self.top_k_experts <= self.num_experts,
            f"top_k_experts={self.top_k_experts} is larger than num_experts={self.num_experts}",
        )
        for name in ("head_dim", "global_head_dim"):
            require(getattr(self, name) % 2 == 0, f"{name}={getattr(self, name)} must be even (rotary pairs)")
        # grouped matrix products read rows of whole 16-byte words, in bfloat16 as in float32
        require(self.hidden_size % 8 == 0, f"hidden_size={self.hidden_size} must be a multiple of 8")


_POSITIVE = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "num_global_key_value_heads global_head_dim num_experts top_k_experts moe_intermediate_size sliding_window "
    "canvas_length"
).split()
_REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_experts", "top_k_experts", "moe_intermediate_size")
# Defaults of transformers' class where they differ from the released sizes above.
_HUGGINGFACE_DEFAULTS = {
    "intermediate_size": 9216,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "sliding_window": 512,
    "max_position_embeddings": 131_072,
    "num_global_key_value_heads": 1,  # replaced by _read_global_heads; 1 divides anything
}
# transformers always builds a vision tower; a text-only model trained here names the smallest one it accepts.
_SMALLEST_VISION = {
    "model_type": "gemma4_vision",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "patch_size": 4,
    "position_embedding_size": 16,
}


def _refuse_foreign_features(text: Mapping[str, Any], raw: Mapping[str, Any]) -> None:
    for key, absent in _ABSENT.items():
        for value in (text.get(key, absent[0]), raw.get(key, absent[0])):
            if value in absent:
                continue
            raise ConfigError(
                f"config.json sets {key}={value!r}, which DiffusionGemma does not have (expected {absent[0]!r}); this "
                "checkpoint is of another member of the Gemma 4 family"
            )


def _read_rope(parameters: Mapping[str, Any] | None, values: dict[str, Any]) -> None:
    if parameters is None:
        return
    for kind, rope_type in ((SLIDING, "default"), (GLOBAL, "proportional")):
        found = parameters.get(kind, {}).get("rope_type", rope_type)
        if found != rope_type:
            raise ConfigError(f"rope_parameters.{kind}.rope_type={found!r} is not supported; expected {rope_type!r}")
    values["rope_theta"] = parameters.get(SLIDING, {}).get("rope_theta", 10_000.0)
    values["global_rope_theta"] = parameters.get(GLOBAL, {}).get("rope_theta", 1_000_000.0)
    values["global_partial_rotary_factor"] = parameters.get(GLOBAL, {}).get("partial_rotary_factor", 0.25)
