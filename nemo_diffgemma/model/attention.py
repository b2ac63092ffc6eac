"""Attention of one layer on Megatron's tensor-parallel linears.

Order of operations (transformers' modeling_diffusion_gemma): q and k are normed for each head, then rotated; values are
normed without weight and not rotated; scale 1, no softcap. Global layers have no value projection: their values are the
raw key projection, before the key norm and the rotation.
"""

from __future__ import annotations

import copy

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nemo_diffgemma.config import GLOBAL, ModelConfig
from nemo_diffgemma.model.adapter_pass import AdapterPass
from nemo_diffgemma.model.adapters import add_to_products, row_product
from nemo_diffgemma.model.cache import KeyValue
from nemo_diffgemma.model.gathered import products_of_all
from nemo_diffgemma.model.norm import RMSNorm, rms_norm
from nemo_diffgemma.model.paged import PagedLayer
from nemo_diffgemma.model.rotary import rotate
from nemo_diffgemma.model.segment_attention import attend
from nemo_diffgemma.model.segments import Stream
from nemo_diffgemma.parallel.groups import device
from nemo_diffgemma.parallel.sharding import declare, over_tensor


def column_parallel(rows: int, config: TransformerConfig, groups: ProcessGroupCollection) -> ColumnParallelLinear:
    """A linear of `rows` outputs cut over tensor parallelism whose input is all tokens.

    Several projections share one gather of the tokens (`model.gathered`, which reads the weights); its backward
    reduce-scatters the sum of their gradients, so the linear itself must not reduce.
    """
    linear = ColumnParallelLinear(
        config.hidden_size,
        rows,
        config=_without_sequence_parallel(config),
        init_method=config.init_method,
        bias=False,
        gather_output=False,
        disable_grad_reduce=True,
        tp_group=groups.tp,
    )
    declare(linear.weight, over_tensor(groups, axis=0))
    return linear


def row_parallel(columns: int, config: TransformerConfig, groups: ProcessGroupCollection) -> RowParallelLinear:
    """A linear back to the hidden size whose output is summed over tensor parallelism and scattered over the tokens."""
    linear = RowParallelLinear(
        columns,
        config.hidden_size,
        config=config,
        init_method=config.output_layer_init_method,
        bias=False,
        input_is_parallel=True,
        skip_bias_add=False,
        tp_group=groups.tp,
    )
    declare(linear.weight, over_tensor(groups, axis=1))
    return linear


def _without_sequence_parallel(config: TransformerConfig) -> TransformerConfig:
    twin = config.__dict__.get("_gathered_twin")
    if twin is None:
        twin = copy.copy(config)
        twin.sequence_parallel = False
        config.__dict__["_gathered_twin"] = twin
    return twin


class SharedKeyValue(nn.Module):
    """Key or value projection where tensor parallelism is wider than the key/value heads.

    Every rank holds the whole weight and computes the one head that its query heads read. Ranks contribute gradients to
    different rows, or partial ones to the same rows: `sequence_parallel` makes Megatron sum them.
    """

    def __init__(self, heads: int, head_dim: int, config: TransformerConfig, groups: ProcessGroupCollection) -> None:
        super().__init__()
        head = groups.tp.rank() // (groups.tp.size() // heads)
        self.rows = slice(head * head_dim, (head + 1) * head_dim)
        self.weight = nn.Parameter(
            torch.empty(heads * head_dim, config.hidden_size, dtype=config.params_dtype, device=device())
        )
        self.weight.sequence_parallel = True  # type: ignore[attr-defined]

    def of_this_rank(self) -> Tensor:
        """The rows of the one head."""
        return self.weight[self.rows]


class Attention(nn.Module):
    """Self-attention over a stream; sliding and global layers differ in head sizes, window and value projection."""

    def __init__(
        self, model: ModelConfig, layer: int, config: TransformerConfig, groups: ProcessGroupCollection
    ) -> None:
        super().__init__()
        kind = model.layer_kind(layer)
        self.head_dim, kv_heads = model.heads(layer)
        self.eps = model.rms_norm_eps
        self.window = None if kind == GLOBAL else model.sliding_window

        def key_value() -> nn.Module:
            if kv_heads % groups.tp.size():
                return SharedKeyValue(kv_heads, self.head_dim, config, groups)
            return column_parallel(kv_heads * self.head_dim, config, groups)

        self.group = groups.tp
        self.q_proj = column_parallel(model.num_attention_heads * self.head_dim, config, groups)
        self.k_proj = key_value()
        self.v_proj = None if kind == GLOBAL else key_value()
        self.o_proj = row_parallel(model.num_attention_heads * self.head_dim, config, groups)
        self.q_norm = RMSNorm(self.head_dim, self.eps, config.params_dtype, device())
        self.k_norm = RMSNorm(self.head_dim, self.eps, config.params_dtype, device())

    def project(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], adapters: AdapterPass | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the whole stream for this rank's heads, [T, heads, D] each."""
        linears = [self.q_proj, self.k_proj, *([] if self.v_proj is None else [self.v_proj])]
        weights = [linear.of_this_rank() if isinstance(linear, SharedKeyValue) else linear.weight for linear in linears]
        products = products_of_all(x, weights, self.group)
        if adapters is not None:
            products = add_to_products(list(products), x, linears, adapters)
        q, k, *values = (product.view(product.shape[0], -1, self.head_dim) for product in products)
        v = values[0] if values else k
        return rotate(self.q_norm(q), rotary), rotate(self.k_norm(k), rotary), rms_norm(v, None, self.eps)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        stream: Stream,
        past: KeyValue | PagedLayer | None,
        adapters: AdapterPass | None = None,
    ) -> tuple[Tensor, KeyValue | PagedLayer]:
        """This rank's tokens [T/tp, H] -> the same of the output, and keys and values of the context."""
        q, k, v = self.project(x, rotary, adapters)
        out, context = attend(q, k, v, stream, self.window, past)
        return row_product(self.o_proj, out, adapters), context
