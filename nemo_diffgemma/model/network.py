"""The network: token table, layers, final norm and head over a stream of context and canvas tokens.

`run` is the one pass of which everything else is a use: context tokens (prompt, clean response) and canvases together
or apart, with or without cached context. `encode`, `denoise` and `denoising_step` are inference; training encodes the
clean sequence once with gradient and runs its canvases against those keys and values.

Shapes: B rows, S context columns, M canvases of C tokens, T tokens of the stream, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nemo_diffgemma.config import ModelConfig
from nemo_diffgemma.model import vocabulary
from nemo_diffgemma.model.cache import Cache
from nemo_diffgemma.model.embedding import TokenTable
from nemo_diffgemma.model.layer import Layer, gather_tokens, recompute
from nemo_diffgemma.model.norm import RMSNorm
from nemo_diffgemma.model.rotary import cosine_and_sine, inverse_frequencies
from nemo_diffgemma.model.segments import Canvas, KeyValue, Stream, left_padding
from nemo_diffgemma.model.self_conditioning import SelfConditioning
from nemo_diffgemma.parallel.groups import current_layout, device, process_groups
from nemo_diffgemma.parallel.layout import ParallelLayout

RECOMPUTE = ("none", "selective", "full")


class Pass(NamedTuple):
    """Result of one pass: final hidden states of all its canvas tokens [M*C, H], and the context for later passes."""

    canvas_hidden: Tensor | None
    cache: Cache


class Step(NamedTuple):
    """One denoising step over B canvases: statistics of `B*C` positions, and the context."""

    statistics: vocabulary.Statistics
    cache: Cache


class Network(MegatronModule):
    """DiffusionGemma's text network in the current layout. Parameters are uninitialised until loaded or `init_weights`.

    Raises `LayoutError` when the layout does not divide the sizes, and before `parallel.initialize`.
    """

    def __init__(self, model: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
        layout = current_layout()
        layout.check(model)
        config = transformer_config(model, layout, dtype)
        super().__init__(config=config)
        groups = process_groups()
        self.model, self.dtype, self.groups = model, dtype, groups
        self.recompute = "none"
        self.embed_tokens = TokenTable(model, config, groups)
        self.layers = nn.ModuleList(Layer(model, i, config, groups) for i in range(model.num_hidden_layers))
        self.norm = RMSNorm(model.hidden_size, model.rms_norm_eps, dtype, device())
        self.self_conditioning = SelfConditioning(model, config, groups)
        self.assets: Path | None = None  # directory with tokenizer and carried tensors, if the model came from one
        self.file_dtypes: dict[str, str] = {}  # of the tensors on disk, so that writing gives the same bytes back
        # plain attributes, not buffers: casting the model must not round them
        self._frequencies = {kind: inverse_frequencies(model, kind, device()) for kind in set(model.layer_types)}

    # -- the pass ------------------------------------------------------------------------------------------------

    def run(
        self,
        context_BS: Tensor | None,
        canvas_MC: Tensor | None = None,
        canvases: Sequence[tuple[int, int]] = (),
        *,
        cache: Cache | None = None,
        first: tuple[int, ...] | None = None,
        soft_NH: Tensor | None = None,
        need_context_hidden: bool = False,
    ) -> Pass:
        """Run new context columns and canvases in one pass.

        `first` is the left padding of each row (given once, then kept in the cache). `soft_NH` [M*C, H] is the
        self-conditioning signal of the canvases, unscaled; None is no signal. With gradient enabled the returned
        cache carries gradient.
        """
        if first is None:
            first = cache.first if cache is not None else (0,) * (0 if context_BS is None else context_BS.shape[0])
        stream = Stream(
            first=first,
            context=0 if context_BS is None else context_BS.shape[1],
            cached=0 if cache is None else cache.length,
            canvases=tuple(Canvas(*canvas) for canvas in canvases),
            canvas_length=0 if canvas_MC is None else canvas_MC.shape[1],
            multiple=self.groups.tp.size(),
        )
        x, is_canvas = self._embed(stream, context_BS, canvas_MC, soft_NH)
        x, layers = self._run_layers(x, is_canvas, stream, cache)
        return self._finish(self.norm(x), stream, layers, need_context_hidden)

    def _embed(
        self, stream: Stream, context_BS: Tensor | None, canvas_MC: Tensor | None, soft_NH: Tensor | None
    ) -> tuple[Tensor, Tensor | bool]:
        """This rank's tokens of the stream, [T/tp, H], and which of them are canvas tokens."""
        parts = [ids.flatten() for ids in (context_BS, canvas_MC) if ids is not None]
        if stream.padding:
            parts.append(parts[0].new_full((stream.padding,), self.model.pad_token_id))
        x = self.embed_tokens.look_up(torch.cat(parts))
        if canvas_MC is None:
            return x, False
        if soft_NH is not None:
            around = (stream.context_tokens, stream.padding)
            soft_NH = nn.functional.pad(soft_NH * self.embed_tokens.scale, (0, 0, *around))
            soft_NH = self._scatter(soft_NH)
        conditioned = self.self_conditioning(x, soft_NH)
        if stream.context == 0:
            return conditioned, True
        is_canvas = self._local(stream.canvas_mask(x.device))[:, None]
        return torch.where(is_canvas, conditioned, x), is_canvas

    def _run_layers(
        self, x: Tensor, is_canvas: Tensor | bool, stream: Stream, cache: Cache | None
    ) -> tuple[Tensor, list[KeyValue]]:
        positions = stream.positions(x.device)
        rotary = {kind: cosine_and_sine(positions, f, self.dtype) for kind, f in self._frequencies.items()}
        level = self.recompute if torch.is_grad_enabled() else "none"
        kept = []
        for index, layer in enumerate(self.layers):
            past = None if cache is None else cache.layers[index]
            args = (x, is_canvas, rotary[self.model.layer_kind(index)], stream, past)
            x, context = recompute(layer, *args) if level == "full" else layer(*args, selective=level == "selective")
            kept.append(context)
        return x, kept

    def _finish(self, x: Tensor, stream: Stream, layers: list[KeyValue], need_context_hidden: bool) -> Pass:
        canvas_hidden = context_hidden = None
        if stream.canvases or need_context_hidden:
            x = gather_tokens(x, self.groups.tp)
            end = stream.context_tokens + stream.canvas_tokens
            if stream.canvases:
                canvas_hidden = x[stream.context_tokens : end]
            if need_context_hidden:
                context_hidden = x[: stream.context_tokens].view(stream.rows, stream.context, -1)
        return Pass(canvas_hidden, Cache(stream.first, tuple(layers), stream.cached + stream.context, context_hidden))

    def _scatter(self, x: Tensor) -> Tensor:
        """All tokens, equal on every rank -> this rank's; the backward gathers."""
        return x if self.groups.tp.size() == 1 else scatter_to_sequence_parallel_region(x, group=self.groups.tp)

    def _local(self, x: Tensor) -> Tensor:
        return x.chunk(self.groups.tp.size())[self.groups.tp.rank()]

    # -- inference -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Cache:
        """Causal pass over [B, S] ids (left padding by `attention_mask`) -> what canvases need of it."""
        self.check_ids(input_ids)
        first = left_padding(input_ids, attention_mask)
        return self._trim(self.run(input_ids.to(device()), first=first).cache)

    @torch.no_grad()
    def denoise(self, canvas: Tensor, cache: Cache, self_conditioning_logits: Tensor | None = None) -> Tensor:
        """Float32 softcapped logits [B, C, V] of a canvas [B, C] after the cached context, on every rank.

        `self_conditioning_logits` [B, C, V] are the tempered logits of the step before.
        """
        self.check_canvas(canvas, cache.rows)
        soft = None
        if self_conditioning_logits is not None:
            soft = vocabulary.soft_embedding_of_logits(
                self_conditioning_logits.flatten(0, 1).to(device()), self.embed_tokens.weight, self.embed_tokens.shard
            )
        hidden = self._canvas_pass(canvas, cache, soft).canvas_hidden
        assert hidden is not None
        logits = vocabulary.logits(
            hidden, self.embed_tokens.weight, self.embed_tokens.shard, self.model.final_logit_softcapping
        )
        return logits.view(*canvas.shape, -1)

    @torch.no_grad()
    def denoising_step(
        self,
        canvas: Tensor,
        cache: Cache | None,
        *,
        context: Tensor | None = None,
        first: tuple[int, ...] | None = None,
        soft: Tensor | None = None,
        temperature: float = 1.0,
        uniforms: Tensor | None = None,
        last: bool = False,
    ) -> Step:
        """One denoising step of [B, C] canvases; new `context` columns [B, S] before them join the same pass.

        After the `last` step nobody needs a self-conditioning signal.
        """
        if context is None:
            assert cache is not None
            done = self._canvas_pass(canvas, cache, soft)
        else:
            start = (0 if cache is None else cache.length) + context.shape[1]
            canvases = [Canvas(row, start) for row in range(canvas.shape[0])]
            done = self.run(context, canvas, canvases, cache=cache, first=first, soft_NH=soft)
            done = Pass(done.canvas_hidden, self._trim(done.cache))
        assert done.canvas_hidden is not None
        found = vocabulary.statistics(
            done.canvas_hidden,
            self.embed_tokens.weight,
            self.embed_tokens.shard,
            softcap=self.model.final_logit_softcapping,
            temperature=temperature,
            uniforms_N=None if uniforms is None else uniforms.flatten(),
            soft_embedding=not last,
        )
        return Step(found, done.cache)

    def agree(self, flag: bool) -> bool:
        """Whether `flag` holds on every rank: ranks of an expert group must leave a loop together."""
        if dist.get_world_size() == 1:
            return flag
        vote = torch.tensor(int(flag), device=device())
        dist.all_reduce(vote, op=dist.ReduceOp.MIN)
        return bool(vote.item())

    def _canvas_pass(self, canvas: Tensor, cache: Cache, soft: Tensor | None) -> Pass:
        canvases = [Canvas(row, cache.length) for row in range(cache.rows)]
        return self.run(None, canvas.to(device()), canvases, cache=cache, soft_NH=soft)

    def _trim(self, cache: Cache) -> Cache:
        layers = tuple(Cache.trimmed(self.model, index, kept) for index, kept in enumerate(cache.layers))
        return Cache(cache.first, layers, cache.length)

    # -- training ------------------------------------------------------------------------------------------------

    def encode_clean(self, tokens_BS: Tensor) -> Cache:
        """Causal pass over clean, right-padded rows, with gradient; the cache keeps all columns and `hidden_BSH`."""
        return self.run(tokens_BS, need_context_hidden=True).cache

    def canvas_hidden(
        self, canvas_MC: Tensor, canvases: Sequence[tuple[int, int]], cache: Cache, soft_NH: Tensor | None
    ) -> Tensor:
        """Final hidden states [M*C, H] of any set of canvases of the encoded rows."""
        hidden = self.run(None, canvas_MC, canvases, cache=cache, soft_NH=soft_NH).canvas_hidden
        assert hidden is not None
        return hidden

    def soft_embedding(self, hidden_NH: Tensor) -> Tensor:
        """Untempered self-conditioning signal of gradient-free hidden states; gradient reaches the table only."""
        return vocabulary.soft_embedding(
            hidden_NH, self.embed_tokens.weight, self.embed_tokens.shard, self.model.final_logit_softcapping
        )

    def cross_entropy(self, hidden_NH: Tensor, labels_N: Tensor, weights_N: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted sum of the cross-entropies of softcapped logits, and the cross-entropies [N]."""
        return vocabulary.linear_cross_entropy(
            hidden_NH,
            self.embed_tokens.weight,
            labels_N,
            weights_N,
            self.embed_tokens.shard,
            self.model.final_logit_softcapping,
        )

    # -- input checks --------------------------------------------------------------------------------------------

    def check_ids(self, ids: Tensor) -> None:
        """Raise ValueError unless `ids` is [B, S] of at least one token, all inside the vocabulary."""
        if ids.ndim != 2 or ids.shape[1] == 0 or ids.shape[0] == 0:
            raise ValueError(
                f"input_ids has shape {list(ids.shape)}; expected [rows, tokens] with at least one token (an empty "
                f"prompt needs at least the <bos> token, id {self.model.bos_token_id})"
            )
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.model.vocab_size:
            raise ValueError(
                f"token ids range from {low} to {high}, but this model has {self.model.vocab_size} ids (0 to "
                f"{self.model.vocab_size - 1}); was the prompt made with another tokenizer?"
            )

    def check_canvas(self, canvas: Tensor, rows: int) -> None:
        """Raise ValueError unless `canvas` is [rows, canvas_length] inside the vocabulary."""
        expected = [rows, self.model.canvas_length]
        if list(canvas.shape) != expected:
            raise ValueError(
                f"canvas has shape {list(canvas.shape)}; expected {expected}, that is one canvas of "
                f"canvas_length={self.model.canvas_length} tokens for each encoded row"
            )
        self.check_ids(canvas)


def transformer_config(model: ModelConfig, layout: ParallelLayout, dtype: torch.dtype) -> TransformerConfig:
    """Megatron's configuration of the parts we use."""
    return TransformerConfig(
        num_layers=model.num_hidden_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        ffn_hidden_size=model.intermediate_size,
        num_moe_experts=model.num_experts,
        moe_router_topk=model.top_k_experts,
        moe_router_pre_softmax=True,  # our router's rule does not read it; Megatron demands it for one chosen expert
        moe_ffn_hidden_size=model.moe_intermediate_size,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
        layernorm_epsilon=model.rms_norm_eps,
        add_bias_linear=False,
        gated_linear_unit=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        sequence_parallel=layout.tensor > 1,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        pipeline_dtype=dtype,
        perform_initialization=False,
        use_cpu_initialization=not torch.cuda.is_available(),
        gradient_accumulation_fusion=False,
        calculate_per_token_loss=True,  # gradients are summed over replicas; the loss carries the global weights
    )
