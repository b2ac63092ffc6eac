"""One layer, the same for context and canvas tokens: attention, then a dense MLP and experts in parallel.

Seven norms; the whole stream, residual included, is multiplied by a scalar at the end, of which encoder (context) and
decoder (canvas) have a copy each (transformers' modeling_diffusion_gemma).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nemo_diffgemma.config import ModelConfig
from nemo_diffgemma.model.activation import gelu
from nemo_diffgemma.model.adapter_pass import AdapterPass
from nemo_diffgemma.model.adapters import add_to_products, row_product
from nemo_diffgemma.model.attention import Attention, column_parallel, row_parallel
from nemo_diffgemma.model.cache import KeyValue
from nemo_diffgemma.model.experts import ExpertPass, MixtureOfExperts
from nemo_diffgemma.model.gathered import gather_tokens, products_of_all
from nemo_diffgemma.model.norm import RMSNorm
from nemo_diffgemma.model.segments import Stream
from nemo_diffgemma.parallel.groups import device


def recompute(function: Any, *args: Any) -> Any:
    """Run `function` now and again in the backward pass instead of keeping its activations.

    torch's non-reentrant form: tensors that a function closes over keep their gradient, and nothing here is random.
    """
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


class GatedMLP(nn.Module):
    """`down(gelu_tanh(gate(x)) * up(x))` cut over tensor parallelism; input and output are this rank's tokens."""

    def __init__(self, width: int, config: TransformerConfig, groups: ProcessGroupCollection) -> None:
        super().__init__()
        self.group = groups.tp
        self.gate_proj = column_parallel(width, config, groups)
        self.up_proj = column_parallel(width, config, groups)
        self.down_proj = row_parallel(width, config, groups)

    def forward(self, x: Tensor, adapters: AdapterPass | None = None) -> Tensor:
        products = products_of_all(x, (self.gate_proj.weight, self.up_proj.weight), self.group)
        return self._output(x, products, adapters)

    def of_gathered(self, x: Tensor, adapters: AdapterPass | None = None) -> Tensor:
        """All tokens of the stream -> this rank's tokens of the output."""
        return self._output(x, (self.gate_proj(x)[0], self.up_proj(x)[0]), adapters, is_whole=True)

    def _output(
        self, x: Tensor, products: Sequence[Tensor], adapters: AdapterPass | None, is_whole: bool = False
    ) -> Tensor:
        if adapters is not None:
            products = add_to_products(list(products), x, [self.gate_proj, self.up_proj], adapters, is_whole)
        gate, up = products
        return row_product(self.down_proj, gelu(gate, gate.requires_grad) * up, adapters)


class Layer(nn.Module):
    """A layer over a stream of tokens."""

    layer_scalar: Tensor
    encoder_layer_scalar: Tensor

    def __init__(
        self, model: ModelConfig, layer: int, config: TransformerConfig, groups: ProcessGroupCollection
    ) -> None:
        super().__init__()
        self.group = groups.tp

        def norm() -> RMSNorm:
            return RMSNorm(model.hidden_size, model.rms_norm_eps, config.params_dtype, device())

        self.self_attn = Attention(model, layer, config, groups)
        self.mlp = GatedMLP(model.intermediate_size, config, groups)
        self.moe = MixtureOfExperts(config, groups)
        self.input_layernorm = norm()
        self.post_attention_layernorm = norm()
        self.pre_feedforward_layernorm = norm()
        self.post_feedforward_layernorm = norm()
        self.post_feedforward_layernorm_1 = norm()
        self.pre_feedforward_layernorm_2 = norm()
        self.post_feedforward_layernorm_2 = norm()
        for name in ("layer_scalar", "encoder_layer_scalar"):
            self.register_buffer(name, torch.ones(1, dtype=config.params_dtype, device=device()))

    def forward(
        self,
        x: Tensor,
        is_canvas: Tensor | bool,
        rotary: tuple[Tensor, Tensor],
        stream: Stream,
        past: KeyValue | None,
        experts: ExpertPass,
        selective: bool = False,
        adapters: AdapterPass | None = None,
    ) -> tuple[Tensor, KeyValue]:
        """This rank's tokens [T/tp, H] -> the same after the layer, and the context's keys and values.

        `is_canvas` is [T/tp, 1], or one bool where all tokens are of one kind; `past` holds cached keys and values,
        passed as an argument so that a recomputed layer keeps their gradient.
        """
        attended, context = self._attend(self.input_layernorm(x), rotary, stream, past, selective, adapters)
        x = x + self.post_attention_layernorm(attended)
        dense, mixed = self._feed_forward(x, experts, selective, adapters)
        mixed = self.post_feedforward_layernorm_2(mixed)
        x = x + self.post_feedforward_layernorm(self.post_feedforward_layernorm_1(dense) + mixed)
        return x * self._scalar(is_canvas), context

    def _feed_forward(
        self, x: Tensor, experts: ExpertPass, selective: bool, adapters: AdapterPass | None
    ) -> tuple[Tensor, Tensor]:
        """Dense MLP and experts, of the same residual stream."""
        if self.moe.needs_whole_stream(experts):  # then one gather serves both
            x = gather_tokens(x, self.group)
            dense = self.mlp.of_gathered(self.pre_feedforward_layernorm(x), adapters)
        else:
            dense = self.mlp(self.pre_feedforward_layernorm(x), adapters)
        args = (x, self.pre_feedforward_layernorm_2(x), experts, adapters)
        return dense, recompute(self.moe, *args) if selective else self.moe(*args)

    def _attend(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        stream: Stream,
        past: KeyValue | None,
        selective: bool,
        adapters: AdapterPass | None,
    ) -> tuple[Tensor, KeyValue]:
        if selective:
            return recompute(self.self_attn, x, rotary, stream, past, adapters)
        return self.self_attn(x, rotary, stream, past, adapters)

    def _scalar(self, is_canvas: Tensor | bool) -> Tensor:
        if isinstance(is_canvas, bool):
            return self.layer_scalar if is_canvas else self.encoder_layer_scalar
        return torch.where(is_canvas, self.layer_scalar, self.encoder_layer_scalar)
