"""Arithmetic over a vocabulary that is cut over tensor parallelism, without a full-size temporary.

The logits of N positions over V ids are the largest tensors of this model (a canvas of 256 at V = 262144 is 268 MB in
float32). The sampler and the loss need only a few numbers a position, so one sweep over chunks of the vocabulary
computes product, softcap, log-sum-exp, entropy, arg-max, chunk masses and the soft embedding while a chunk lies in the
cache. What has gradient is in `loss.py`. Rows of the padded table beyond V are never multiplied: padding cannot leak.

In bfloat16 the soft embedding of a denoising step deviates from transformers on purpose: there the tempered logits are
rounded to bfloat16 before the softmax, which moves the signal by 4.6 % at T = 0.41; here only the weights are, 0.2 %.

Shapes: N positions, H hidden, v ids of this rank (the real ones), V ids in all, c ids of a chunk, k chunks of a rank.
Weight tables are `[v + padding, H]`, `first_id` is the id of the first row of this rank.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_diffgemma.diffusion.constraint import StepConstraint
from nemo_diffgemma.diffusion.sampler import choose_chunk, choose_inside
from nemo_diffgemma.model.row_products import add_product_, multiplied
from nemo_diffgemma.model.token_classes import ClassMaxima

CHUNK = 1024  # ids; a chunk of 256 positions is 1 MiB and stays in a core's cache (benchmarks/vocabulary.py)
POSITIONS = 256  # at a time on CPUs, so that it does for any number of positions; or up to twice as many: no short rest
GPU_CHUNK_BYTES = 32 << 20  # of float32 logits: 32768 ids of 256 positions; a GPU waits for launches, not for a cache


@dataclass(frozen=True)
class VocabularyShard:
    """The ids whose rows this rank holds: `[first_id, first_id + size)`; `size` may be 0 when only padding is left."""

    vocab_size: int
    first_id: int
    size: int
    group: Any  # tensor-parallel process group

    @staticmethod
    def of(vocab_size: int, padded: int, group: Any) -> VocabularyShard:
        rows = padded // group.size()
        first_id = group.rank() * rows
        return VocabularyShard(vocab_size, first_id, max(0, min(rows, vocab_size - first_id)), group)

    @property
    def parallel(self) -> bool:
        return self.group.size() > 1


@dataclass(frozen=True)
class Statistics:
    """What a denoising step needs of the tempered distribution, equal on every tensor-parallel rank.

    log_sum_exp_N, entropy_N (nats) float32; argmax_N, sample_N int64; soft_embedding_NH: expected row of the table
    under the distribution, in the table's dtype. allowed_nC int64: tokens of the classes that a constraint chooses, of
    its n sequences. The last three are None where not asked for.
    """

    log_sum_exp_N: Tensor
    entropy_N: Tensor
    argmax_N: Tensor
    sample_N: Tensor | None
    soft_embedding_NH: Tensor | None
    allowed_nC: Tensor | None = None


# -- statistics of a denoising step ----------------------------------------------------------------------------------


def statistics(
    hidden_NH: Tensor,
    weight: Tensor,
    shard: VocabularyShard,
    *,
    softcap: float,
    temperature: float | Tensor = 1.0,
    uniforms_N: Tensor | None = None,
    soft_embedding: bool = True,
    constraint: StepConstraint | None = None,
    locked_N: Tensor | None = None,
    chunk: int | None = None,
) -> Statistics:
    """Statistics of softmax(softcap * tanh(hidden @ weight.T / softcap) / temperature).

    `temperature` is a number, or a float64 tensor: [] or, one a position, [N, 1]. `sample_N` is the inverse CDF at
    `uniforms_N`: the smallest id whose cumulative probability exceeds the uniform. Gradient-free.

    Where `locked_N` [N] int64 has an id and not -1, all mass is on that id, whatever the logits (`diffusion.locked`).
    """
    with torch.no_grad():
        gain = softcap / temperature
        gain = gain.float() if isinstance(gain, Tensor) else gain
        sweep = _Sweep(
            hidden_NH, weight, shard, softcap, gain, chunk or chunk_of(hidden_NH), soft_embedding, constraint
        )
        maximum_NK, reference_NK, mass_NK, moment_NK = sweep.of_all_ranks()
        top_N1 = maximum_NK.amax(1, keepdim=True)
        scale_NK = torch.exp(reference_NK - top_N1)
        mass_NK, moment_NK = mass_NK * scale_NK, moment_NK * scale_NK
        total_N = mass_NK.sum(1)
        log_sum_exp_N = top_N1[:, 0] + total_N.log()
        entropy_N = (log_sum_exp_N - moment_NK.sum(1) / total_N).clamp_min(0.0)
        ids = sweep.search(maximum_NK, mass_NK, top_N1, uniforms_N)
        if locked_N is not None:
            ids = torch.where(locked_N < 0, ids, locked_N)
            entropy_N = torch.where(locked_N < 0, entropy_N, 0.0)
        soft_NH = sweep.soft_embedding(top_N1, total_N[:, None], weight, locked_N) if soft_embedding else None
        allowed_nC = None if sweep.class_maxima is None else sweep.class_maxima.tokens()
    return Statistics(log_sum_exp_N, entropy_N, ids[0], None if uniforms_N is None else ids[1], soft_NH, allowed_nC)


def chunk_of(hidden_NH: Tensor) -> int:
    """Ids at a time, where the caller does not say."""
    if hidden_NH.device.type == "cpu":
        return CHUNK
    return max(CHUNK, GPU_CHUNK_BYTES // (4 * hidden_NH.shape[0]) // 128 * 128)


def _tiles(hidden_NH: Tensor) -> list[slice]:
    """Positions that a chunk is computed for at a time. What a position gets does not depend on its tile."""
    positions = hidden_NH.shape[0]
    if hidden_NH.device.type != "cpu" or positions < 2 * POSITIONS:
        return [slice(0, positions)]
    starts = range(0, positions - POSITIONS + 1, POSITIONS)
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], positions], strict=True)]


class _Sweep:
    """One pass over the chunks of this rank; keeps the tempered logits for the two searches.

    Chunks are the leading axis of the buffers, so that the sweep and the searches touch contiguous memory. Ids that do
    not exist (the tail of the last real chunk, or all of a rank that holds only padding) have logit -inf and no mass.
    Mass and moment (sum of exp times logit) of a chunk are relative to a reference, the largest logit up to its end.
    """

    def __init__(
        self,
        hidden_NH: Tensor,
        weight: Tensor,
        shard: VocabularyShard,
        softcap: float,
        gain: float | Tensor,
        chunk: int,
        soft_embedding: bool,
        constraint: StepConstraint | None,
    ) -> None:
        self.shard, self.chunk = shard, min(chunk, weight.shape[0])
        self.chunks = -(-weight.shape[0] // self.chunk)
        positions, device = hidden_NH.shape[0], hidden_NH.device
        self.logits_kNc = _scratch((self.chunks, positions, self.chunk), device)
        self.numbers_4kN = torch.zeros(4, self.chunks, positions, dtype=torch.float32, device=device)
        self.numbers_4kN[:2] = MASKED_LOGIT  # maximum and reference of a rank without ids
        self._soft_NH = torch.zeros(hidden_NH.shape, dtype=torch.float32, device=device) if soft_embedding else None
        self._dtype = weight.dtype
        self.class_maxima: ClassMaxima | None = None
        if constraint is not None:
            self.class_maxima = ClassMaxima(constraint, shard, self.logits_kNc)
        self._run(hidden_NH, weight[: shard.size], softcap, gain)

    @property
    def _real_chunks(self) -> int:
        return -(-self.shard.size // self.chunk)

    def _run(self, hidden_NH: Tensor, weight: Tensor, softcap: float, gain: float | Tensor) -> None:
        tiles = _tiles(hidden_NH)
        exponentials = self.logits_kNc.new_empty(max(tile.stop - tile.start for tile in tiles), self.chunk)
        for index in range(self._real_chunks):
            rows = weight[index * self.chunk : (index + 1) * self.chunk]
            if rows.shape[0] < self.chunk:
                self.logits_kNc[index].fill_(-torch.inf)
            z_Nc = self.logits_kNc[index, :, : rows.shape[0]]
            for tile in tiles:
                of_tile = gain[tile] if isinstance(gain, Tensor) and gain.dim() else gain
                capped_logits(hidden_NH[tile], rows, softcap, of_tile, out=z_Nc[tile])
                self._add(index, tile, z_Nc[tile], exponentials[: tile.stop - tile.start, : rows.shape[0]], rows)
            if self.class_maxima is not None:
                self.class_maxima.add(index, z_Nc)

    def _add(self, index: int, tile: slice, z_nc: Tensor, e_nc: Tensor, rows: Tensor) -> None:
        """Maximum, reference, mass and moment of a chunk for some positions, and its part of their soft embedding."""
        maximum_n, reference_n, mass_n, moment_n = self.numbers_4kN[:, index, tile]
        before_n = self.numbers_4kN[1, max(0, index - 1), tile]  # of the first chunk its own: there is no sum yet
        torch.amax(z_nc, dim=1, out=maximum_n)
        torch.maximum(before_n, maximum_n, out=reference_n)
        torch.sub(z_nc, reference_n[:, None], out=e_nc).exp_()
        torch.sum(e_nc, dim=1, out=mass_n)
        if self._soft_NH is not None:
            self._add_soft(self._soft_NH[tile], e_nc, before_n[:, None], reference_n[:, None], rows)
        torch.sum(e_nc.mul_(z_nc), dim=1, out=moment_n)

    def _add_soft(self, soft_nH: Tensor, e_nc: Tensor, before_n1: Tensor, reference_n1: Tensor, rows: Tensor) -> None:
        """soft += e @ rows, so far relative to the reference before."""
        soft_nH.mul_((before_n1 - reference_n1).exp_())
        if rows.dtype == torch.float32:
            add_product_(soft_nH, e_nc, rows)
        else:  # transformers casts the probabilities to the dtype of the table as well
            soft_nH.add_(multiplied(e_nc.to(rows.dtype), rows))

    def soft_embedding(self, top_N1: Tensor, total_N1: Tensor, weight: Tensor, locked_N: Tensor | None) -> Tensor:
        """Expected table row over all ranks, [N, H] in the table's dtype; that of a locked id where there is one."""
        assert self._soft_NH is not None
        reference_N1 = self.numbers_4kN[1, max(0, self._real_chunks - 1), :, None]
        soft_NH = self._soft_NH.mul_(torch.exp(reference_N1 - top_N1) / total_N1)
        if locked_N is not None:
            own_N = locked_N - self.shard.first_id
            is_own_N1 = ((own_N >= 0) & (own_N < self.shard.size))[:, None]
            rows_NH = weight.index_select(0, own_N.clamp(0, weight.shape[0] - 1)).float()
            soft_NH = torch.where((locked_N < 0)[:, None], soft_NH, torch.where(is_own_N1, rows_NH, 0.0))
        if self.shard.parallel:
            dist.all_reduce(soft_NH, group=self.shard.group)
        return soft_NH.to(self._dtype)

    def of_all_ranks(self) -> Tensor:
        """Maximum, reference, mass and moment of the chunks of all ranks, [4, N, K], in order of ids."""
        numbers_4kN = self.numbers_4kN
        if self.shard.parallel:
            parts = numbers_4kN.new_empty(self.shard.group.size() * 4, *numbers_4kN.shape[1:])
            dist.all_gather_into_tensor(parts, numbers_4kN, group=self.shard.group)
            numbers_4kN = parts.unflatten(0, (-1, 4)).transpose(0, 1).flatten(1, 2)
        # sums over an axis with gaps add up in another order at the end of a vector of positions: a row's would depend
        # on how many there are
        return numbers_4kN.transpose(1, 2).contiguous()

    def search(self, maximum_NK: Tensor, mass_NK: Tensor, top_N1: Tensor, uniforms_N: Tensor | None) -> Tensor:
        """Id of the largest logit and, with uniforms, the smallest whose cumulative probability exceeds its uniform.

        [1 or 2, N]. The rank that holds the chunk where an id must lie finds it: all others have -1.
        """
        chunks = [maximum_NK.argmax(1)]  # the first of equal chunks holds the smallest id
        if uniforms_N is not None:
            chunk_N1, rest_N1 = choose_chunk(mass_NK, uniforms_N)
            chunks.append(chunk_N1[:, 0])
        local_PN = torch.stack(chunks) - self.shard.group.rank() * self.chunks
        positions = torch.arange(local_PN.shape[1], device=local_PN.device)
        z_PNc = self.logits_kNc[local_PN.clamp(0, self.chunks - 1), positions]
        inside = [z_PNc[0].argmax(1)]
        if uniforms_N is not None:
            inside.append(choose_inside(torch.exp(z_PNc[1] - top_N1), rest_N1)[:, 0])
        ids_PN = local_PN * self.chunk + (self.shard.first_id + torch.stack(inside))
        if not self.shard.parallel:
            return ids_PN
        ids_PN = torch.where((local_PN >= 0) & (local_PN < self.chunks), ids_PN, -1)
        dist.all_reduce(ids_PN, op=dist.ReduceOp.MAX, group=self.shard.group)
        return ids_PN


_REUSED = threading.local()


@contextmanager
def reused_scratch() -> Iterator[None]:
    """Sweeps of this thread inside the block share the memory of their logits, which is given back at its end.

    Fresh pages cost a tenth of a sweep on a CPU, and a denoising loop makes one a step; kept for longer, or shared by
    threads, gigabytes would stay for ever and two generations would write into the same logits.
    """
    outer = getattr(_REUSED, "buffers", None)
    _REUSED.buffers = {} if outer is None else outer
    try:
        yield
    finally:
        _REUSED.buffers = outer


def _scratch(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Memory for the logits of one sweep. None outlives `statistics`: two of a thread are never alive at once."""
    buffers = getattr(_REUSED, "buffers", None)
    if buffers is None or device.type == "cuda":  # torch keeps a GPU's memory itself, and that of CUDA graphs apart
        return torch.empty(shape, dtype=torch.float32, device=device)
    key = (shape, device, torch.is_inference_mode_enabled())  # tensors of inference mode are of no use outside it
    if key not in buffers:
        buffers.clear()
        buffers[key] = torch.empty(shape, dtype=torch.float32, device=device)
    return buffers[key]


MASKED_LOGIT = -1e30  # the maximum of no logits: finite, so that differences of it are too


def capped_logits(
    hidden_NH: Tensor, rows: Tensor, softcap: float, gain: float | Tensor, out: Tensor | None = None
) -> Tensor:
    """gain * tanh(hidden @ rows.T / softcap) in float32; the product itself is in the model's dtype."""
    if out is None:
        out = torch.empty(hidden_NH.shape[0], rows.shape[0], dtype=torch.float32, device=rows.device)
    if rows.dtype == torch.float32:
        multiplied(hidden_NH, rows.t(), out=out)
    else:
        out.copy_(multiplied(hidden_NH, rows.t()))
    return out.mul_(1.0 / softcap).tanh_().mul_(gain)


# -- logits and soft embeddings --------------------------------------------------------------------------------------


@torch.no_grad()
def logits(hidden_NH: Tensor, weight: Tensor, shard: VocabularyShard, softcap: float) -> Tensor:
    """Softcapped float32 logits [N, V] on every rank."""
    local_Nv = capped_logits(hidden_NH, weight[: shard.size], softcap, softcap)
    if not shard.parallel:
        return local_Nv
    padded = local_Nv.new_zeros(hidden_NH.shape[0], weight.shape[0])
    padded[:, : shard.size] = local_Nv
    parts = [torch.empty_like(padded) for _ in range(shard.group.size())]
    dist.all_gather(parts, padded, group=shard.group)
    return torch.cat(parts, dim=1)[:, : shard.vocab_size]


@torch.no_grad()
def soft_embedding_of_logits(logits_NV: Tensor, weight: Tensor, shard: VocabularyShard) -> Tensor:
    """Expected table row under softmax(logits), [N, H]; logits are first cast to the table's dtype, as HF does."""
    probabilities = logits_NV.to(weight.dtype).softmax(-1, dtype=torch.float32).to(weight.dtype)
    soft_NH = probabilities[:, shard.first_id : shard.first_id + shard.size] @ weight[: shard.size]
    if shard.parallel:
        dist.all_reduce(soft_NH, group=shard.group)
    return soft_NH
