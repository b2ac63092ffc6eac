"""The routing rule, in plain torch: which experts a token goes to, and with what weight.

Softmax over all experts in float32, top k renormalised to one, then multiplied by a learned scale for each expert
(transformers' modeling_diffusion_gemma). The softmax of the top k logits is the same number: what all experts have in
common cancels. Shapes: T tokens, E experts, K chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from nemo_diffgemma.model.norm import rms_norm


def router_logits(x: Tensor, weight: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Logits of the raw residual stream, [..., H] -> [..., E], through a weightless norm of their own.

    `x` may be of a wider dtype than the product.
    """
    return F.linear(router_input(x, scale, eps, weight.dtype), weight)


def router_input(x: Tensor, scale: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """What the router's weight multiplies, [..., H]."""
    return rms_norm(x, None, eps).to(dtype) * scale * x.shape[-1] ** -0.5


def choose(logits_TE: Tensor, per_expert_scale: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The chosen experts [T, K] and their weights [T, K] float32, as (weights, experts)."""
    top_TK, chosen_TK = logits_TE.topk(top_k, dim=-1)
    return top_TK.softmax(-1, dtype=torch.float32) * per_expert_scale[chosen_TK], chosen_TK


def route(logits_TE: Tensor, per_expert_scale: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """`choose` with weights of all experts: [T, E] float32, zero where not chosen, and the chosen experts [T, K]."""
    weights_TK, chosen_TK = choose(logits_TE.float(), per_expert_scale, top_k)  # ONNX has no top-k in bfloat16
    return torch.zeros_like(logits_TE, dtype=torch.float32).scatter(-1, chosen_TK, weights_TK), chosen_TK
