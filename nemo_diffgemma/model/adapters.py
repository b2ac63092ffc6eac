"""Low-rank adapters: `scale * B A x` beside the product `W x` of a linear whose weight stays as it is.

Adapters are PEFT's on transformers' modules: one A and B for q_proj, one for each of gate_proj and up_proj of the dense
MLP, one for the fused gate_up_proj of the experts. A linear may have several, by name (`adapters_of`).

Under tensor parallelism what crosses between ranks is the middle, [T, r]: behind a gather where the output is cut,
behind a sum where the input is. One of A and B is then whole on every rank, which has its gradient by its own tokens:
`sequence_parallel` makes Megatron sum them. An expert's is whole over expert-tensor parallelism, where gradients are
summed by autograd, since Megatron sums over no such group.

An adapter that PEFT has trained on transformers' model differs between encoder and decoder, of which each has modules
of its own for the tied weights. Both then stand in one adapter, of the sum of the ranks, and `parts` says how much of
the middle context tokens use (the first ranks) and how much canvas tokens.

Shapes: T tokens, R rows of this rank's experts, L experts of this rank, E of all, r rank, W expert width of this rank.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn
from torch.nn import functional as F

from nemo_diffgemma.diffusion.noise import DROPOUT, crossed_uniforms, keyed_bits
from nemo_diffgemma.diffusion.seeds import seed_of
from nemo_diffgemma.model.adapter_pass import AdapterPass
from nemo_diffgemma.model.adapter_size import CHILD, AdapterSize
from nemo_diffgemma.model.gathered import gather_tokens
from nemo_diffgemma.model.row_products import added_product, grouped_product, product
from nemo_diffgemma.model.segments import Kind, Stream
from nemo_diffgemma.parallel.groups import device
from nemo_diffgemma.parallel.sharding import Cut, Shard, declare, over_experts, over_tensor


@dataclass(frozen=True)
class DropoutNoise:
    """Keys of dropout in the passes of a training step: a function of the seed and of each row's sample."""

    seed: int
    samples: tuple[int, ...]

    def of_tokens(self, stream: Stream) -> Tensor:
        """A key for every token of a stream over these rows, [T] int64 on the host.

        A canvas of a row is told by where it starts: two may cover one position, as fill and as the next turn.
        """
        parts = [
            keyed_bits(
                self.seed,
                self.samples[segment.sequence],
                DROPOUT,
                segment.start if segment.kind is Kind.CANVAS else -1,
                torch.arange(segment.start, segment.start + segment.length),
            )
            for segment in stream.segments
        ]
        return torch.cat([*parts, torch.zeros(stream.padding, dtype=torch.long)])


@dataclass(frozen=True)
class Adapted:
    """The adapters of a network: sizes by module name of the decoder (targets.py), and the base they were made for.

    `base` is the path of its checkpoint and `fingerprint` what base.py makes of its weights.
    """

    sizes: Mapping[str, AdapterSize]
    dropout: float = 0.0
    base: str = ""
    fingerprint: str = ""


def adapters_of(linear: nn.Module, chosen: Container[str] | None) -> Iterator[tuple[str, nn.Module]]:
    """The adapters of a linear or of experts with their keys; of the `chosen` ones, where not None."""
    adapters = linear._modules.get(CHILD)
    for key, adapter in () if adapters is None else adapters._modules.items():
        if adapter is not None and (chosen is None or key in chosen):
            yield key, adapter


def has_parts(adapters: nn.Module) -> bool:
    """Whether one of the adapters of a module differs between context and canvas tokens."""
    return any(isinstance(adapter, _Sized) and adapter.size.parts is not None for adapter in adapters.modules())


class _Sized(nn.Module):
    """Scale and parts of an adapter."""

    def __init__(self, size: AdapterSize) -> None:
        super().__init__()
        self.size = size
        self._scales: tuple[Tensor, Tensor] | None = None
        if size.parts is not None:
            (context, of_context), (canvas, of_canvas) = size.parts
            self._scales = (
                torch.tensor([of_context] * context + [0.0] * canvas, device=device()),
                torch.tensor([0.0] * context + [of_canvas] * canvas, device=device()),
            )

    def scaled(self, middle: Tensor, is_canvas: Tensor | bool) -> Tensor:
        """The middle times the scale of each token, `is_canvas` [tokens, 1] or one bool."""
        if self._scales is None:
            return middle * self.size.scale
        context, canvas = (scale.to(middle.dtype) for scale in self._scales)
        if isinstance(is_canvas, bool):
            return middle * (canvas if is_canvas else context)
        return middle * torch.where(is_canvas, canvas, context)


# -- linears ---------------------------------------------------------------------------------------------------------


class Adapter(_Sized):
    """The adapter of a linear: A [r, in], B [out, r], each cut as the linear's weight is along that axis.

    `rows` are those of B whose products this rank makes, where it holds more.
    """

    def __init__(
        self,
        size: AdapterSize,
        name: str,
        weight: Tensor,
        shard: Shard,
        groups: ProcessGroupCollection,
        dropout: float = 0.0,
        rows: slice | None = None,
    ) -> None:
        super().__init__(size)
        self.rows, self.group = rows or slice(None), groups.tp
        self.is_row_parallel = any(cut.axis == 1 for cut in shard.cuts)
        is_column_parallel = any(cut.axis == 0 for cut in shard.cuts)
        self.dropout = dropout
        self._key = seed_of(name)
        self._first_feature = shard.slices(tuple(weight.shape))[1].start

        def learned(*shape: int, axis: int | None) -> nn.Parameter:
            parameter = nn.Parameter(torch.empty(*shape, dtype=weight.dtype, device=weight.device))
            if axis is not None:
                declare(parameter, over_tensor(groups, axis))
                parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
            else:
                parameter.sequence_parallel = True  # type: ignore[attr-defined]
            return parameter

        self.A = learned(size.rank, weight.shape[1], axis=1 if self.is_row_parallel else None)
        self.B = learned(weight.shape[0], size.rank, axis=0 if is_column_parallel else None)

    def middle(self, x: Tensor, call: AdapterPass) -> Tensor:
        """`A x` of the tokens of `x`; of an input that is cut, this rank's share of the sum."""
        return product(self._dropped(x, call.noise_of(x)), self.A)

    def added(self, whole: Tensor, middle: Tensor, call: AdapterPass, key: str) -> Tensor:
        """`whole + scale * B middle` in the rows that are this adapter's; without gradient perhaps in place."""
        scaled, b = self.scaled(middle, call.canvas_of(middle)), self.B[self.rows]
        rows = call.rows_of(key, middle)
        if rows is None:
            return added_product(whole, scaled, b)
        return whole.index_copy_(0, rows, added_product(whole.index_select(0, rows), scaled.index_select(0, rows), b))

    def _dropped(self, x: Tensor, noise: Tensor | None) -> Tensor:
        """Dropout: whether an entry is kept is a function of the token's key, the linear and the feature."""
        if noise is None or not self.dropout:
            return x
        features = torch.arange(self._first_feature, self._first_feature + x.shape[1], device=x.device)
        kept = crossed_uniforms(noise, keyed_bits(self._key, features)) >= self.dropout
        return x * (kept.to(x.dtype) / (1.0 - self.dropout))


def add_to_products(
    products: list[Tensor], x: Tensor, linears: list[nn.Module], call: AdapterPass, is_whole: bool = False
) -> list[Tensor]:
    """Add what adapters have to products of all tokens, from this rank's tokens `x`, or all of them (`is_whole`)."""
    for index, linear in enumerate(linears):
        for key, adapter in adapters_of(linear, call.chosen):
            assert isinstance(adapter, Adapter)
            middle = adapter.middle(x, call)
            middle = middle if is_whole else gather_tokens(middle, adapter.group)
            products[index] = adapter.added(products[index], middle, call, key)
    return products


def row_product(linear: nn.Module, x: Tensor, call: AdapterPass | None) -> Tensor:
    """A row-parallel linear and its adapters: all tokens, features of this rank -> this rank's tokens."""
    product = linear(x)[0]
    if call is None:
        return product
    for key, adapter in adapters_of(linear, call.chosen):
        assert isinstance(adapter, Adapter)
        middle = adapter.middle(x, call)
        if adapter.group.size() > 1:
            middle = reduce_scatter_to_sequence_parallel_region(middle, group=adapter.group)
        product = adapter.added(product, middle, call, key)
    return product


def local_product(linear: nn.Module, product: Tensor, x: Tensor, call: AdapterPass | None) -> Tensor:
    """What adapters add to a product of any tokens by a weight that is whole on every rank."""
    if call is None:
        return product
    for key, adapter in adapters_of(linear, call.chosen):
        assert isinstance(adapter, Adapter)
        product = adapter.added(product, adapter.middle(x, call), call, key)
    return product


# -- experts ---------------------------------------------------------------------------------------------------------


class ExpertAdapter(_Sized):
    """The adapter of one of the two matrices of this rank's experts, as grouped products.

    One an expert: A [L, r, in], B [L, *out, r], cut over the experts, and along the width where the weight is. Shared:
    A [r, in], B [*out, r], whole on every rank, which reads its part of the width.
    """

    def __init__(
        self, size: AdapterSize, weight: Tensor, shard: Shard, groups: ProcessGroupCollection, is_input_cut: bool
    ) -> None:
        super().__init__(size)
        self.experts, self.group = weight.shape[0], groups.expt_tp
        self.is_input_cut = is_input_cut
        width = shard.cuts[1]
        self._span = shard.slices(tuple(weight.shape))[width.axis]
        of_expert = weight.shape[1:] if not size.shared else shard.full_shape(tuple(weight.shape))[1:]

        def learned(*shape: int, width_axis: int | None) -> nn.Parameter:
            leading = () if size.shared else (self.experts,)
            parameter = nn.Parameter(torch.empty(*leading, *shape, dtype=weight.dtype, device=weight.device))
            if size.shared:
                parameter.sequence_parallel = True  # type: ignore[attr-defined]
                return parameter
            if width_axis is None:
                declare(parameter, Shard((Cut(0, groups.ep.rank(), groups.ep.size()),), expert=True))
            else:
                declare(parameter, over_experts(groups, width_axis))
                parameter.tensor_model_parallel = groups.expt_tp.size() > 1  # type: ignore[attr-defined]
            parameter.allreduce = weight.allreduce  # type: ignore[attr-defined]
            return parameter

        *out, features = of_expert
        self.A = learned(size.rank, features, width_axis=2 if is_input_cut else None)
        self.B = learned(*out, size.rank, width_axis=None if is_input_cut else 2)

    def added(
        self, product: Tensor, x: Tensor, ends_L: Tensor, is_canvas: Tensor | bool, rows_R1: Tensor | None
    ) -> Tensor:
        """`product` [R, out] and what the adapter has, of rows [R, in] sorted by expert; widths may be padded.

        `rows_R1` bool are the rows that are this adapter's, None: all.
        """
        a, b = self._aligned(x.shape[1], product.shape[1])
        if x.shape[0] == 0:  # as in Experts
            return product + F.linear(F.linear(x, a[0]), b[0])
        middle = grouped_product(x, a.transpose(-2, -1), ends_L)
        padding = middle.shape[1] - self.size.rank
        if self.size.parts is not None and padding:
            middle = F.pad(self.scaled(middle[:, : self.size.rank], is_canvas), (0, padding))
        else:
            middle = self.scaled(middle, is_canvas)
        if rows_R1 is not None:
            middle = torch.where(rows_R1, middle, 0.0)
        return product + grouped_product(middle, b.transpose(-2, -1), ends_L)

    def of_experts(self) -> tuple[Tensor, Tensor]:
        """A [L, r, in] and B [L, *out, r] of this rank's experts."""
        a: Tensor = self.A
        b: Tensor = self.B
        if self.size.shared:
            a, b = (a[:, self._span], b) if self.is_input_cut else (a, b[:, self._span])
            return tuple(x.expand(self.experts, *x.shape).contiguous() for x in (a, b))  # type: ignore[return-value]
        if self.group.size() > 1:
            whole, cut = (b, a) if self.is_input_cut else (a, b)
            whole = copy_to_tensor_model_parallel_region(whole, group=self.group)
            a, b = (cut, whole) if self.is_input_cut else (whole, cut)
        return a, b

    def _aligned(self, features: int, outputs: int) -> tuple[Tensor, Tensor]:
        """A [L, r, in] and B [L, out, r] with rank and widths of whole 16-byte words, as the experts' are."""
        a, b = self.of_experts()
        missing = -self.size.rank % (16 // a.element_size())
        if missing or a.shape[2] != features:
            a = F.pad(a, (0, features - a.shape[2], 0, missing))
        if b.dim() == 4:  # gate and up
            rows = outputs // 2 - b.shape[2]
            b = (F.pad(b, (0, missing, 0, rows)) if missing or rows else b).flatten(1, 2)
        elif missing:
            b = F.pad(b, (0, missing))
        return a, b
