"""The routing rule, in plain torch: which experts a token goes to, and with what weight.

Softmax over all experts in float32, top k renormalised to one, then multiplied by a learned scale for each expert
(transformers' modeling_diffusion_gemma). Shapes: T tokens, E experts, K chosen.
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
    return F.linear(rms_norm(x, None, eps).to(weight.dtype) * scale * x.shape[-1] ** -0.5, weight)


def route(logits_TE: Tensor, per_expert_scale: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Weights [T, E] float32, zero where not chosen, and the chosen experts [T, K]."""
    probabilities = logits_TE.softmax(dim=-1, dtype=torch.float32)
    weights_TK, chosen_TK = probabilities.topk(top_k, dim=-1)
    weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True) * per_expert_scale.float()[chosen_TK]
    return torch.zeros_like(probabilities).scatter(-1, chosen_TK, weights_TK), chosen_TK
