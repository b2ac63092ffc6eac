"""The sizes of a DiffusionGemma network, in Hugging Face's field names, read from and written to `config.json`.

Only the text model is described here; whatever else a released configuration holds (vision tower, image token ids) is
carried in `source` and written back untouched.

    config = ModelConfig.from_pretrained("path/to/checkpoint")
    config.layer_kind(5), config.heads(5)       # "full_attention", HeadSizes(head_dim=512, key_value_heads=2)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from nemo_diffgemma.config_keys import (
    GLOBAL,
    SLIDING,
    ConfigError,
    check_fixed_keys,
    check_not_quantised,
    read_rope,
)
from nemo_diffgemma.json_files import brief, is_number, is_whole, read_object

__all__ = ["GLOBAL", "SLIDING", "ConfigError", "HeadSizes", "ModelConfig"]


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
        self._check_values()
        kinds = tuple(self.layer_types) or tuple(
            SLIDING if (i + 1) % 6 else GLOBAL for i in range(self.num_hidden_layers)
        )
        object.__setattr__(self, "layer_types", (*kinds[:-1], GLOBAL))  # transformers forces the last one as well
        if not isinstance(self.eos_token_id, int):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        self._check_relations()

    def layer_kind(self, layer: int) -> str:
        """`sliding_attention` or `full_attention`."""
        return self.layer_types[layer]

    def heads(self, layer: int) -> HeadSizes:
        """Head width and number of key/value heads of a layer; the number of query heads is the same for all."""
        if self.layer_types[layer] == GLOBAL:
            return HeadSizes(self.global_head_dim, self.num_global_key_value_heads)
        return HeadSizes(self.head_dim, self.num_key_value_heads)

    def heads_of_rank(self, layer: int, tensor: int) -> HeadSizes:
        """The same on one of `tensor` tensor-parallel ranks: one head, shared, where ranks are more than heads."""
        head_dim, heads = self.heads(layer)
        return HeadSizes(head_dim, max(1, heads // tensor))

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
        raw = read_object(file, ConfigError)
        try:
            return cls.from_huggingface(raw)
        except ConfigError as error:
            raise ConfigError(f"{file}: {error}") from None

    @classmethod
    def from_huggingface(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Build from a parsed `config.json`, in either spelling of the per-layer head sizes."""
        text = raw.get("text_config")
        if not isinstance(text, Mapping) or raw.get("model_type", "diffusion_gemma") != "diffusion_gemma":
            raise ConfigError(
                f"config.json describes model_type={brief(raw.get('model_type'))} "
                f"{'with' if isinstance(text, Mapping) else 'without'} a text_config; expected model_type "
                "'diffusion_gemma' with a text_config, as in google/diffusiongemma-26B-A4B-it"
            )
        check_not_quantised(text, raw)
        check_fixed_keys(text, raw)
        missing = [name for name in _REQUIRED if text.get(name) is None]
        if missing:
            raise ConfigError(f"text_config lacks {', '.join(missing)}; add them to config.json")
        values = {**_HUGGINGFACE_DEFAULTS, **{name: text[name] for name in _READ if name in text}}
        values["canvas_length"] = raw.get("canvas_length", 256)
        if text.get("layer_types") is not None:
            values["layer_types"] = _layer_types(text["layer_types"])
        plain = cls(**values)  # checks what the rest is read with
        read_rope(text, set(plain.layer_types), values)
        heads = plain._read_global_heads(text)
        values |= {"global_head_dim": heads.head_dim, "num_global_key_value_heads": heads.key_value_heads}
        return cls(**values, source=raw)

    def _read_global_heads(self, text: Mapping[str, Any]) -> HeadSizes:
        """Head sizes of the global layers: two fields in the released file, `per_layer_config` in what HF saves."""
        if "per_layer_config" not in text:
            heads = text.get("num_global_key_value_heads")
            return HeadSizes(text.get("global_head_dim", 512), self.num_key_value_heads if heads is None else heads)
        layers = self._per_layer_config(text["per_layer_config"])
        by_kind: dict[str, set[HeadSizes]] = {SLIDING: set(), GLOBAL: set()}
        for layer, kind in enumerate(self.layer_types):
            own = layers.get(layer, {})
            sizes = HeadSizes(
                own.get("head_dim", self.head_dim), own.get("num_key_value_heads", self.num_key_value_heads)
            )
            by_kind[kind].add(sizes)
            if kind == SLIDING and sizes != (self.head_dim, self.num_key_value_heads):
                raise ConfigError(
                    f"per_layer_config gives sliding layer {layer} other head sizes {tuple(sizes)} than head_dim and "
                    "num_key_value_heads; only global layers may differ"
                )
        if len(by_kind[GLOBAL]) != 1:
            raise ConfigError(f"per_layer_config gives the global layers different head sizes {brief(by_kind[GLOBAL])}")
        sizes = by_kind[GLOBAL].pop()
        for key, value in (("global_head_dim", sizes.head_dim), ("num_global_key_value_heads", sizes.key_value_heads)):
            if text.get(key) not in (None, value):
                raise ConfigError(
                    f"text_config sets {key}={brief(text[key])}, but its per_layer_config gives the global layers "
                    f"{value}; remove the one that is wrong"
                )
        return sizes

    def _per_layer_config(self, given: Any) -> dict[int, Mapping[str, Any]]:
        """Entries by layer; a key that is left out has text_config's value."""
        layers: dict[int, Mapping[str, Any]] = {}
        for layer, sizes in given.items() if isinstance(given, Mapping) else [("", given)]:
            number = int(layer) if str(layer).isdecimal() and len(str(layer)) < 9 else -1
            if not isinstance(sizes, Mapping) or not 0 <= number < self.num_hidden_layers:
                raise ConfigError(
                    f"per_layer_config has {brief(layer)}: {brief(sizes)}; expected an object of head sizes for each "
                    f"layer, numbered 0 to {self.num_hidden_layers - 1}"
                )
            other = [key for key in sizes if key not in ("head_dim", "num_key_value_heads")]
            if other:
                raise ConfigError(
                    f"per_layer_config gives layer {number} {other[0]}={brief(sizes[other[0]])}; only head_dim and "
                    "num_key_value_heads can differ between layers"
                )
            layers[number] = sizes
        return layers

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
            "attention_bias": False,
            "attention_dropout": 0.0,
            "use_bidirectional_attention": "vision",
            "tie_word_embeddings": True,
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
            "initializer_range": self.initializer_range,
            **_IMAGE_TOKENS,
            "text_config": text,
            "vision_config": _SMALLEST_VISION,
        }

    # -- checks --------------------------------------------------------------------------------------------------

    def _check_values(self) -> None:
        """Type and range of every field by itself."""
        for name in _POSITIVE:
            value = getattr(self, name)
            _require(is_whole(value, 1), f"{name}={brief(value)} must be a positive whole number")
        _require(self.num_hidden_layers <= 10_000, f"num_hidden_layers={self.num_hidden_layers}; expected up to 10000")
        for name in ("rope_theta", "global_rope_theta", "rms_norm_eps", "final_logit_softcapping"):
            value = getattr(self, name)
            _require(is_number(value) and value > 0, f"{name}={brief(value)} must be a positive number")
        for name, most in (("global_partial_rotary_factor", 1.0), ("initializer_range", 1e6)):
            value = getattr(self, name)
            _require(
                is_number(value) and 0 <= value <= most, f"{name}={brief(value)}; expected a number from 0 to {most:g}"
            )
        for name in ("pad_token_id", "bos_token_id"):
            _require(is_whole(getattr(self, name)), f"{name}={brief(getattr(self, name))}; expected a token id")
        eos = self.eos_token_id if isinstance(self.eos_token_id, list | tuple) else (self.eos_token_id,)
        _require(
            len(eos) > 0 and all(is_whole(id) for id in eos),
            f"eos_token_id={brief(self.eos_token_id)}; expected a token id or a list of them",
        )

    def _check_relations(self) -> None:
        """What one field demands of another."""
        _require(
            len(self.layer_types) == self.num_hidden_layers,
            f"layer_types names {len(self.layer_types)} layers but num_hidden_layers={self.num_hidden_layers}; "
            "list one kind for each layer",
        )
        unknown = sorted({str(kind) for kind in self.layer_types} - {SLIDING, GLOBAL})
        _require(not unknown, f"layer_types has {brief(unknown)}; use '{SLIDING}' and '{GLOBAL}'")
        for name in ("num_key_value_heads", "num_global_key_value_heads"):
            _require(
                self.num_attention_heads % getattr(self, name) == 0,
                f"{name}={getattr(self, name)} does not divide num_attention_heads={self.num_attention_heads}",
            )
        _require(
            self.top_k_experts <= self.num_experts,
            f"top_k_experts={self.top_k_experts} is larger than num_experts={self.num_experts}",
        )
        _require(
            self.pad_token_id < self.vocab_size,
            f"pad_token_id={self.pad_token_id} is outside the vocabulary of vocab_size={self.vocab_size} ids",
        )
        for name in ("head_dim", "global_head_dim"):
            _require(getattr(self, name) % 2 == 0, f"{name}={getattr(self, name)} must be even (rotary pairs)")
        # grouped matrix products read rows of whole 16-byte words, in bfloat16 as in float32
        _require(self.hidden_size % 8 == 0, f"hidden_size={self.hidden_size} must be a multiple of 8")


def _require(fine: bool, message: str) -> None:
    if not fine:
        raise ConfigError(message)


def _layer_types(given: Any) -> tuple[str, ...]:
    if not isinstance(given, list | tuple) or not given:
        raise ConfigError(f"layer_types={brief(given)}; expected a list of '{SLIDING}' and '{GLOBAL}'")
    return tuple(given)


_POSITIVE = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "num_global_key_value_heads global_head_dim num_experts top_k_experts moe_intermediate_size sliding_window "
    "max_position_embeddings canvas_length"
).split()
_REQUIRED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_experts", "top_k_experts", "moe_intermediate_size")
_READ = (  # from text_config as they are
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "num_experts top_k_experts moe_intermediate_size sliding_window rms_norm_eps final_logit_softcapping "
    "max_position_embeddings initializer_range pad_token_id eos_token_id bos_token_id"
).split()
# Defaults of transformers' class where they differ from the released sizes above.
_HUGGINGFACE_DEFAULTS = {
    "intermediate_size": 9216,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "sliding_window": 512,
    "max_position_embeddings": 131_072,
    "num_global_key_value_heads": 1,  # replaced by _read_global_heads; 1 divides anything
}
# Ids of the released vocabulary; in a smaller one they stand for no token, as they should where there are no images.
_IMAGE_TOKENS = {"boi_token_id": 255_999, "eoi_token_id": 258_882, "image_token_id": 258_880}
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
