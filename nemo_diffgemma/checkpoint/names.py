"""Names and shapes: ours in memory, the released ones on disk.

The decoder's names carry the one shared text stack; of the encoder only the layer scalars are stored. Vision tensors
are not ours to understand: they are carried along as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import Tensor, nn

from nemo_diffgemma.config import ModelConfig

_DECODER = "model.decoder."
_OURS = (
    (re.compile(r"^layers\.(\d+)\.encoder_layer_scalar$"), r"model.encoder.language_model.layers.\1.layer_scalar"),
    (re.compile(r"^(layers\.\d+)\.moe\.router\.weight$"), _DECODER + r"\1.router.proj.weight"),
    (re.compile(r"^(layers\.\d+)\.moe\.(router|experts)\.(\w+)$"), _DECODER + r"\1.\2.\3"),
    (re.compile(r"^(.*)$"), _DECODER + r"\1"),
)
CARRIED_PREFIXES = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")


def released_name(name: str) -> str:
    """Name on disk of our parameter or buffer `name`."""
    for pattern, replacement in _OURS:
        if pattern.match(name):
            return pattern.sub(replacement, name)
    raise AssertionError(name)


def text_tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(our name, tensor of this rank) of everything that the released layout stores of the text model."""
    yield from network.named_parameters()
    yield from network.named_buffers()


def released_shape(name: str, full_shape: tuple[int, ...], config: ModelConfig) -> tuple[int, ...]:
    """Shape on disk of our tensor with that full shape: no padded vocabulary rows, gate and up in one axis."""
    if name == "embed_tokens.weight":
        return (config.vocab_size, full_shape[1])
    if name.endswith("experts.gate_up_proj"):
        return (full_shape[0], 2 * full_shape[2], full_shape[3])
    return full_shape
