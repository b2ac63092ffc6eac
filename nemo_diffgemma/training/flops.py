"""Useful FLOPs of a training step: what the method asks for, however it is computed.

A product of an [n, k] and a [k, m] matrix counts 2 n k m, and so do the two products of its backward. Counted are
chosen experts, pairs of tokens that see each other, canvases that are scored, and positions that have a loss. The first
pass of self-conditioning, which has no gradient, counts for the share of examples that are shown its prediction. Not
counted: recomputation, padding, masked pairs, logits that are made again, norms and other element-wise work.

docs/metrics.md has the formula in symbols.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nemo_diffgemma.config import GLOBAL, ModelConfig


def of_pass(
    model: ModelConfig,
    contexts: Sequence[int],
    canvases: Sequence[int],
    next_tokens: int,
    self_conditioning: float,
    weight_gradients: float = 1.0,
) -> float:
    """FLOPs of forward and backward over rows of `contexts` tokens and canvases that start at `canvases`.

    `next_tokens` positions of the context have a loss of their own; `self_conditioning` is the share of canvases that
    are shown a prediction; `weight_gradients` the share of weights that are trained (of frozen ones only inputs get
    gradients).
    """
    tokens, positions = sum(contexts), len(canvases) * model.canvas_length
    weights, attention = _weights_of_token(model), _attention(model, contexts, canvases)
    head = 2.0 * model.vocab_size * model.hidden_size  # of a position: its logits, or a sum of table rows
    conditioning = 2.0 * 3 * model.hidden_size * model.intermediate_size
    decoder = 2.0 * weights * positions + attention[1]
    with_gradient = 2.0 + weight_gradients
    products = with_gradient * (2.0 * weights * (tokens + positions)) + 3.0 * sum(attention)
    losses = with_gradient * head * (positions + next_tokens)
    first_pass = decoder + head * positions  # without gradient
    signal = (1.0 + weight_gradients) * head * positions + with_gradient * conditioning * positions
    return products + losses + self_conditioning * (first_pass + signal)


def trained_share(network: Any) -> float:
    """Share of the weights that a token meets that is trained; of experts it meets top_k of num_experts."""
    model, trained, total = network.model_config, 0.0, 0.0
    for name, parameter in network.named_parameters():
        met = model.top_k_experts / model.num_experts if ".experts." in name else 1.0
        total += met * parameter.numel()
        trained += met * parameter.numel() * parameter.requires_grad
    return trained / total


def _weights_of_token(model: ModelConfig) -> float:
    """Weights that a token is multiplied with in all layers: those of its chosen experts alone."""
    hidden = model.hidden_size
    shared = (
        3 * hidden * model.intermediate_size
        + hidden * model.num_experts
        + model.top_k_experts * 3 * hidden * model.moe_intermediate_size
    )
    total = 0.0
    for kind in model.layer_types:
        heads, width = model.num_attention_heads, model.head_dim
        projected = heads + 2 * model.num_key_value_heads  # queries, keys, values
        if kind == GLOBAL:  # values are the keys' projection
            width, projected = model.global_head_dim, heads + model.num_global_key_value_heads
        total += shared + hidden * width * (projected + heads)
    return total


def _attention(model: ModelConfig, contexts: Sequence[int], canvases: Sequence[int]) -> tuple[float, float]:
    """FLOPs of scores and sums of values, forward, of the context and of the canvases."""
    window, length = model.sliding_window, model.canvas_length
    of_context = of_canvases = 0.0
    for kind in set(model.layer_types):
        layers, width = model.layer_types.count(kind), model.head_dim
        if kind == GLOBAL:
            width = model.global_head_dim
            seen = sum(tokens * (tokens + 1) // 2 for tokens in contexts)
            before = sum(canvases)
        else:
            seen = sum(_pairs_in_window(tokens, window) for tokens in contexts)
            before = sum(min(start, window - 1) for start in canvases)
        of_pair = 4.0 * model.num_attention_heads * width * layers
        of_context += of_pair * seen
        of_canvases += of_pair * length * (before + len(canvases) * length)
    return of_context, of_canvases


def _pairs_in_window(tokens: int, window: int) -> int:
    """A token sees itself and those before it, `window` in all."""
    inside = min(tokens, window)
    return inside * (inside + 1) // 2 + (tokens - inside) * window
