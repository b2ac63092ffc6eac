"""The largest logit of each class of tokens, kept by the sweep over the vocabulary, and the token that has it.

The maxima are kept by parts of the vocabulary as well, so that a token is looked for in one part only. On a CPU a part
is a run of chunks, whose maxima stay in the cache, and positions are the last axis: a vector holds an id's logits at
many of them. On a GPU a part is every `PARTS`-th id, because the threads of a warp, which look at neighbouring ids,
should not wait for each other's maximum of a large class.

Of equal logits the smallest id wins on a CPU; on a GPU the smallest of the first part that has one. Both are the same
in every layout. Shapes: B sequences, n of them constrained, C canvas positions, K classes, P parts, V ids in all and v
on this rank, N = B * C positions, k chunks of c ids.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from nemo_diffgemma.diffusion.constraint import StepConstraint

PARTS = 32


class ClassMaxima:
    """Those of the constrained sequences of one sweep over the logits `[k, N, c]` of this rank."""

    def __init__(
        self, constraint: StepConstraint, shard: Any, logits_kNc: Tensor, interleaved: bool | None = None
    ) -> None:
        self._constraint, self._shard, self._logits_kNc = constraint, shard, logits_kNc
        classes, device = constraint.classes, logits_kNc.device
        self._interleaved = device.type == "cuda" if interleaved is None else interleaved
        self._ids = slice(shard.first_id, shard.first_id + shard.size)
        self._class_nv = constraint.class_of_id_nV[:, self._ids].long()
        self._cells_nC = constraint.cells_nC
        rows, length = self._cells_nC.shape
        if self._interleaved:  # parts by id, not by its place on this rank
            ids = torch.arange(shard.first_id, shard.first_id + shard.size, device=device)
            self._index_nv = self._class_nv + ids % PARTS * classes
        else:
            self._index_nv = self._class_nv + torch.arange(rows, device=device)[:, None] * classes
        sizes = (rows, length, PARTS * classes) if self._interleaved else (PARTS, rows * classes, length)
        self._parts = torch.full(sizes, -torch.inf, dtype=torch.float32, device=device)
        self._chunks_of_part = -(-len(logits_kNc) // PARTS)

    def add(self, index: int, z_Nc: Tensor) -> None:
        """Take the logits of chunk `index`, [N, its ids]."""
        rows, length = self._cells_nC.shape
        if z_Nc.shape[0] > length:  # else the cells are those of the one canvas that there is
            z_Nc = z_Nc.index_select(0, self._cells_nC.flatten())
        z_nCc = z_Nc.unflatten(0, (rows, length))
        first = index * self._logits_kNc.shape[2]
        index_nc = self._index_nv[:, first : first + z_nCc.shape[2]]
        if self._interleaved:
            self._parts.scatter_reduce_(2, index_nc[:, None].expand(z_nCc.shape), z_nCc, "amax")
        else:
            part, z_xC = self._parts[index // self._chunks_of_part], _by_id(z_nCc).flatten(0, 1)
            part.scatter_reduce_(0, index_nc.reshape(-1, 1).expand(z_xC.shape), z_xC, "amax")

    def tokens(self) -> Tensor:
        """The tokens that the constraint chooses, [n, C] int64, the same on every tensor-parallel rank."""
        if self._interleaved:
            parts_PnCK = self._parts.unflatten(2, (PARTS, -1)).permute(2, 0, 1, 3)
            maxima_nCK = parts_PnCK.amax(0)
            self._of_all_ranks(maxima_nCK)
        else:
            parts_PnKC = self._parts.unflatten(1, (len(self._cells_nC), -1))
            maxima_nKC = parts_PnKC.amax(0)
            self._of_all_ranks(maxima_nKC)
            parts_PnCK, maxima_nCK = parts_PnKC.transpose(2, 3), maxima_nKC.transpose(1, 2)
        class_nC1 = self._constraint.choose(maxima_nCK)[..., None]
        top_nC1 = maxima_nCK.gather(2, class_nC1)
        has_PnC = (parts_PnCK.gather(3, class_nC1.expand(PARTS, *class_nC1.shape)) == top_nC1)[..., 0]
        return self._search(class_nC1, top_nC1, has_PnC.int().argmax(0))

    def _of_all_ranks(self, maxima: Tensor) -> None:
        if self._shard.parallel:
            dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=self._shard.group)

    def _search(self, class_nC1: Tensor, top_nC1: Tensor, part_nC: Tensor) -> Tensor:
        """The first token of part `part_nC` that is of the class and has the logit `top_nC1`, of all ranks."""
        size, chunk = self._shard.size, self._logits_kNc.shape[2]
        if size == 0:
            return self._first_of_all(torch.zeros_like(part_nC), torch.full_like(part_nC, PARTS))
        device = part_nC.device
        rows_n1 = torch.arange(len(part_nC), device=device)[:, None]
        stream_nC1 = self._cells_nC[..., None]
        if self._interleaved:
            first_nC1 = (part_nC[..., None] - self._shard.first_id) % PARTS
            place_nCW = first_nC1 + torch.arange(-(-size // PARTS) + 1, device=device) * PARTS
            near_nCW = place_nCW.clamp_max(size - 1)
            z_nCW = self._logits_kNc[near_nCW // chunk, stream_nC1, near_nCW % chunk]
            class_nCW = self._class_nv[rows_n1[..., None], near_nCW].masked_fill_(place_nCW >= size, -1)
            apart = PARTS
        else:  # whole chunks, which are copied fast
            first_nC1 = part_nC[..., None] * (self._chunks_of_part * chunk)
            chunk_nCJ = part_nC[..., None] * self._chunks_of_part + torch.arange(self._chunks_of_part, device=device)
            chunk_nCJ = chunk_nCJ.clamp_max(len(self._logits_kNc) - 1)  # repeated, behind the place of the first
            z_nCW = self._logits_kNc[chunk_nCJ, stream_nC1].flatten(2)
            missing = len(self._logits_kNc) * chunk - size
            class_nkc = F.pad(self._constraint.class_of_id_nV[:, self._ids], (0, missing), value=-1)
            class_nCW = class_nkc.unflatten(1, (-1, chunk))[rows_n1[..., None], chunk_nCJ].flatten(2)
            apart = 1
        is_it_nCW = (class_nCW == class_nC1) & (z_nCW == top_nC1)
        found_nC1 = is_it_nCW.view(torch.uint8).argmax(2, keepdim=True)
        ids_nC = (first_nC1 + found_nC1 * apart)[..., 0] + self._shard.first_id
        is_here_nC = is_it_nCW.gather(2, found_nC1)[..., 0]
        return self._first_of_all(ids_nC, torch.where(is_here_nC, part_nC if self._interleaved else 0, PARTS))

    def _first_of_all(self, ids_nC: Tensor, order_nC: Tensor) -> Tensor:
        """Of the ranks' tokens the one that comes first: a rank without one has the order `PARTS`."""
        if not self._shard.parallel:
            return ids_nC
        keys_nC = order_nC * self._shard.vocab_size + ids_nC
        dist.all_reduce(keys_nC, op=dist.ReduceOp.MIN, group=self._shard.group)
        return keys_nC % self._shard.vocab_size


def _by_id(z_nCc: Tensor) -> Tensor:
    """The transpose [n, c, C], contiguous.

    That is what a shuffle of channels does to an image of one pixel, with vector instructions: in less than half the
    time of `contiguous` (benchmarks/README.md).
    """
    rows, positions, ids = z_nCc.shape
    pixel = z_nCc.reshape(rows, 1, 1, positions * ids).permute(0, 3, 1, 2)  # channels are the last in memory
    return torch.channel_shuffle(pixel, positions).permute(0, 2, 3, 1).reshape(rows, ids, positions)
