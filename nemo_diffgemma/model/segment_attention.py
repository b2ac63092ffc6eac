"""Attention of a stream, scale 1, without any `[T, keys]` tensor; `attend` hides which kernel runs.

Segments of equal geometry (as many queries, as many context keys) run as one batch of torch's
`scaled_dot_product_attention`; where a stream is one such batch of canvases, or of whole prompts, nothing of it is
copied but for the keys of the context and of the canvas, which have to lie together. On CUDA all other streams are one
call of FlexAttention a layer, whose keys are those of all contexts and then those of all canvases.

Shapes: T tokens of the stream, N query heads, G key/value heads, D head width (heads of this rank), m segments of a
group, C queries of each, K keys of each.
"""

from __future__ import annotations

import functools
import itertools
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nemo_diffgemma.model.cache import KeyValue, extended
from nemo_diffgemma.model.paged import PagedLayer
from nemo_diffgemma.model.row_products import BLOCK, any_kernel
from nemo_diffgemma.model.segments import FixedStream, Kind, Stream, parts
from nemo_diffgemma.model.visibility import TILE, Group, Visibility

_COMPILATIONS = 64  # of FlexAttention, at most
_QUERY_BLOCK = 512  # rows of a causal mask at a time, where a mask is needed at all
_LEAST_BLOCK = 64  # rows of a window's mask, however narrow the window is


class Kernel(Enum):
    """What computes the attention of one layer."""

    GROUPS = "scaled_dot_product_attention of each group"
    GROUPS_REPEATED_HEADS = "the same, with the key heads of causal groups repeated for each query head"
    FLEX = "flex_attention of the whole stream"


def choose_kernel(device_type: str, dtype: torch.dtype, head_dim: int, uniform: bool) -> Kernel:
    """The kernel for a layer; `uniform` says that the stream is one unmasked group of each kind.

    Grouped heads on CUDA: flash attention takes them up to a width of 256 in half precision, without a mask; torch's
    memory-efficient kernel never does, and what is left is the math kernel, which holds `[heads, T, keys]`. Repeated
    heads run in the memory-efficient one. FlexAttention takes powers of two from 16 up.
    """
    if device_type != "cuda":
        return Kernel.GROUPS
    if not uniform and head_dim >= 16 and head_dim & (head_dim - 1) == 0:
        return Kernel.FLEX
    if uniform and head_dim <= 256 and dtype in (torch.bfloat16, torch.float16):
        return Kernel.GROUPS
    return Kernel.GROUPS_REPEATED_HEADS


def attend(
    q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor, stream: Stream, window: int | None, past: KeyValue | PagedLayer | None
) -> tuple[Tensor, KeyValue | PagedLayer]:
    """Attention of every token of the stream -> `[T, N*D]`, and the keys of cached plus new context.

    Padding sees nothing: its rows are zero. A paged layer is written to and comes back as it is.
    """
    if isinstance(stream, FixedStream):
        assert isinstance(past, KeyValue)
        return attend_in_columns(q_TND, k_TGD, v_TGD, stream, window, past), past
    result: KeyValue | PagedLayer
    if isinstance(past, PagedLayer):
        context, result = past.extended(k_TGD, v_TGD, stream), past
    else:
        context = result = extended(past, k_TGD, v_TGD, stream)
    visibility = Visibility.of(stream, window, context.kept)
    kernel = choose_kernel(q_TND.device.type, q_TND.dtype, q_TND.shape[2], visibility.is_uniform)
    if kernel is Kernel.FLEX:
        return attend_as_one(q_TND, k_TGD, v_TGD, visibility, context), result
    repeat = kernel is Kernel.GROUPS_REPEATED_HEADS
    return attend_by_groups(q_TND, k_TGD, v_TGD, visibility, context, repeat), result


# -- groups ------------------------------------------------------------------------------------------------------------


def attend_by_groups(
    q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor, visibility: Visibility, context: KeyValue, repeat_heads: bool
) -> Tensor:
    """One batch of `scaled_dot_product_attention` for each group of equal geometry; longer causal ones in blocks."""
    pieces, groups = [], visibility.groups
    queries, seen = [group.queries for group in groups], [group.keys for group in groups]
    canvases = [group.queries for group in groups if group.kind is Kind.CANVAS]
    q_of_group, own_k, own_v = (iter(parts(*args)) for args in ((q_TND, queries), (k_TGD, canvases), (v_TGD, canvases)))
    for group, q_mCND, keys, values in zip(
        groups, q_of_group, parts(context.keys, seen), parts(context.values, seen), strict=True
    ):
        q_mNCD = q_mCND.transpose(1, 2)
        if group.kind is Kind.CANVAS:
            keys, values = torch.cat([keys, next(own_k)], dim=1), torch.cat([values, next(own_v)], dim=1)
            out = _all_keys(q_mNCD, keys.transpose(1, 2), values.transpose(1, 2))
        else:
            out = _causal(q_mNCD, keys.transpose(1, 2), values.transpose(1, 2), group, visibility, repeat_heads)
        pieces.append(out.transpose(1, 2).flatten(2).flatten(0, 1))
    out = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    order = visibility.order(out.device)
    if order is not None:
        out = out.index_select(0, order)
    padding = visibility.stream.padding
    return F.pad(out, (0, 0, 0, padding)) if padding else out


def attend_in_columns(
    q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor, stream: FixedStream, window: int | None, columns: KeyValue
) -> Tensor:
    """Attention of one canvas a row, whose keys and values take the last columns of buffers [m, K, G, D]."""
    rows, length = len(stream.canvases), stream.canvases[0].length

    def of_rows(x: Tensor) -> Tensor:
        return x[: rows * length].view(rows, length, *x.shape[1:])

    for buffer, new in ((columns.keys, k_TGD), (columns.values, v_TGD)):
        buffer[:, buffer.shape[1] - length :] = of_rows(new)
    keys, values = columns.keys.transpose(1, 2), columns.values.transpose(1, 2)
    out = _all_keys(of_rows(q_TND).transpose(1, 2), keys, values, stream.masks[window])
    out = out.transpose(1, 2).flatten(2).flatten(0, 1)
    return F.pad(out, (0, 0, 0, stream.padding)) if stream.padding else out


def _all_keys(q_mNCD: Tensor, k_mGKD: Tensor, v_mGKD: Tensor, mask: Tensor | None = None) -> Tensor:
    """All queries see the same keys (`mask` [m, 1, 1, K]), so the query heads of a key head are just more queries."""
    m, heads, length, width = q_mNCD.shape
    q = q_mNCD.reshape(m, k_mGKD.shape[1], -1, width)
    # not a view: the memory-efficient kernel gives its output in an order of its own
    return _attention(q, k_mGKD, v_mGKD, mask).reshape(m, heads, length, width)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, grouped: bool = False) -> Tensor:
    """`mask` is of all queries, or of one for all. Where bits of a row must be its own, few queries are padded, and a
    matrix that stands alone gets company: one thread computes each of several, and all of them together a single one.
    """
    m, heads, queries, _ = q.shape
    if not any_kernel(q.device):
        if queries < BLOCK:
            more = BLOCK - queries
            q = F.pad(q, (0, 0, 0, more))
            if mask is not None and mask.shape[-2] > 1:
                mask = torch.cat([mask, mask[-1:].expand(more, -1)])
        if m * heads == 1:
            q, k, v = (x.expand(2, -1, -1, -1) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0, enable_gqa=grouped)
    return out[:m, :, :queries]


def _causal(q: Tensor, k: Tensor, v: Tensor, group: Group, visibility: Visibility, repeat_heads: bool) -> Tensor:
    """Causal attention of [m, N, C, D] queries, the first of which stands `group.ahead` keys after the first key."""
    if repeat_heads and k.shape[1] < q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    grouped = k.shape[1] < q.shape[1]
    in_tiles = q.device.type == "cpu" and not torch.is_grad_enabled()
    if not in_tiles and not visibility.needs_mask(group):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0, enable_gqa=grouped)
    queries, ahead, window = q.shape[2], group.ahead, visibility.window
    if in_tiles:
        edges = [0, *range((-group.in_tile - 1) % TILE + 1, queries, TILE), queries]
    else:
        window = window if window is not None and k.shape[2] > window else None
        block = _QUERY_BLOCK if window is None else max(window, _LEAST_BLOCK)
        if window is not None and ahead == 0 and queries > block:
            return _in_windows(q, k, v, window, block)
        edges = [*range(0, queries, block), queries]
    outs = []
    for start, end in itertools.pairwise(edges):
        low = 0 if window is None else max(0, ahead + start - window + 1)
        mask = _band(end - start, ahead + start - low, window, q.device)
        keys = slice(low, ahead + end)
        outs.append(_attention(q[:, :, start:end], k[:, :, keys], v[:, :, keys], mask, grouped))
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)


def _in_windows(q: Tensor, k: Tensor, v: Tensor, window: int, block: int) -> Tensor:
    """Causal attention over a window of at most `block` keys, as one batch of blocks that see two blocks of keys each.

    A slice for every block would have a gradient of the size of all keys: cost by the square of the length.
    """
    rows, length, gqa = q.shape[0], q.shape[2], k.shape[1] < q.shape[1]
    q, k, v = (F.pad(x, (0, 0, 0, -length % block)).unflatten(2, (-1, block)) for x in (q, k, v))
    own = _band(block, 0, window, q.device)
    first = F.scaled_dot_product_attention(q[:, :, 0], k[:, :, 0], v[:, :, 0], own, scale=1.0, enable_gqa=gqa)
    k, v = (torch.cat([x[:, :, :-1], x[:, :, 1:]], dim=3) for x in (k, v))
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q[:, :, 1:], k, v))
    band = _band(block, block, window, q.device)
    rest = F.scaled_dot_product_attention(q, k, v, band, scale=1.0, enable_gqa=gqa)
    rest = rest.unflatten(0, (rows, -1)).transpose(1, 2).flatten(2, 3)
    return torch.cat([first, rest], dim=2)[:, :, :length]


@functools.lru_cache(maxsize=64)
def _band(queries: int, ahead: int, window: int | None, device: torch.device) -> Tensor:
    """[queries, ahead + queries] bool: key not after the query and, with a window, among its last `window` keys."""
    with torch.inference_mode(False):  # kept for passes with gradient
        keys = torch.arange(ahead + queries, device=device)
        distance = keys[ahead:, None] - keys
        return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


# -- one call ----------------------------------------------------------------------------------------------------------


def attend_as_one(q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor, visibility: Visibility, context: KeyValue) -> Tensor:
    """One call of FlexAttention over the keys of all contexts and then of all canvases."""
    stream = visibility.stream
    canvases = slice(stream.context_tokens, stream.context_tokens + stream.canvas_tokens)

    def keys(of_context: Tensor, of_stream: Tensor) -> Tensor:
        flat = torch.cat([of_context, of_stream[canvases]]) if stream.canvases else of_context
        return flat[None].transpose(1, 2)

    out = _flex_attention(q_TND.device.type)(
        q_TND[None].transpose(1, 2),
        keys(context.keys, k_TGD),
        keys(context.values, v_TGD),
        block_mask=visibility.block_mask(q_TND.device),
        scale=1.0,
        enable_gqa=k_TGD.shape[1] < q_TND.shape[1],
        kernel_options=flex_options(q_TND.dtype, q_TND.shape[2]),
    )
    return out.transpose(1, 2).flatten(2)[0]


@functools.cache
def _flex_attention(device_type: str) -> Any:
    """Compiled for CUDA; as it is on a CPU, where only tests call it (it has no backward there).

    One compilation serves all lengths but 1 of each axis, and there are two widths, with and without gradient: more
    than the 8 after which torch would go on uncompiled, with all scores in memory. Where 64 are not enough it is an
    error.
    """
    from torch.nn.attention.flex_attention import flex_attention  # loads torch's compiler

    if device_type != "cuda":
        return flex_attention
    # the argument is missing in the overloads of torch 2.13
    return torch.compile(flex_attention, dynamic=True, fullgraph=True, recompile_limit=_COMPILATIONS)  # type: ignore[call-overload]


def flex_options(dtype: torch.dtype, head_dim: int) -> dict[str, Any]:
    """Options of its Triton kernel. torch's own blocks need more shared memory than GPUs have for heads above 256.

    Bytes in shared memory: head_dim * element * (queries + 2 * keys), at 512 96 KB in either precision.
    """
    options: dict[str, Any] = {"BACKEND": "TRITON"}  # not its decoding kernel for short streams: one order of sums
    if head_dim > 256:
        block = 16 if dtype == torch.float32 else 32
        options |= {"fwd_BLOCK_M": block, "fwd_BLOCK_N": block, "num_stages": 1}
    return options
