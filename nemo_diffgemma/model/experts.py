"""The mixture of experts: Megatron's router base and expert groups around DiffusionGemma's rule and our experts.

The router reads the raw residual stream, through its own weightless norm (rule in `routing`); the experts read another,
normed, input. No capacity limit, no dropping, no auxiliary loss.

What crosses between ranks are tokens, not rows: every rank of the expert group gets all tokens of the group, computes
the rows of its own experts, and one sum gives each rank its tokens back. A token crosses once to each rank, where an
all-to-all sends it once for each chosen expert: as much at EP8 with 8 chosen experts, less below. At inference even
that is not needed: replicas hold the same tokens. The host has to know the number of rows only where many of them
are kept: one number a layer and pass with gradient, which recomputation does not ask for again.

Shapes: T tokens of this rank (sequence parallel), E experts in all, L experts of this rank, K chosen, H hidden,
W expert width of this rank, R rows of this rank's experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from nemo_diffgemma.model.activation import gelu
from nemo_diffgemma.model.adapter_pass import NO_ADAPTERS, AdapterPass, RowKinds
from nemo_diffgemma.model.adapters import adapters_of, has_parts, local_product
from nemo_diffgemma.model.dispatch import Counting, Rows, SortedChoices, sum_rows, take_rows
from nemo_diffgemma.model.routing import choose, router_input, router_logits
from nemo_diffgemma.model.row_products import grouped_product
from nemo_diffgemma.parallel.groups import device
from nemo_diffgemma.parallel.sharding import declare, over_experts
from nemo_diffgemma.transfer import HostCopy

# Choices at a time where the number of rows is not asked for and most may be other ranks'; at the released size
UNCOUNTED = 1 << 16  # 1 GB of rows
UNCOUNTED_WITH_GRADIENT = 1 << 14  # 0.25 GB of rows and as much of gradients


class Router(TopKRouter):
    """Megatron's top-k router with DiffusionGemma's gating and weighting."""

    def __init__(self, config: TransformerConfig, groups: ProcessGroupCollection) -> None:
        super().__init__(config=config, pg_collection=groups)

        def learned(parameter: Tensor) -> nn.Parameter:
            parameter = nn.Parameter(parameter)
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
            return parameter

        like = dict(dtype=config.params_dtype, device=device())
        self.weight = learned(
            torch.empty(config.num_moe_experts, config.hidden_size, **like)
        )  # Megatron's is on the CPU
        self.scale = learned(torch.ones(config.hidden_size, **like))
        self.per_expert_scale = learned(torch.ones(config.num_moe_experts, **like))

    def gating(self, x: Tensor, adapters: AdapterPass | None = None) -> Tensor:
        """Router logits of the raw residual stream, [T, H] -> [T, E]."""
        if adapters is None:
            return router_logits(x, self.weight, self.scale, self.config.layernorm_epsilon)
        scored = router_input(x, self.scale, self.config.layernorm_epsilon, self.weight.dtype)
        return local_product(self, F.linear(scored, self.weight), scored, adapters)

    def forward(self, x: Tensor, adapters: AdapterPass | None = None) -> tuple[Tensor, Tensor]:
        """Weights [T, K] and chosen experts [T, K] of the raw residual stream."""
        return self.routing(self.gating(x, adapters))

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights [T, K] float32 and the chosen experts [T, K]."""
        return choose(logits, self.per_expert_scale, self.topk)


class Experts(nn.Module):
    """Gated experts of this rank as grouped matrix products; gate and up are kept apart so that width is a plain axis.

    `allreduce` and `tensor_model_parallel` on the parameters are what Megatron's DDP and gradient norm read to group
    expert gradients.
    """

    def __init__(self, config: TransformerConfig, groups: ProcessGroupCollection) -> None:
        super().__init__()
        local_experts = config.num_moe_experts // groups.ep.size()
        width = config.moe_ffn_hidden_size // groups.expt_tp.size()

        def weight(*shape: int, width_axis: int) -> nn.Parameter:
            parameter = nn.Parameter(torch.empty(local_experts, *shape, dtype=config.params_dtype, device=device()))
            declare(parameter, over_experts(groups, width_axis))
            replicated = groups.ep.size() == 1 and groups.expt_tp.size() == groups.tp.size()
            parameter.allreduce = replicated  # type: ignore[attr-defined]
            parameter.tensor_model_parallel = groups.expt_tp.size() > 1  # type: ignore[attr-defined]
            return parameter

        self.gate_up_proj = weight(2, width, config.hidden_size, width_axis=2)
        self.down_proj = weight(config.hidden_size, width, width_axis=2)

    def forward(self, x_RH: Tensor, weights_R: Tensor, ends_L: Tensor, kinds: RowKinds = NO_ADAPTERS) -> Tensor:
        """Rows sorted by expert -> weighted expert outputs [R, H]; those behind the last expert's are undefined.

        Expert-tensor ranks return partial sums. `kinds` of the rows are for adapters.
        """
        gate_up, down = self._aligned()
        hidden = self._product("gate_up_proj", x_RH, gate_up, ends_L, kinds)
        # the product is linear in the weight, so weighting before the down projection touches W columns instead of H
        active = _GatedActivation.apply(hidden, weights_R)
        return self._product("down_proj", active, down, ends_L, kinds)

    def _product(self, name: str, x: Tensor, weight: Tensor, ends_L: Tensor, kinds: RowKinds) -> Tensor:
        if x.shape[0] == 0:  # grouped_mm has no gradient for no rows; the graph must still reach the other ranks
            product = F.linear(x, weight[0])
        else:
            product = grouped_product(x, weight.transpose(-2, -1), ends_L)
        for key, adapters in adapters_of(self, kinds.numbers):
            if name in adapters._modules:
                given = (product, x, ends_L, kinds.is_canvas, kinds.rows_of(key))
                product = adapters._modules[name].added(*given)  # type: ignore[union-attr, operator]
        return product

    def _aligned(self) -> tuple[Tensor, Tensor]:
        """Weights as [L, 2W, H] and [L, H, W], W rounded up to whole 16-byte words as grouped_mm demands."""
        gate_up: Tensor = self.gate_up_proj
        down: Tensor = self.down_proj
        missing = -gate_up.shape[2] % (16 // gate_up.element_size())
        if missing:
            gate_up, down = F.pad(gate_up, (0, 0, 0, missing)), F.pad(down, (0, missing))
        return gate_up.flatten(1, 2), down


class _GatedActivation(torch.autograd.Function):
    """`gelu(gate) * up * weight`, rounded after each factor; keeps its inputs alone for the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden_R2W: Tensor, weights_R: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_R2W, weights_R)
        gate, up = hidden_R2W.chunk(2, dim=-1)
        return gelu(gate, hidden_R2W.requires_grad).mul_(up).mul_(weights_R[:, None])

    @staticmethod
    def backward(ctx: Any, gradient_RW: Tensor) -> tuple[Tensor, Tensor]:
        hidden, weights_R = ctx.saved_tensors
        gate, up = hidden.chunk(2, dim=-1)
        active = F.gelu(gate, approximate="tanh")
        of_weights = (active * up).mul_(gradient_RW).sum(-1, dtype=weights_R.dtype)
        weighted = (gradient_RW * weights_R[:, None]).to(hidden.dtype)
        of_gate = torch.ops.aten.gelu_backward(weighted * up, gate, approximate="tanh")
        return torch.cat([of_gate, weighted.mul_(active)], dim=-1), of_weights


@dataclass
class ExpertPass:
    """What the experts of a layer know of a pass besides its tokens.

    `replicas_alike`: every replica runs the same tokens, as at inference. Otherwise `tokens` is the most that any rank
    of the expert group holds. `recomputed`: nothing of the layer is kept for the backward pass. `counting` is shared by
    all layers. `rows` are those of this rank's experts once the host knows them, for recomputation. `loads` counts
    the tokens of each expert, [E], of the first `counted` that this rank holds; once, however often a layer runs.
    """

    replicas_alike: bool
    tokens: int
    recomputed: bool
    counting: Counting
    rows: int | None = None
    loads: Tensor | None = None
    counted: int = 0


class MixtureOfExperts(nn.Module):
    """Router and experts over the ranks of Megatron's expert groups, with separate inputs for the two.

    Megatron's MoELayer and token dispatchers are left out: they ask the host for the counts of every expert and rank in
    every pass, the gradient-free and recomputed ones included.
    """

    def __init__(self, config: TransformerConfig, groups: ProcessGroupCollection) -> None:
        super().__init__()
        self.router = Router(config, groups)
        self.experts = Experts(config, groups)
        self.num_experts = config.num_moe_experts
        self.group, self.tp = groups.tp_ep, groups.tp
        self.first_expert = groups.ep.rank() * (self.num_experts // groups.ep.size())

    def needs_whole_stream(self, call: ExpertPass) -> bool:
        """Whether the inputs are all tokens of the replica, which all ranks of the expert group hold alike."""
        spans_replicas = self.group.size() > 1 and self.group.size() >= self.tp.size()
        return spans_replicas and call.replicas_alike and not torch.is_grad_enabled()

    def forward(
        self,
        router_input_TH: Tensor,
        expert_input_TH: Tensor,
        call: ExpertPass,
        adapters: AdapterPass | None = None,
    ) -> Tensor:
        """[T, H] twice -> weighted sum of the chosen experts, [T, H].

        Where `needs_whole_stream`, the inputs are those of all tokens, without gradient; the result is this rank's.
        """
        weights_TK, chosen_TK = self.router(router_input_TH, adapters)
        if call.loads is not None:
            chosen = chosen_TK[: call.counted].flatten()
            call.loads.scatter_add_(0, chosen, call.counting.ones(chosen.shape[0]))
            call.loads = None  # recomputation comes here again
        kinds = self._kinds(expert_input_TH, adapters)
        if self.group.size() == 1:
            return self._compute(expert_input_TH, weights_TK, self._sorted(chosen_TK, call).all(), kinds)
        if self.needs_whole_stream(call):
            local_TK = self._local(chosen_TK)
            return self._sum_of_alike(self._uncounted(expert_input_TH, weights_TK, local_TK, call, kinds))
        tokens = expert_input_TH.shape[0]
        everything = self._over_group(expert_input_TH, weights_TK, chosen_TK, call, kinds)
        return reduce_scatter_to_sequence_parallel_region(everything, group=self.group)[:tokens]

    def _kinds(self, x_TH: Tensor, adapters: AdapterPass | None) -> RowKinds:
        """Of the tokens; only adapters that differ between context and canvas ask for the canvas tokens."""
        if adapters is None:
            return NO_ADAPTERS
        parts = any(has_parts(adapter) for _, adapter in adapters_of(self.experts, adapters.chosen))
        return adapters.kinds_of(x_TH, with_canvas=parts)

    def _over_group(
        self, x_TH: Tensor, weights_TK: Tensor, chosen_TK: Tensor, call: ExpertPass, kinds: RowKinds
    ) -> Tensor:
        """This rank's share of the outputs for all tokens of the expert group, one rank's after the other."""
        missing = call.tokens - x_TH.shape[0]
        kinds = kinds.each(lambda values: self._gathered(F.pad(values, (0, 0, 0, missing))))
        if missing:
            x_TH, weights_TK = (F.pad(x, (0, 0, 0, missing)) for x in (x_TH, weights_TK))
            chosen_TK = F.pad(chosen_TK, (0, 0, 0, missing), value=self.num_experts)  # no expert at all
        weights_TK = gather_from_sequence_parallel_region(weights_TK, group=self.group)
        chosen_TK = self._local(gather_from_sequence_parallel_region(chosen_TK, group=self.group))
        if not torch.is_grad_enabled():
            x_TH = gather_from_sequence_parallel_region(x_TH, group=self.group)
            return self._uncounted(x_TH, weights_TK, chosen_TK, call, kinds)
        choices = self._sorted(chosen_TK, call)
        if call.recomputed and chosen_TK.numel() <= UNCOUNTED_WITH_GRADIENT:
            x_TH = gather_from_sequence_parallel_region(x_TH, group=self.group)
            return self._compute(x_TH, weights_TK, choices.uncounted(), kinds)
        count = HostCopy(choices.count) if call.rows is None else None
        x_TH = gather_from_sequence_parallel_region(x_TH, group=self.group)  # meanwhile
        if count is not None:
            call.rows = int(count.numbers()[0])
        assert call.rows is not None
        return self._compute(x_TH, weights_TK, choices.counted(call.rows), kinds)

    def _gathered(self, values: Tensor) -> Tensor:
        """Small whole numbers of all tokens of the group."""
        return gather_from_sequence_parallel_region(values.float(), group=self.group).to(values.dtype)

    def _local(self, chosen_TK: Tensor) -> Tensor:
        """Experts counted from the first of this rank: those of other ranks, and number E, come after its own."""
        return chosen_TK if self.first_expert == 0 else (chosen_TK - self.first_expert).remainder(self.num_experts + 1)

    def _sorted(self, local_TK: Tensor, call: ExpertPass) -> SortedChoices:
        return SortedChoices(local_TK, self.experts.down_proj.shape[0], call.counting)

    def _uncounted(
        self,
        x_TH: Tensor,
        weights_TK: Tensor,
        local_TK: Tensor,
        call: ExpertPass,
        kinds: RowKinds = NO_ADAPTERS,
    ) -> Tensor:
        """Without gradient: a row for every choice, some tokens at a time."""
        step = max(1, UNCOUNTED // local_TK.shape[1])
        parts = []
        for start in range(0, max(1, x_TH.shape[0]), step):
            cut = slice(start, start + step)
            of_part = kinds.each(lambda values: values[cut])  # noqa: B023  called at once
            rows = self._sorted(local_TK[cut], call).uncounted()
            parts.append(self._compute(x_TH[cut], weights_TK[cut], rows, of_part))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _compute(self, x_TH: Tensor, weights_TK: Tensor, rows: Rows, kinds: RowKinds = NO_ADAPTERS) -> Tensor:
        """Weighted sum of this rank's experts for each token, [T, H]."""
        weights_R = weights_TK.flatten().index_select(0, rows.choices_R)
        if rows.absent is not None and weights_R.requires_grad:  # the gradient of undefined rows is undefined
            weights_R = weights_R.masked_fill(rows.is_undefined, 0.0)
        kinds = kinds.each(lambda values: values.index_select(0, rows.tokens_R))
        return sum_rows(self.experts(take_rows(x_TH, rows), weights_R, rows.ends_L, kinds), rows)

    def _sum_of_alike(self, x_TH: Tensor) -> Tensor:
        """Sum over the expert group of what each rank has for all tokens -> this rank's tokens."""
        if self.group.size() == self.tp.size():
            return reduce_scatter_to_sequence_parallel_region(x_TH, group=self.group)
        dist.all_reduce(x_TH, group=self.group)
        return x_TH.chunk(self.tp.size())[self.tp.rank()]
