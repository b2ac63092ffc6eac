"""The weights of the graphs: which part of which tensor of a checkpoint becomes which engine input, on which rank.

Inputs are named like the tensors of the released layout. The same list says how to slice for tensor and expert
parallelism, so every rank's weights come from the same unsliced files. `weights.json` of a bundle is this list.

Rank r of a layout: expert-tensor parallelism is innermost, as in Megatron-Core. All ranks see the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_diffgemma.checkpoint.tensor_files import CheckpointError, TensorFiles
from nemo_diffgemma.config import GLOBAL, ModelConfig
from nemo_diffgemma.errors import UserError
from nemo_diffgemma.non_finite import is_finite
from nemo_diffgemma.parallel.layout import LayoutError, ParallelLayout

DECODER, ENCODER = "model.decoder.", "model.encoder.language_model."
TABLE = DECODER + "embed_tokens.weight"
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")

Span = tuple[int, int]


class WeightsError(UserError):
    """Weights that do not fit the graphs; the message names the tensor and what to do."""


@dataclass(frozen=True)
class Weight:
    """One engine input: `tensor.view(view)[spans of the rank].permute(permute).reshape(shape)`, zero rows appended.

    `stored` is the shape of the tensor `key` on disk, `view` splits axes of it, `spans` holds (start, end) of every
    axis of `view` for every rank, `shape` is that of the input, equal on all ranks; rows that a rank lacks (the end of
    a vocabulary) are zero.
    """

    key: str
    stored: tuple[int, ...]
    view: tuple[int, ...]
    spans: tuple[tuple[Span, ...], ...]
    permute: tuple[int, ...]
    shape: tuple[int, ...]

    def of_rank(self, stored: Any, rank: int) -> Tensor:
        """The input of one rank from a tensor, or a lazy safetensors slice of which only the needed rows are read."""
        spans = self.spans[rank]
        if isinstance(stored, Tensor):
            part = stored.view(self.view)
        else:  # the leading axis is cut while reading
            start, end = spans[0]
            if start == end:  # nothing of the vocabulary is left for this rank
                return torch.zeros(self.shape)
            part = stored[start:end].view(end - start, *self.view[1:])
            spans = ((0, end - start), *spans[1:])
        part = part[tuple(slice(*span) for span in spans)].permute(self.permute)
        missing = prod(self.shape) - part.numel()
        part = part.reshape(-1)
        if missing:
            part = torch.cat([part, part.new_zeros(missing)])
        return part.reshape(self.shape).contiguous()

    @property
    def is_whole(self) -> bool:
        """Whether the input is the tensor as it lies on disk, so that a graph may point into the file."""
        return prod(self.shape) == prod(self.stored) and self.permute == tuple(range(len(self.view)))

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Weight:
        """What `dataclasses.asdict` has become in a JSON file."""
        spans = tuple(tuple((start, end) for start, end in rank) for rank in entry["spans"])
        shapes = {name: tuple(entry[name]) for name in ("stored", "view", "permute", "shape")}
        return cls(key=entry["key"], spans=spans, **shapes)


def check_layout(layout: ParallelLayout, config: ModelConfig) -> None:
    """Raise `LayoutError` where engines cannot be cut like this."""
    layout.check(config)
    experts = layout.expert * layout.expert_tensor
    if layout.tensor not in (1, layout.world_size) or experts not in (1, layout.world_size):
        raise LayoutError(
            f"layout {layout} has {layout.world_size} ranks; in engines every rank holds an equal part: let tensor be "
            f"1 or {layout.world_size}, and expert * expert_tensor as well (replicas are separate engines)"
        )


def engine_weights(config: ModelConfig, layout: ParallelLayout, experts: str = "sparse") -> dict[str, Weight]:
    """Every weight that the graphs may read, by input name; `experts` is one of `export.graph.experts.FORMS`."""
    return dict(_all(config, layout, experts))


def key_value_heads(heads: int, layout: ParallelLayout, rank: int) -> Span:
    """(first, end) of a layer's key/value heads on a rank; one, shared, where there are more ranks than heads."""
    if heads % layout.tensor:
        head = rank % layout.tensor // (layout.tensor // heads)
        return head, head + 1
    return _part(heads, layout.tensor, rank % layout.tensor)


def _all(config: ModelConfig, layout: ParallelLayout, experts: str) -> Iterator[tuple[str, Weight]]:
    world, tensor = layout.world_size, layout.tensor
    hidden, width = config.hidden_size, config.intermediate_size

    def weight(key: str, *view: int, cut: int | None = None) -> tuple[str, Weight]:
        """A tensor as it is, `cut` over tensor parallelism along one axis."""
        spans = []
        for rank in range(world):
            whole = [(0, size) for size in view]
            if cut is not None:
                whole[cut] = _part(view[cut], tensor, rank % tensor)
            spans.append(tuple(whole))
        return key, _plain(key, view, spans)

    def key_value(key: str, heads: int, head_dim: int) -> tuple[str, Weight]:
        held = [key_value_heads(heads, layout, rank) for rank in range(world)]
        spans: list[tuple[Span, ...]] = [((a * head_dim, b * head_dim), (0, hidden)) for a, b in held]
        return key, _plain(key, (heads * head_dim, hidden), spans)

    yield TABLE, _table(config, layout)
    for name in ("norm.weight", "self_conditioning.pre_norm.weight"):
        yield weight(DECODER + name, hidden)
    for prefix in ("self_conditioning.", *(f"layers.{i}.mlp." for i in range(config.num_hidden_layers))):
        for name in ("gate_proj", "up_proj"):
            yield weight(f"{DECODER}{prefix}{name}.weight", width, hidden, cut=0)
        yield weight(f"{DECODER}{prefix}down_proj.weight", hidden, width, cut=1)
    for i in range(config.num_hidden_layers):
        prefix, (head_dim, kv_heads) = f"{DECODER}layers.{i}.", config.heads(i)
        queries = config.num_attention_heads * head_dim
        yield weight(prefix + "self_attn.q_proj.weight", queries, hidden, cut=0)
        yield key_value(prefix + "self_attn.k_proj.weight", kv_heads, head_dim)
        if config.layer_kind(i) != GLOBAL:
            yield key_value(prefix + "self_attn.v_proj.weight", kv_heads, head_dim)
        yield weight(prefix + "self_attn.o_proj.weight", hidden, queries, cut=1)
        for name in ("q_norm", "k_norm"):
            yield weight(f"{prefix}self_attn.{name}.weight", head_dim)
        for name in NORMS:
            yield weight(f"{prefix}{name}.weight", hidden)
        yield weight(prefix + "router.proj.weight", config.num_experts, hidden)
        yield weight(prefix + "router.scale", hidden)
        yield weight(prefix + "router.per_expert_scale", config.num_experts)
        yield from _experts(prefix, config, layout, experts)
        yield weight(prefix + "layer_scalar", 1)
        yield weight(f"{ENCODER}layers.{i}.layer_scalar", 1)


NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    "post_feedforward_layernorm_1",
    "pre_feedforward_layernorm_2",
    "post_feedforward_layernorm_2",
)


def _table(config: ModelConfig, layout: ParallelLayout) -> Weight:
    """Token table, cut into equal runs of ids; what the last ranks lack of a run is zero and never chosen."""
    rows, size, hidden = -(-config.vocab_size // layout.tensor), config.vocab_size, config.hidden_size
    spans = []
    for rank in range(layout.world_size):
        start = min(rank % layout.tensor * rows, size)
        spans.append(((start, min(start + rows, size)), (0, hidden)))
    return Weight(TABLE, (size, hidden), (size, hidden), tuple(spans), (0, 1), (rows, hidden))


def _experts(prefix: str, config: ModelConfig, layout: ParallelLayout, form: str) -> Iterator[tuple[str, Weight]]:
    """All experts of a rank: [E, 2 * W, H] and [E, H, W], or dense as two matrices, [E * 2 * W, H] and [H, E * W].

    The first lie like that on disk. The last does not; like this the sum over experts happens inside one product.
    """
    experts, width, hidden = config.num_experts, config.moe_intermediate_size, config.hidden_size
    up, down = [], []
    for rank in range(layout.world_size):
        mine = _part(experts, layout.expert, rank // layout.expert_tensor % layout.expert)
        part = _part(width, layout.expert_tensor, rank % layout.expert_tensor)
        up.append((mine, (0, 2), part, (0, hidden)))
        down.append((mine, (0, hidden), part))
    count, columns = experts // layout.expert, width // layout.expert_tensor
    shapes = (count, 2 * columns, hidden), (count, hidden, columns)
    if form == "dense":
        shapes = (count * 2 * columns, hidden), (hidden, count * columns)
    orders = (0, 1, 2, 3), (1, 0, 2) if form == "dense" else (0, 1, 2)
    gate_up, key = prefix + EXPERTS[0], prefix + EXPERTS[1]
    on_disk = (experts, 2 * width, hidden), (experts, hidden, width)
    yield gate_up, Weight(gate_up, on_disk[0], (experts, 2, width, hidden), tuple(up), orders[0], shapes[0])
    yield key, Weight(key, on_disk[1], on_disk[1], tuple(down), orders[1], shapes[1])


def _plain(key: str, view: tuple[int, ...], spans: list[tuple[Span, ...]]) -> Weight:
    shape = tuple(end - start for start, end in spans[0])
    return Weight(key, view, view, tuple(spans), tuple(range(len(view))), shape)


def _part(size: int, parts: int, index: int) -> Span:
    return size // parts * index, size // parts * (index + 1)


# -- on disk -----------------------------------------------------------------------------------------------------------


def read_weights(
    checkpoint: Path, weights: Mapping[str, Weight], rank: int, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Inputs of a rank from a released-format directory, one after the other. Raises `WeightsError`."""
    try:
        with TensorFiles(checkpoint) as files:
            for name, weight in weights.items():
                tensor = weight.of_rank(stored_slice(files, weight), rank).to(dtype)
                if not is_finite(tensor):
                    raise WeightsError(
                        f"{weight.key} in {checkpoint} holds NaN or infinity as {dtype}: the checkpoint is damaged, or "
                        "has values too large for this type; use another, or dtype=bfloat16"
                    )
                yield name, tensor
    except CheckpointError as error:
        raise WeightsError(str(error)) from None


def stored_slice(files: Any, weight: Weight) -> Any:
    """The tensor on disk of a weight, lazily. Raises `WeightsError` where its shape is another."""
    stored = files.slice(weight.key)
    shape, expected = tuple(stored.get_shape()), weight.stored
    if shape != expected:
        raise WeightsError(
            f"tensor {weight.key} in {files.directory} has shape {list(shape)}, but the engines were built for "
            f"{list(expected)}; build the engines from this checkpoint"
        )
    return stored


def check_tensors(checkpoint: Path, weights: Mapping[str, Weight]) -> None:
    """Raise `WeightsError` unless every tensor is there and has the right shape; reads headers only."""
    try:
        with TensorFiles(checkpoint) as files:
            for weight in weights.values():
                stored_slice(files, weight)
    except CheckpointError as error:
        raise WeightsError(str(error)) from None
