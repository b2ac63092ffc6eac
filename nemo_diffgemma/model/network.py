"""The network: token table, layers, final norm and head over a stream of context and canvas tokens.

`run` is the one pass of which everything else is a use: new context (prompts, clean responses) and canvases of any
sequences, together or apart, with or without cached context. `encode` and `denoise` are inference; training encodes
clean sequences once with gradient and runs their canvases against those keys and values.

Shapes: B rows, S prompt columns, M canvases of C tokens, T tokens of the stream, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from nemo_diffgemma.config import ModelConfig
from nemo_diffgemma.diffusion.constraint import StepConstraint
from nemo_diffgemma.diffusion.levels import Shift
from nemo_diffgemma.errors import UserError
from nemo_diffgemma.model import likelihood, loss, vocabulary
from nemo_diffgemma.model.adapter_pass import AdapterPass
from nemo_diffgemma.model.adapters import Adapted, DropoutNoise
from nemo_diffgemma.model.cache import Cache, KeyValue
from nemo_diffgemma.model.dispatch import Counting, most_of_all
from nemo_diffgemma.model.embedding import TokenTable
from nemo_diffgemma.model.experts import ExpertPass
from nemo_diffgemma.model.gathered import gather_tokens
from nemo_diffgemma.model.layer import Layer, recompute
from nemo_diffgemma.model.norm import RMSNorm
from nemo_diffgemma.model.rotary import cosine_and_sine, inverse_frequencies
from nemo_diffgemma.model.row_products import multiple_of_tokens
from nemo_diffgemma.model.segments import Span, Stream, left_padding, stream_of, without_padding
from nemo_diffgemma.model.self_conditioning import SelfConditioning
from nemo_diffgemma.model.token_scores import token_scores
from nemo_diffgemma.parallel.agreement import agreed
from nemo_diffgemma.parallel.groups import current_layout, device, process_groups
from nemo_diffgemma.parallel.layout import ParallelLayout
from nemo_diffgemma.transfer import to_device


class Pass(NamedTuple):
    """Result of one pass: final hidden states in the stream's order, and the context for later passes.

    `canvas_hidden` [M*C, H] are those of all canvas tokens, `context_hidden` those of the new context where asked for.
    """

    canvas_hidden: Tensor | None
    context_hidden: Tensor | None
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
        self.model_config, self.dtype, self.groups = model, dtype, groups
        self.recompute = "none"
        self.expert_loads: Tensor | None = None  # [layers, experts]: where passes with gradient count their tokens
        self.embed_tokens = TokenTable(model, config, groups)
        self.layers = nn.ModuleList(Layer(model, i, config, groups) for i in range(model.num_hidden_layers))
        self.norm = RMSNorm(model.hidden_size, model.rms_norm_eps, dtype, device())
        self.self_conditioning = SelfConditioning(model, config, groups)
        self.assets: Path | None = None  # directory with tokenizer and carried tensors, if the model came from one
        self.lora: Adapted | None = None  # what its adapters are (nemo_diffgemma.lora)
        self.beside: dict[str, str] = {}  # several instead, of which each sequence may have one: keys by name
        self.dropout_of: DropoutNoise | None = None  # keys of the rows of a training step
        self.finish_gather: Callable[[], None] = lambda: None  # weights are whole afterwards; training sets it
        self.file_dtypes: dict[str, str] = {}  # of the tensors on disk, so that writing gives the same bytes back
        # plain attributes, not buffers: casting the model must not round them
        self._frequencies = {kind: inverse_frequencies(model, kind, device()) for kind in set(model.layer_types)}

    # -- the pass ------------------------------------------------------------------------------------------------

    def run(
        self,
        tokens: Tensor,
        stream: Stream,
        *,
        cache: Cache | None = None,
        soft: Tensor | None = None,
        need_context_hidden: bool = False,
        replicas_alike: bool = False,
        adapters: Sequence[str | None] | None = None,
    ) -> Pass:
        """Run the tokens of a stream without its padding, that is new context and then canvases, in one pass.

        `stream` continues the sequences of `cache`. `soft` [M, C, H], or [N, H] of all canvas tokens, is their
        self-conditioning signal, unscaled; None is no signal. With gradient enabled the returned cache carries
        gradient.
        `replicas_alike` says that all replicas run the same stream, without gradient: then experts exchange less.
        Without gradient, `adapters` may name one of `self.beside` for each sequence.
        """
        call = self._adapter_pass(stream, adapters)
        x, is_canvas = self._embed(stream, tokens, None if soft is None else soft.flatten(0, -2), call)
        x, layers = self._run_layers(x, is_canvas, stream, cache, replicas_alike, call)
        return self._finish(self.norm(x), stream, layers, need_context_hidden)

    def stream(
        self,
        sequences: tuple[Span, ...],
        contexts: Sequence[int] = (),
        canvases: Sequence[tuple[int, int]] = (),
        lengths: Sequence[int] | None = None,
    ) -> Stream:
        """The stream of new tokens of each sequence (`contexts`, how many) and of canvases (sequence, start).

        `lengths` are those of the canvases; None is the model's for all.
        """
        places = tuple((sequence, start) for sequence, start in canvases)
        each = self.model_config.canvas_length if lengths is None else tuple(lengths)
        multiple = multiple_of_tokens(device(), self.groups.tp.size())
        return stream_of(sequences, tuple(contexts), places, each, multiple)

    def _embed(
        self, stream: Stream, tokens: Tensor, soft_NH: Tensor | None, adapters: AdapterPass | None
    ) -> tuple[Tensor, Tensor | bool]:
        """This rank's tokens of the stream, [T/tp, H], and which of them are canvas tokens."""
        x = self.embed_tokens.look_up(
            nn.functional.pad(tokens, (0, stream.padding), value=self.model_config.pad_token_id)
        )
        if not stream.canvases:
            return x, False
        soft_TH = None
        if soft_NH is not None:
            around = (stream.context_tokens, stream.padding)
            soft_TH = nn.functional.pad(soft_NH * self.embed_tokens.scale, (0, 0, *around))
            soft_TH = self._scatter(soft_TH)
        conditioned = self.self_conditioning(x, soft_TH, adapters)
        if not stream.contexts:
            return conditioned, True
        is_canvas = self._local(stream.canvas_mask(x.device))[:, None]
        return torch.where(is_canvas, conditioned, x), is_canvas

    def _run_layers(
        self,
        x: Tensor,
        is_canvas: Tensor | bool,
        stream: Stream,
        cache: Cache | None,
        replicas_alike: bool,
        adapters: AdapterPass | None,
    ) -> tuple[Tensor, list[KeyValue]]:
        positions = stream.positions(x.device)
        rotary = {kind: cosine_and_sine(positions, f, self.dtype) for kind, f in self._frequencies.items()}
        level = self.recompute if torch.is_grad_enabled() else "none"
        kept = []
        shared = ExpertPass(
            replicas_alike,
            self._most_tokens(x, replicas_alike),
            level == "full",
            Counting(x.device),
            counted=self._without_padding(x.shape[0], stream),
        )
        for index, layer in enumerate(self.layers):
            past = cache.layers[index] if cache is not None and cache.layers else None
            loads = self.expert_loads[index] if self.expert_loads is not None and torch.is_grad_enabled() else None
            tables, experts = rotary[self.model_config.layer_kind(index)], replace(shared, loads=loads)
            args = (x, is_canvas, tables, stream, past, experts)
            if level == "full":
                x, context = recompute(layer, *args, False, adapters)
            else:
                x, context = layer(*args, level == "selective", adapters)
            kept.append(context)
        return x, kept

    def _without_padding(self, held: int, stream: Stream) -> int:
        """How many of the tokens that this rank holds are of a sequence; padding is behind the last."""
        tokens = stream.context_tokens + stream.canvas_tokens
        return min(held, max(0, tokens - held * self.groups.tp.rank()))

    def _adapter_pass(self, stream: Stream, names: Sequence[str | None] | None) -> AdapterPass | None:
        keys = [None if name is None else self.beside[name] for name in names or ()]
        if self.lora is None and not any(keys):
            return None
        dropout = self.dropout_of if self.training and torch.is_grad_enabled() else None
        call = AdapterPass.of(stream, None if dropout is None else dropout.of_tokens(stream), self.groups.tp, device())
        return call if self.lora is not None else call.with_chosen(keys, stream, device())

    def _most_tokens(self, x: Tensor, replicas_alike: bool) -> int:
        """The most tokens that a rank of the expert group holds. Ranks of a replica hold equal parts of its stream."""
        if replicas_alike or self.groups.tp_ep.size() <= self.groups.tp.size():
            return x.shape[0]
        return most_of_all(x.shape[0], self.groups.tp_ep, x.device)

    def _finish(self, x: Tensor, stream: Stream, layers: list[KeyValue], need_context_hidden: bool) -> Pass:
        canvas_hidden = context_hidden = None
        if stream.canvases or need_context_hidden:
            x = gather_tokens(x, self.groups.tp)
            if stream.canvases:
                canvas_hidden = x[stream.context_tokens : stream.context_tokens + stream.canvas_tokens]
            if need_context_hidden:
                context_hidden = x[: stream.context_tokens]
        return Pass(canvas_hidden, context_hidden, Cache(stream.sequences_after, tuple(layers)))

    def _scatter(self, x: Tensor) -> Tensor:
        """All tokens, equal on every rank -> this rank's; the backward gathers."""
        return x if self.groups.tp.size() == 1 else scatter_to_sequence_parallel_region(x, group=self.groups.tp)

    def _local(self, x: Tensor) -> Tensor:
        return x.chunk(self.groups.tp.size())[self.groups.tp.rank()]

    # -- inference -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Cache:
        """Causal pass over [B, S] ids (left padding by `attention_mask`) -> what canvases need of it.

        Raises `UserError` for ids outside of the vocabulary and for masks that are no left padding.
        """
        self.check_ids(input_ids)
        padding = left_padding(input_ids, attention_mask)
        tokens = torch.cat(without_padding(to_device(input_ids, device()), padding))
        stream = self.stream(Cache.empty(padding).sequences, [input_ids.shape[1] - columns for columns in padding])
        return self.run(tokens, stream, replicas_alike=True).cache.trimmed(self.model_config)

    @torch.no_grad()
    def denoise(self, canvas: Tensor, cache: Cache, self_conditioning_logits: Tensor | None = None) -> Tensor:
        """Float32 softcapped logits [B, C, V] of a canvas [B, C] after the cached context, on every rank.

        `self_conditioning_logits` [B, C, V] are the tempered logits of the step before.
        """
        self.check_canvas(canvas, len(cache.sequences))
        soft_MCH = None
        if self_conditioning_logits is not None:
            soft_NH = vocabulary.soft_embedding_of_logits(
                self_conditioning_logits.flatten(0, 1).to(device()), self.embed_tokens.weight, self.embed_tokens.shard
            )
            soft_MCH = soft_NH.view(*canvas.shape, -1)
        places = [(index, span.end) for index, span in enumerate(cache.sequences)]
        stream = self.stream(cache.sequences, canvases=places)
        tokens = canvas.to(device()).flatten()
        hidden = self.run(tokens, stream, cache=cache, soft=soft_MCH, replicas_alike=True).canvas_hidden
        assert hidden is not None
        logits = vocabulary.logits(
            hidden, self.embed_tokens.weight, self.embed_tokens.shard, self.model_config.final_logit_softcapping
        )
        return logits.view(*canvas.shape, -1)

    def statistics(
        self,
        hidden_NH: Tensor,
        temperature: float | Tensor,
        uniforms_N: Tensor,
        soft_embedding: bool,
        constraint: StepConstraint | None = None,
        locked_N: Tensor | None = None,
    ) -> vocabulary.Statistics:
        """What a denoising step needs of the tempered distribution of some positions."""
        return vocabulary.statistics(
            hidden_NH,
            self.embed_tokens.weight,
            self.embed_tokens.shard,
            softcap=self.model_config.final_logit_softcapping,
            temperature=temperature,
            uniforms_N=uniforms_N,
            soft_embedding=soft_embedding,
            constraint=constraint,
            locked_N=locked_N,
        )

    @torch.no_grad()
    def scores(self, hidden_NH: Tensor, ids_N: Tensor, top: int) -> Tensor:
        """Untempered log-probabilities of ids at some positions and the `top` largest there (`model.token_scores`)."""
        table = self.embed_tokens
        return token_scores(hidden_NH, ids_N, table.weight, table.shard, self.model_config.final_logit_softcapping, top)

    def agreed(self, flags: Tensor) -> Tensor:
        """Which of the flags hold on every rank: ranks of an expert group must leave a loop together."""
        return agreed(flags)

    # -- training ------------------------------------------------------------------------------------------------

    def encode_clean(self, tokens_T: Tensor, lengths: Sequence[int]) -> Pass:
        """Causal pass over clean sequences, one behind the other, with gradient; the cache keeps every position."""
        stream = self.stream(Cache.empty([0] * len(lengths)).sequences, lengths)
        return self.run(tokens_T, stream, need_context_hidden=True)

    def canvas_hidden(
        self, canvas_MC: Tensor, canvases: Sequence[tuple[int, int]], cache: Cache, soft_MCH: Tensor | None
    ) -> Tensor:
        """Final hidden states [M*C, H] of any set of canvases (sequence, start) of the cached sequences."""
        stream = self.stream(cache.sequences, canvases=canvases)
        hidden = self.run(canvas_MC.flatten(), stream, cache=cache, soft=soft_MCH).canvas_hidden
        assert hidden is not None
        return hidden

    def soft_embedding(self, hidden_NH: Tensor) -> Tensor:
        """Untempered self-conditioning signal of gradient-free hidden states; gradient reaches the table only."""
        return loss.soft_embedding(
            hidden_NH, self.embed_tokens.weight, self.embed_tokens.shard, self.model_config.final_logit_softcapping
        )

    def cross_entropy(
        self, hidden_NH: Tensor, labels_N: Tensor, weights_N: Tensor, shift: Shift | None = None
    ) -> tuple[Tensor, Tensor]:
        """Weighted sum of the cross-entropies of softcapped logits, and the cross-entropies [N]."""
        return loss.linear_cross_entropy(
            hidden_NH,
            self.embed_tokens.weight,
            labels_N,
            weights_N,
            self.embed_tokens.shard,
            self.model_config.final_logit_softcapping,
            shift,
        )

    def cross_entropy_gradient(
        self, hidden_NH: Tensor, labels_N: Tensor, weights_N: Tensor, shift: Shift | None = None
    ) -> loss.LossGradient:
        """Weighted sum of the cross-entropies and its gradient; that of the table is added to the table's."""
        return loss.linear_cross_entropy_gradient(
            hidden_NH,
            self.embed_tokens.weight,
            labels_N,
            weights_N,
            self.embed_tokens.shard,
            self.model_config.final_logit_softcapping,
            shift,
        )

    def mixture(
        self, hidden_NH: Tensor, noised_N: Tensor, clean_N: Tensor, factors_N: Tensor, shift: Shift | None
    ) -> likelihood.Mixture:
        """What a bound on likelihood needs of the predictions for some positions."""
        table = self.embed_tokens
        softcap = self.model_config.final_logit_softcapping
        return likelihood.mixture(hidden_NH, table.weight, noised_N, clean_N, factors_N, table.shard, softcap, shift)

    # -- input checks --------------------------------------------------------------------------------------------

    def check_ids(self, ids: Tensor) -> None:
        """Raise `UserError` unless `ids` is [B, S] of at least one token, all inside the vocabulary."""
        if ids.ndim != 2 or ids.shape[1] == 0 or ids.shape[0] == 0:
            raise UserError(
                f"input_ids has shape {list(ids.shape)}; expected [rows, tokens] with at least one token (an empty "
                f"prompt needs at least the <bos> token, id {self.model_config.bos_token_id})"
            )
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.model_config.vocab_size:
            raise UserError(
                f"token ids range from {low} to {high}, but this model has {self.model_config.vocab_size} ids (0 to "
                f"{self.model_config.vocab_size - 1}); was the prompt made with another tokenizer?"
            )

    def check_canvas(self, canvas: Tensor, rows: int) -> None:
        """Raise `UserError` unless `canvas` is [rows, canvas_length] inside the vocabulary."""
        expected = [rows, self.model_config.canvas_length]
        if list(canvas.shape) != expected:
            raise UserError(
                f"canvas has shape {list(canvas.shape)}; expected {expected}, that is one canvas of "
                f"canvas_length={self.model_config.canvas_length} tokens for each encoded row"
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
        cuda_graph_modules=[],  # Megatron warns of its own default
        calculate_per_token_loss=True,  # gradients are summed over replicas; the loss carries the global weights
    )
