"""What `config.json` may say beside sizes: keys with one possible value, and rotary embeddings.

Every key of transformers' DiffusionGemma is used by `ModelConfig`, or has here the one value that this network
implements; so have those of other Gemma models that somebody may have left in the file. Keys that change nothing of the
text network are carried along.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_diffgemma.errors import UserError
from nemo_diffgemma.json_files import brief, is_number

SLIDING, GLOBAL = "sliding_attention", "full_attention"

# Switches of the Gemma family, with the values that mean what this network does. The first is what to write.
_FIXED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "attention_dropout": (0.0, None),
    "attn_logit_softcapping": (None,),
    "hidden_activation": ("gelu_pytorch_tanh",),
    "hidden_size_per_layer_input": (None, 0),
    "num_kv_shared_layers": (None, 0),
    "tie_word_embeddings": (True,),
    "use_bidirectional_attention": (None, "vision"),
    "use_double_wide_mlp": (None, False),
    "attention_k_eq_v": (None, True),
    "enable_moe_block": (None, True),
    "query_pre_attn_scalar": (None,),
    "sliding_window_pattern": (None,),
    "activation_sparsity_pattern": (None,),
    "altup_num_inputs": (None,),
    "laurel_rank": (None,),
    "transformers_weights": (None, "model.safetensors"),
}
_ROPE_TYPES = {SLIDING: "default", GLOBAL: "proportional"}
_ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "factor"}


class ConfigError(UserError):
    """A configuration that this model cannot have; the message says which key, its value and what to write."""


def check_fixed_keys(text: Mapping[str, Any], raw: Mapping[str, Any]) -> None:
    """Raise `ConfigError` where a switch asks for what this network does not do."""
    for key, allowed in _FIXED.items():
        for value in (text.get(key, allowed[0]), raw.get(key, allowed[0])):
            if value not in allowed or (isinstance(value, bool) and not any(value is one for one in allowed)):
                raise ConfigError(
                    f"config.json sets {key}={brief(value)}, which DiffusionGemma does not have (expected "
                    f"{allowed[0]!r}); this checkpoint is of another member of the Gemma 4 family"
                )
    for key, ours in (("num_experts_per_tok", "top_k_experts"), ("expert_intermediate_size", "moe_intermediate_size")):
        if text.get(key) is not None and text[key] != text.get(ours):
            raise ConfigError(
                f"config.json sets {key}={brief(text[key])} beside {ours}={brief(text.get(ours))}; DiffusionGemma "
                f"reads {ours}, so remove {key}"
            )


def check_not_quantised(text: Mapping[str, Any], raw: Mapping[str, Any]) -> None:
    """Raise `ConfigError` where the configuration says that the tensors are quantised."""
    for key in ("quantization_config", "compression_config"):
        for where in (raw, text):
            if where.get(key) is not None:
                raise ConfigError(f"config.json sets {key}={brief(where[key])}: {QUANTISED}")


QUANTISED = (
    "this checkpoint is quantised, and only float32, bfloat16 and float16 are read here; give the checkpoint that it "
    "was made from (the released one is google/diffusiongemma-26B-A4B-it), or one that the quantising tool has "
    "dequantised. To quantise for deployment: export/build.py quantization=..."
)


def read_rope(text: Mapping[str, Any], kinds: set[str], values: dict[str, Any]) -> None:
    """Put the rotary settings of the layer `kinds` of a text_config into `values`."""
    parameters = text.get("rope_parameters")
    if parameters is not None:
        if not isinstance(parameters, Mapping) or not set(parameters) <= set(_ROPE_TYPES):
            raise ConfigError(
                f"rope_parameters={brief(parameters)} is not nested by layer kind; write one entry each for "
                f"'{SLIDING}' (rope_type 'default') and '{GLOBAL}' (rope_type 'proportional')"
            )
        for kind, entry in parameters.items():
            _check_rope(kind, entry)
        missing = sorted(kinds - set(parameters))
        if missing:
            raise ConfigError(f"rope_parameters lacks {missing[0]}; add it, or leave rope_parameters out altogether")
        if SLIDING in parameters:
            values["rope_theta"] = parameters[SLIDING]["rope_theta"]
        if GLOBAL in parameters:
            values["global_rope_theta"] = parameters[GLOBAL]["rope_theta"]
            # absent means 1 to transformers, where the whole of rope_parameters absent means 0.25
            values["global_partial_rotary_factor"] = parameters[GLOBAL].get("partial_rotary_factor", 1.0)
    _check_old_rope_keys(text, values)


def _check_rope(kind: str, entry: Any) -> None:
    where = f"rope_parameters.{kind}"
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where}={brief(entry)}; expected an object with rope_type and rope_theta")
    rope_type = entry.get("rope_type", entry.get("type", "default"))
    if rope_type != _ROPE_TYPES[kind]:
        raise ConfigError(f"{where}.rope_type={brief(rope_type)} is not supported; expected {_ROPE_TYPES[kind]!r}")
    for key in entry.keys() - _ROPE_KEYS:
        if entry[key] is not None:
            raise ConfigError(f"{where}.{key}={brief(entry[key])} is not supported; remove it if the model has none")
    fixed = {"factor": 1.0} | ({"partial_rotary_factor": 1.0} if kind == SLIDING else {})
    for key, value in fixed.items():
        if entry.get(key, value) != value:
            raise ConfigError(f"{where}.{key}={brief(entry[key])} is not supported; expected {value} or no such key")
    if not is_number(entry.get("rope_theta")):
        raise ConfigError(f"{where}.rope_theta={brief(entry.get('rope_theta'))}; expected a positive number")


def _check_old_rope_keys(text: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Gemma 3's spelling is read by nobody, transformers included: it must not say anything else."""
    used = {
        "rope_theta": (values.get("global_rope_theta", 1_000_000.0), f"rope_parameters.{GLOBAL}.rope_theta"),
        "rope_local_base_freq": (values.get("rope_theta", 10_000.0), f"rope_parameters.{SLIDING}.rope_theta"),
        "rope_scaling": (None, f"rope_parameters.{GLOBAL}"),
        "partial_rotary_factor": (None, f"rope_parameters.{GLOBAL}.partial_rotary_factor"),
    }
    for key, (value, instead) in used.items():
        if text.get(key) is not None and text[key] != value:
            raise ConfigError(
                f"text_config sets {key}={brief(text[key])}, which DiffusionGemma does not read; remove it, and write "
                f"{instead} if the model was trained with it"
            )
