"""The mixture of experts: Megatron's router base, dispatcher and layer around DiffusionGemma's rule and our experts.

The router reads the raw residual stream, through its own weightless norm (rule in `routing`); the experts read another,
normed, input. No capacity limit, no dropping, no auxiliary loss.

Shapes: T tokens of this rank (sequence parallel), E experts in all, L experts of this rank, K chosen, H hidden,
W expert width of this rank, R rows dispatched to this rank.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from nemo_diffgemma.model.routing import route, router_logits
from nemo_diffgemma.parallel.groups import device
from nemo_diffgemma.parallel.sharding import declare, over_experts


class Router(TopKRouter):
    """Megatron's top-k router with DiffusionGemma's gating and weighting."""

    def __init__(self, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(config=config, **kwargs)
        self.weight.data = self.weight.data.to(device())

        def learned(size: int) -> nn.Parameter:
            parameter = nn.Parameter(torch.ones(size, dtype=config.params_dtype, device=device()))
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
            return parameter

        self.scale = learned(config.hidden_size)
        self.per_expert_scale = learned(config.num_moe_experts)

    def gating(self, x: Tensor) -> Tensor:
        """Router logits of the raw residual stream, [T, 1, H] -> [T, 1, E]."""
        return router_logits(x, self.weight, self.scale, self.config.layernorm_epsilon)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights [T, E] float32 (zero where not chosen) and the chosen map [T, E] bool."""
        weights, chosen_TK = route(logits.view(-1, self.num_experts), self.per_expert_scale, self.topk)
        return weights, torch.zeros_like(weights, dtype=torch.bool).scatter(-1, chosen_TK, True)


class Experts(nn.Module):
    """Gated experts of this rank as grouped matrix products; gate and up are kept apart so that width is a plain axis.

    `allreduce` and `tensor_model_parallel` on the parameters are what Megatron's DDP and gradient norm read to group
    expert gradients.
    """

    def __init__(
        self, num_local_experts: int, config: TransformerConfig, pg_collection: ProcessGroupCollection, name: Any = None
    ) -> None:
        super().__init__()
        width = config.moe_ffn_hidden_size // pg_collection.expt_tp.size()

        def weight(*shape: int, width_axis: int) -> nn.Parameter:
            parameter = nn.Parameter(torch.empty(num_local_experts, *shape, dtype=config.params_dtype, device=device()))
            declare(parameter, over_experts(pg_collection, width_axis))
            replicated = pg_collection.ep.size() == 1 and pg_collection.expt_tp.size() == pg_collection.tp.size()
            parameter.allreduce = replicated  # type: ignore[attr-defined]
            parameter.tensor_model_parallel = pg_collection.expt_tp.size() > 1  # type: ignore[attr-defined]
            return parameter

        self.gate_up_proj = weight(2, width, config.hidden_size, width_axis=2)
        self.down_proj = weight(config.hidden_size, width, width_axis=2)

    def forward(
        self, x_RH: Tensor, tokens_per_expert: Tensor, weights_R: Tensor, **_: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Rows sorted by expert -> weighted expert outputs, [R, H]. Expert-tensor ranks return partial sums."""
        gate_up, down = self._aligned()
        if x_RH.shape[0] == 0:  # grouped_mm has no gradient for no rows; the graph must still reach the dispatcher
            hidden = F.linear(x_RH, gate_up[0])
            return F.linear(self._activate(hidden, weights_R), down[0]), None
        ends = tokens_per_expert.to(x_RH.device).cumsum(0).to(torch.int32)
        hidden = F.grouped_mm(x_RH.contiguous(), gate_up.transpose(-2, -1), offs=ends)
        out = F.grouped_mm(self._activate(hidden, weights_R), down.transpose(-2, -1), offs=ends)
        return _ContiguousGradient.apply(out), None

    def _activate(self, hidden: Tensor, weights_R: Tensor) -> Tensor:
        gate, up = hidden.chunk(2, dim=-1)
        # the product is linear in the weight, so weighting before the down projection touches W columns instead of H
        return ((F.gelu(gate, approximate="tanh") * up) * weights_R[:, None]).to(hidden.dtype)

    def _aligned(self) -> tuple[Tensor, Tensor]:
        """Weights as [L, 2W, H] and [L, H, W], W rounded up to whole 16-byte words as grouped_mm demands."""
        gate_up: Tensor = self.gate_up_proj
        down: Tensor = self.down_proj
        missing = -gate_up.shape[2] % (16 // gate_up.element_size())
        if missing:
            gate_up, down = F.pad(gate_up, (0, 0, 0, missing)), F.pad(down, (0, missing))
        return gate_up.flatten(1, 2), down


class _ContiguousGradient(torch.autograd.Function):
    """Identity; grouped_mm refuses an expanded (stride 0) output gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous()


class MixtureOfExperts(MoELayer):
    """Megatron's MoE layer with separate inputs for router and experts."""

    def __init__(self, config: TransformerConfig, layer_number: int, groups: ProcessGroupCollection) -> None:
        super().__init__(
            config=config,
            submodules=MoESubmodules(router=Router, experts=Experts),
            layer_number=layer_number,
            pg_collection=groups,
        )

    def forward(self, router_input_TH: Tensor, expert_input_TH: Tensor) -> Tensor:
        """[T, H] twice -> weighted sum of the chosen experts, [T, H]."""
        weights, chosen = self.route(router_input_TH[:, None])
        x, weights = self.preprocess(expert_input_TH[:, None], weights, chosen)
        x, weights = self.dispatch(x, weights)
        x, _ = self.routed_experts_compute(x, weights)
        x = self.combine(x)
        # Megatron keeps them, and with them the graph: a cycle (graph, gradient hooks of DDP, model) unseen by Python's
        # collector, in which models and their process groups outlive their use
        self.token_dispatcher.probs = None
        return self.postprocess(x, None).squeeze(1)
