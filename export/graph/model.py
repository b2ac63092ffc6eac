"""The exact model as functions of weights and inputs, for tracing: `step` (one denoising step) and `encode`.

Everything that decides a number is the function that training and serving use: norms, rotary tables, routing, inverse
CDF, acceptance. What differs is the form. Nothing depends on Python numbers that change between calls; contexts are
buffers of which `past_length` columns of a row count, from the right; experts are computed as `export.graph.experts`
says; over several ranks every exchange is a sum. The rows of a call have nothing in common: each has a context, a
temperature and a bound of its own.

Shapes: B rows, C canvas positions, S new context columns, P columns of a context buffer, N query heads, G key/value
heads, D head width, H hidden, V vocabulary, T = B * C positions, K chunks of c ids. Heads, experts and rows of the
table are those of one rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from export.graph.experts import Choice, capacity, dense, sparse, takes_all
from export.graph.weights import DECODER, ENCODER, EXPERTS, TABLE
from nemo_diffgemma.config import GLOBAL, ModelConfig
from nemo_diffgemma.diffusion.sampler import accept, choose_chunk, choose_inside
from nemo_diffgemma.model.norm import rms_norm
from nemo_diffgemma.model.rotary import cosine_and_sine, inverse_frequencies, rotate
from nemo_diffgemma.model.routing import route, router_logits
from nemo_diffgemma.parallel.layout import ParallelLayout

CHUNK = 1024  # ids whose masses the inverse CDF sums first
MASKED_LOGIT = -1e30  # finite: masked entries must not make a NaN anywhere

KeyValue = tuple[Tensor, Tensor]


def all_reduce(x: Tensor) -> Tensor:
    """Sum over the ranks of the engine; a node of TensorRT's own in ONNX."""
    if torch.compiler.is_exporting():
        attributes: dict[str, Any] = {"collective_operation": "all_reduce", "reduce_op": "sum", "root": -1}
        return torch.onnx.ops.symbolic("trt::DistCollective", (x,), attributes, dtype=x.dtype, shape=x.shape, version=1)
    x = x.clone()
    dist.all_reduce(x)
    return x


def empty_context(
    config: ModelConfig, layout: ParallelLayout, rows: int, dtype: torch.dtype, device: torch.device | None = None
) -> list[KeyValue]:
    """Buffers of each layer before any context: one column that no token sees, as engines have no empty axes."""
    shapes = []
    for layer in range(config.num_hidden_layers):
        head_dim, heads = config.heads_of_rank(layer, layout.tensor)
        shapes.append((rows, heads, 1, head_dim))
    return [(torch.zeros(s, dtype=dtype, device=device), torch.zeros(s, dtype=dtype, device=device)) for s in shapes]


def product(x: Tensor, weight: Tensor, experts: Tensor | None = None, *, turned: bool = True) -> Tensor:
    """`x @ weight.T` with one matrix [N, K], or with one for each expert, [E, N, K], of some `experts` if given.

    Activations are `turned` and not weights: beside a loop, TensorRT-RTX 1.7.1 would keep a turned copy of all experts
    of every layer, 45.7 GB in the released model.
    """
    if experts is not None:
        weight = weight.index_select(0, experts)
    if weight.dim() == 2:
        return F.linear(x, weight)
    return (weight @ x.transpose(-1, -2)).transpose(-1, -2) if turned else x @ weight.transpose(-1, -2)


class Weights:
    """Tensors by input name. The one product that may be quantised goes through `linear`.

    `quantized` says where those of a graph that `quantize_graph` will be given are to lie: `inputs` or `inline`.
    """

    quantized: str | None = None

    def __init__(self, tensors: Mapping[str, Tensor], quantized: str | None = None) -> None:
        self._tensors, self.quantized = tensors, quantized

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def linear(self, x: Tensor, name: str, experts: Tensor | None = None) -> Tensor:
        """`product` with the expert matrices `name`. Quantised ones fuse only where they are not turned around."""
        return product(x, self[name], experts, turned=self.quantized is None)


class Model:
    """`encode` and `step` of one rank; the rank itself is an input, so one graph serves all ranks."""

    def __init__(
        self, config: ModelConfig, layout: ParallelLayout, dtype: torch.dtype, experts: str = "sparse"
    ) -> None:
        self.config, self.layout, self.dtype, self.experts = config, layout, dtype, experts
        # float16 overflows in the residual stream, which nothing norms; the products themselves stay float16
        self.stream = torch.float32 if dtype == torch.float16 else dtype
        self.scale = float(torch.tensor(config.hidden_size**0.5).to(dtype))
        self.frequencies = {
            kind: inverse_frequencies(config, kind, torch.device("cpu")) for kind in dict.fromkeys(config.layer_types)
        }
        self.experts_are_cut = layout.expert * layout.expert_tensor > 1
        self.routed: list[Tensor] = []  # chosen experts of each layer, of the last call outside of a trace

    # -- the two graphs --------------------------------------------------------------------------------------------

    def encode(
        self,
        weights: Weights,
        input_ids: Tensor,
        first: Tensor,
        past_length: Tensor,
        rank: Tensor,
        past: Sequence[KeyValue],
    ) -> list[KeyValue]:
        """[B, S] ids behind the cached context -> their keys and values, [B, G, S, D] for each layer.

        `first` [B] is the left padding, `past_length` [B] how many columns the context of a row has; the buffers in
        `past` hold the last of them at their right end, and anything before that.
        """
        past_length = past_length.view(-1, 1)
        positions = past_length + torch.arange(input_ids.shape[1])
        x = self._embed(weights, input_ids, rank)
        _, fresh = self._layers(weights, x, positions, first, past_length, past, rank, causal=True)
        return fresh

    def step(
        self,
        weights: Weights,
        canvas: Tensor,
        soft: Tensor,
        first: Tensor,
        past_length: Tensor,
        rank: Tensor,
        temperature: Tensor,
        entropy_bound: Tensor,
        uniforms: Tensor,
        replacements: Tensor,
        past: Sequence[KeyValue],
    ) -> tuple[Tensor, ...]:
        """One denoising step -> next canvas, next soft embedding, arg-max, entropy, accepted, accepted count.

        `canvas`, `uniforms`, `replacements` are [B, C]; `soft` [B, C, H] is the expected row of the table under the
        last step's distribution, zero at the first step; `temperature` and `entropy_bound` are float32, [B].
        """
        rows, length = canvas.shape
        embedded = self._embed(weights, canvas, rank)
        signal = rms_norm(
            soft.to(self.dtype) * self.scale, weights[DECODER + "self_conditioning.pre_norm.weight"], self._eps
        )
        signal = self._reduce_dense(self._mlp(weights, DECODER + "self_conditioning.", signal))
        x = rms_norm(embedded + signal, None, self._eps)
        past_length = past_length.view(-1, 1)
        positions = past_length + torch.arange(length)
        x, _ = self._layers(weights, x, positions, first, past_length, past, rank, causal=False)
        hidden_TH = self._norm(x, weights[DECODER + "norm.weight"]).reshape(rows * length, -1)
        temperature_T1 = temperature.view(-1, 1).expand(rows, length).reshape(-1, 1)
        argmax, sample, entropy, next_soft = self._settle(weights, hidden_TH, temperature_T1, uniforms.flatten(), rank)
        entropy_BC = entropy.view(rows, length)
        accepted = accept(entropy_BC, entropy_bound.view(-1, 1))
        next_canvas = torch.where(accepted, sample.view(rows, length), replacements)
        return (
            next_canvas,
            next_soft.view(rows, length, -1),
            argmax.view(rows, length),
            entropy_BC,
            accepted,
            accepted.long().sum(-1),
        )

    # -- tokens ----------------------------------------------------------------------------------------------------

    @property
    def _eps(self) -> float:
        return self.config.rms_norm_eps

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """From the residual stream into products."""
        return rms_norm(x, weight, self._eps).to(self.dtype)

    def _embed(self, weights: Weights, ids: Tensor, rank: Tensor) -> Tensor:
        table = weights[TABLE]
        if self.layout.tensor == 1:
            return (F.embedding(ids, table) * self.scale).to(self.stream)
        local = ids - rank * table.shape[0]
        mine = (local >= 0) & (local < table.shape[0])
        rows = F.embedding(local.clamp(0, table.shape[0] - 1), table) * mine[..., None].to(table.dtype)
        return (all_reduce(rows) * self.scale).to(self.stream)

    # -- layers ----------------------------------------------------------------------------------------------------

    def _layers(
        self,
        weights: Weights,
        x: Tensor,
        positions: Tensor,
        left_padding: Tensor,
        past_length: Tensor,
        past: Sequence[KeyValue],
        rank: Tensor,
        causal: bool,
    ) -> tuple[Tensor, list[KeyValue]]:
        rotary = {kind: cosine_and_sine(positions, table, self.dtype) for kind, table in self.frequencies.items()}
        columns = {self.config.layer_kind(i): keys.shape[2] for i, (keys, _) in enumerate(past)}
        masks = {
            kind: self._mask(kind, count, positions, left_padding, past_length, causal)
            for kind, count in columns.items()
        }
        real = positions >= left_padding[:, None] if causal else None  # a canvas has no padding
        fresh = []
        self.routed = []
        for i in range(self.config.num_hidden_layers):
            kind, prefix = self.config.layer_kind(i), f"{DECODER}layers.{i}."
            normed = self._norm(x, weights[prefix + "input_layernorm.weight"])
            attended, new = self._attention(
                weights, prefix + "self_attn.", kind, normed, rotary[kind], masks[kind], past[i]
            )
            fresh.append(new)
            if causal and i == self.config.num_hidden_layers - 1:
                break  # a context is its keys and values; an exporter doesn't see that nobody reads a loop's result
            x = x + self._norm(attended, weights[prefix + "post_attention_layernorm.weight"])
            x = x + self._feed_forward(weights, prefix, x, rank, real)
            x = x * weights[f"{ENCODER if causal else DECODER}layers.{i}.layer_scalar"].to(self.stream)
        return x, fresh

    def _mask(
        self, kind: str, columns: int, positions: Tensor, left_padding: Tensor, past_length: Tensor, causal: bool
    ) -> Tensor:
        """Additive float32 mask [B, 1, 1, S or 1, P + S] over a buffer of `columns` and the new tokens.

        `positions` are [B, S], `past_length` is [B, 1]; or one row stands for all.
        """
        new = positions.shape[1]
        key = past_length - columns + torch.arange(columns + new)
        seen = (key >= left_padding[:, None])[:, None]  # [B, 1, P + S]; what lies before column 0 is no context at all
        if causal:
            band = key[:, None] <= positions[..., None]
            if kind != GLOBAL:
                band = band & (key[:, None] > positions[..., None] - self.config.sliding_window)
            seen = seen & band
        elif kind != GLOBAL:  # anchored at the canvas, not at its tokens
            seen = seen & (key > past_length - self.config.sliding_window)[:, None]
        return torch.where(seen, 0.0, MASKED_LOGIT)[:, None, None]

    def _attention(
        self, weights: Weights, prefix: str, kind: str, x: Tensor, rotary: KeyValue, mask: Tensor, past: KeyValue
    ) -> tuple[Tensor, KeyValue]:
        rows, new, _ = x.shape
        width = self.config.global_head_dim if kind == GLOBAL else self.config.head_dim

        def heads(name: str) -> Tensor:
            return F.linear(x, weights[f"{prefix}{name}.weight"]).view(rows, new, -1, width)

        def normed(heads: Tensor, name: str) -> Tensor:
            return rotate(rms_norm(heads, weights[f"{prefix}{name}.weight"], self._eps), rotary).transpose(1, 2)

        q, k = heads("q_proj"), heads("k_proj")
        v = k if kind == GLOBAL else heads("v_proj")  # global layers have no value projection
        q_BNSD, k_BGSD = normed(q, "q_norm"), normed(k, "k_norm")
        v_BGSD = rms_norm(v, None, self._eps).transpose(1, 2)
        keys, values = torch.cat([past[0], k_BGSD], dim=2), torch.cat([past[1], v_BGSD], dim=2)
        groups = keys.shape[1]
        # the query heads of one key head are just more queries
        scores = q_BNSD.reshape(rows, groups, -1, width) @ keys.transpose(-1, -2)
        scores = scores.view(rows, groups, -1, new, keys.shape[2]).float() + mask
        shares = scores.softmax(-1).to(self.dtype).view(rows, groups, -1, keys.shape[2])
        out = (shares @ values).view(rows, -1, new, width).transpose(1, 2).reshape(rows, new, -1)
        out = self._reduce_dense(F.linear(out, weights[prefix + "o_proj.weight"]))
        return out, (k_BGSD, v_BGSD)

    def _feed_forward(self, weights: Weights, prefix: str, x: Tensor, rank: Tensor, real: Tensor | None) -> Tensor:
        """Dense MLP and experts in parallel."""
        dense = self._mlp(weights, prefix + "mlp.", self._norm(x, weights[prefix + "pre_feedforward_layernorm.weight"]))
        mixed = self.mixture(
            weights, prefix, x, self._norm(x, weights[prefix + "pre_feedforward_layernorm_2.weight"]), rank, real
        )
        if self.layout.tensor > 1 and self.experts_are_cut:  # one exchange for both
            dense, mixed = all_reduce(torch.stack([dense, mixed])).unbind(0)
        else:
            dense = self._reduce_dense(dense)
            mixed = all_reduce(mixed) if self.experts_are_cut else mixed
        total = self._norm(dense, weights[prefix + "post_feedforward_layernorm_1.weight"]) + self._norm(
            mixed, weights[prefix + "post_feedforward_layernorm_2.weight"]
        )
        return self._norm(total, weights[prefix + "post_feedforward_layernorm.weight"])

    def _mlp(self, weights: Weights, prefix: str, x: Tensor) -> Tensor:
        gate = F.linear(x, weights[prefix + "gate_proj.weight"])
        up = F.linear(x, weights[prefix + "up_proj.weight"])
        return F.linear(F.gelu(gate, approximate="tanh") * up, weights[prefix + "down_proj.weight"])

    def mixture(
        self, weights: Weights, prefix: str, x: Tensor, normed: Tensor, rank: Tensor, real: Tensor | None
    ) -> Tensor:
        """Weighted sum of the chosen experts of this rank; tokens that are not `real` [B, S] need none."""
        config, layout = self.config, self.layout
        logits = router_logits(x, weights[prefix + "router.proj.weight"], weights[prefix + "router.scale"], self._eps)
        shares, chosen = route(logits.flatten(0, 1), weights[prefix + "router.per_expert_scale"], config.top_k_experts)
        self.routed.append(chosen)
        choice = Choice.of(shares, chosen)
        if layout.expert > 1:
            choice = choice.of_part(rank // layout.expert_tensor, layout.expert)
        gate_up, down = (prefix + name for name in EXPERTS)
        if self.experts == "dense":
            width = config.moe_intermediate_size // layout.expert_tensor
            out = dense(weights, (gate_up, down), normed.flatten(0, 1), choice.shares_TE, width)
        else:
            if real is not None:
                choice = choice.among(real.flatten())
            out = sparse(weights, (gate_up, down), normed, choice, self._capacity(normed.shape[1]))
        return out.view(normed.shape)

    def _capacity(self, columns: int) -> int | None:
        """Of every expert and row; None: all of a row."""
        top_k, experts = self.config.top_k_experts, self.config.num_experts
        return None if takes_all(top_k, experts) else capacity(columns, top_k, experts)

    def _reduce_dense(self, x: Tensor) -> Tensor:
        return all_reduce(x) if self.layout.tensor > 1 else x

    # -- vocabulary ------------------------------------------------------------------------------------------------

    def _settle(
        self, weights: Weights, hidden_TH: Tensor, temperature_T1: Tensor, uniforms_T: Tensor, rank: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Arg-max [T], sample [T], entropy [T] float32 and soft embedding [T, H] of the tempered distribution."""
        table, softcap = weights[TABLE], self.config.final_logit_softcapping
        rows = table.shape[0]
        z = torch.tanh(F.linear(hidden_TH, table).float() * (1.0 / softcap)) * (softcap / temperature_T1)
        if self.config.vocab_size % self.layout.tensor:  # zero rows at the end of the last ranks
            z = torch.where(rank * rows + torch.arange(rows) < self.config.vocab_size, z, MASKED_LOGIT)
        chunk = min(CHUNK, rows)
        chunks = -(-rows // chunk)
        z_TKc = F.pad(z, (0, chunks * chunk - rows), value=MASKED_LOGIT).view(-1, chunks, chunk)
        local_TK = z_TKc.amax(-1)
        masses_TKc = torch.exp(z_TKc - local_TK[..., None])
        maximum_TK, mass_TK, moment_TK = self._gather(
            torch.stack([local_TK, masses_TKc.sum(-1), (masses_TKc * z_TKc).sum(-1)]), rank
        ).unbind(0)
        top_T1 = maximum_TK.amax(1, keepdim=True)
        relative_TK = torch.exp(maximum_TK - top_T1)
        mass_TK, moment_TK = mass_TK * relative_TK, moment_TK * relative_TK
        total_T1 = mass_TK.sum(1, keepdim=True)
        entropy_T = ((top_T1 + total_T1.log()) - moment_TK.sum(1, keepdim=True) / total_T1)[:, 0].clamp_min(0.0)

        best_T1 = maximum_TK.argmax(1, keepdim=True)
        drawn_T1, rest_T1 = self._of_rank_zero(*choose_chunk(mass_TK, uniforms_T), rank)
        inside_best = self._chunk_of(z_TKc, best_T1, rank).argmax(1, keepdim=True)
        inside_drawn = choose_inside(torch.exp(self._chunk_of(z_TKc, drawn_T1, rank) - top_T1), rest_T1)
        places = torch.cat([best_T1, drawn_T1], 1), torch.cat([inside_best, inside_drawn], 1)
        argmax_T, sample_T = self._ids(*places, rows, chunk, chunks, rank).unbind(1)

        shares = (masses_TKc * (torch.exp(local_TK - top_T1) / total_T1)[..., None]).flatten(1)[:, :rows]
        soft_TH = self._reduce_dense(shares.to(self.dtype) @ table)
        return argmax_T, sample_T, entropy_T, soft_TH

    def _gather(self, numbers: Tensor, rank: Tensor) -> Tensor:
        """[3, T, K of this rank] -> [3, T, K of all ranks]: a sum, in which every rank fills its own places."""
        ranks = self.layout.tensor
        if ranks == 1:
            return numbers
        mine = (torch.arange(ranks) == rank).to(numbers.dtype)
        return all_reduce(numbers[:, :, None] * mine[:, None]).flatten(2)

    def _of_rank_zero(self, drawn_T1: Tensor, rest_T1: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
        """The chunk and the rest of the uniform as rank 0 has them.

        Separately built engines may round differently; two ranks, or none, would then find the sampled id.
        """
        if self.layout.tensor == 1:
            return drawn_T1, rest_T1
        mine = torch.stack([drawn_T1.float(), rest_T1]) * (rank == 0).float()  # chunks are exact in float32
        drawn, rest = all_reduce(mine).unbind(0)
        return drawn.long(), rest

    def _chunk_of(self, z_TKc: Tensor, chunk_T1: Tensor, rank: Tensor) -> Tensor:
        """Logits of a chunk of all ranks' chunks, [T, c]; of some other chunk where this rank does not hold it."""
        chunks = z_TKc.shape[1]
        local = chunk_T1 if self.layout.tensor == 1 else (chunk_T1 - rank * chunks).clamp(0, chunks - 1)
        return z_TKc.gather(1, local[..., None].expand(-1, -1, z_TKc.shape[2]))[:, 0]

    def _ids(self, chunk: Tensor, inside: Tensor, rows: int, size: int, chunks: int, rank: Tensor) -> Tensor:
        """Token ids of places (chunk of all ranks' chunks, place inside), known to the rank that holds the chunk."""
        if self.layout.tensor == 1:
            return chunk * size + inside
        local = chunk - rank * chunks
        mine = (local >= 0) & (local < chunks)
        ids = torch.where(mine, rank * rows + local * size + inside, 0)
        return all_reduce(ids.float()).long()  # exact in float32: no vocabulary reaches 2^24 ids
