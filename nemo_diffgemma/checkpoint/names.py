"""Names and shapes: ours in memory, the released ones on disk.

The decoder's names carry the one shared text stack; of the encoder only the layer scalars are stored. Vision tensors
are not ours to understand: they are carried along as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import Tensor, nn

from nemo_diffgemma.config import SLIDING, ModelConfig
from nemo_diffgemma.model.adapter_size import is_adapter

_DECODER = "model.decoder."
_OURS = (
    (re.compile(r"^layers\.(\d+)\.encoder_layer_scalar$"), r"model.encoder.language_model.layers.\1.layer_scalar"),
    (re.compile(r"^(layers\.\d+)\.moe\.router\.weight$"), _DECODER + r"\1.router.proj.weight"),
    (re.compile(r"^(layers\.\d+)\.moe\.(router|experts)\.(\w+)$"), _DECODER + r"\1.\2.\3"),
    (re.compile(r"^(.*)$"), _DECODER + r"\1"),
)
_RELEASED = (
    (re.compile(r"^model\.encoder\.language_model\.layers\.(\d+)\.layer_scalar$"), r"layers.\1.encoder_layer_scalar"),
    (re.compile(r"^model\.decoder\.(layers\.\d+)\.router\.proj\.weight$"), r"\1.moe.router.weight"),
    (re.compile(r"^model\.decoder\.(layers\.\d+)\.(router|experts)\.(\w+)$"), r"\1.moe.\2.\3"),
    (re.compile(r"^model\.decoder\.(.*)$"), r"\1"),
)
CARRIED_PREFIXES = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")


def released_name(name: str) -> str:
    """Name on disk of our parameter or buffer `name`."""
    for pattern, replacement in _OURS:
        if pattern.match(name):
            return pattern.sub(replacement, name)
    raise AssertionError(name)


def our_name(name: str) -> str:
    """Our parameter or buffer that is called `name` on disk: the inverse of `released_name`."""
    for pattern, replacement in _RELEASED:
        if pattern.match(name):
            return pattern.sub(replacement, name)
    raise AssertionError(name)


def text_tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(our name, tensor of this rank) of everything that the released layout stores of the text model.

    Waits for weights that a training step is still gathering: whatever reads or writes them is here.
    """
    getattr(network, "finish_gather", lambda: None)()
    yield from ((name, parameter) for name, parameter in network.named_parameters() if not is_adapter(name))
    yield from network.named_buffers()


def released_shape(name: str, full_shape: tuple[int, ...], config: ModelConfig) -> tuple[int, ...]:
    """Shape on disk of our tensor with that full shape: no padded vocabulary rows, gate and up in one axis."""
    if name == "embed_tokens.weight":
        return (config.vocab_size, full_shape[1])
    if name.endswith("experts.gate_up_proj"):
        return (full_shape[0], 2 * full_shape[2], full_shape[3])
    return full_shape


def our_shape(name: str, released: tuple[int, ...], config: ModelConfig) -> tuple[int, ...]:
    """Full shape of our tensor `name` that has this shape on disk: the inverse of `released_shape`."""
    if name == "embed_tokens.weight":
        return (config.padded_vocab_size, released[1])
    if name.endswith("experts.gate_up_proj"):
        return (released[0], 2, released[1] // 2, released[2])
    return released


def released_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every text tensor of a released-format directory; no network is needed to know them."""
    hidden, width = config.hidden_size, config.intermediate_size
    experts, expert_width = config.num_experts, config.moe_intermediate_size
    gated = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (config.vocab_size, hidden), "norm.weight": (hidden,)}
    shapes["self_conditioning.pre_norm.weight"] = (hidden,)
    shapes |= {f"self_conditioning.{name}.weight": shape for name, shape in gated.items()}
    for layer in range(config.num_hidden_layers):
        (head_dim, kv_heads), prefix = config.heads(layer), f"layers.{layer}."
        queries, keys = config.num_attention_heads * head_dim, kv_heads * head_dim
        attention = {"q_proj": (queries, hidden), "k_proj": (keys, hidden), "o_proj": (hidden, queries)}
        if config.layer_kind(layer) == SLIDING:  # global layers use their keys as values
            attention["v_proj"] = (keys, hidden)
        attention |= {"q_norm": (head_dim,), "k_norm": (head_dim,)}  # type: ignore[dict-item]
        shapes |= {f"{prefix}self_attn.{name}.weight": shape for name, shape in attention.items()}
        shapes |= {f"{prefix}mlp.{name}.weight": shape for name, shape in gated.items()}
        shapes |= {f"{prefix}{name}.weight": (hidden,) for name in _NORMS}
        shapes |= {f"{prefix}router.proj.weight": (experts, hidden), f"{prefix}router.scale": (hidden,)}
        shapes |= {f"{prefix}router.per_expert_scale": (experts,), f"{prefix}layer_scalar": (1,)}
        shapes[f"{prefix}experts.gate_up_proj"] = (experts, 2 * expert_width, hidden)
        shapes[f"{prefix}experts.down_proj"] = (experts, hidden, expert_width)
    encoder = {released_name(f"layers.{i}.encoder_layer_scalar"): (1,) for i in range(config.num_hidden_layers)}
    return {**{_DECODER + name: shape for name, shape in shapes.items()}, **encoder}


_NORMS = (
    *("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    *("post_feedforward_layernorm_1", "pre_feedforward_layernorm_2", "post_feedforward_layernorm_2"),
)
