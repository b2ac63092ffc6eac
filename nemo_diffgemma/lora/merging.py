"""An adapter and its base as one checkpoint, block by block: what conversion reads instead of the base alone.

`W + scale * B A` is made in float32 and rounded once, to the dtype of the base. Weights that encoder and decoder share
are one tensor on the disk, so they are merged once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_diffgemma.checkpoint.stored import StoredTensor
from nemo_diffgemma.lora import base as bases
from nemo_diffgemma.lora.attach import check_mergeable
from nemo_diffgemma.lora.peft_files import CONFIG, WEIGHTS, AdapterDirectory, Pair
from nemo_diffgemma.lora.targets import DECODER, EXPERTS
from nemo_diffgemma.model.adapter_size import AdapterSize
from nemo_diffgemma.parallel.agreement import all_or_none, world_size


@dataclass(frozen=True)
class MergedTensor(StoredTensor):
    """A weight of the base, in released or in our shape, with what an adapter adds to it."""

    adapter: AdapterDirectory
    module: str
    size: AdapterSize
    experts: int

    def rows(self, start: int, stop: int) -> Tensor:
        weight = super().rows(start, stop)
        pair = self._pair(start, stop)
        delta = self.size.scale * (pair.B.float() @ pair.A.float())
        return (weight.float() + delta.reshape(weight.shape)).to(weight.dtype)

    def _pair(self, start: int, stop: int) -> Pair:
        """A and B of these rows: of a linear's outputs, or of these experts."""
        pair = self.adapter.pair(self.module, self.size, self.experts)
        if self.module.endswith(EXPERTS):
            return Pair(pair.A[start:stop], pair.B[start:stop])
        return Pair(pair.A, pair.B[start:stop])


def merged(
    tensors: dict[str, StoredTensor], adapter: AdapterDirectory, sizes: dict[str, AdapterSize], experts: int
) -> dict[str, StoredTensor]:
    """The tensors of a base by released name, those that have adapters with what these add.

    Raises `ConfigurationError` for an adapter that differs between encoder and decoder.
    """
    with_adapters = dict(tensors)
    for module, size in sizes.items():
        check_mergeable(module, size)
        name = DECODER + module + ("" if module.endswith(EXPERTS) else ".weight")
        of_base = tensors[name]
        with_adapters[name] = MergedTensor(of_base.shape, of_base.dtype, of_base.parts, adapter, module, size, experts)
    return with_adapters


def files_of(directory: Path) -> list[Path]:
    """What a merged checkpoint depends on, beside its base."""
    return [directory / CONFIG, directory / WEIGHTS]


def check_base(tensors: dict[str, StoredTensor], adapter: AdapterDirectory, base: Any) -> None:
    """Read the base and compare its fingerprint, each rank a share. Collective; raises `CheckpointError`."""
    if not adapter.fingerprint:
        return
    names, rank = sorted(tensors), dist.get_rank() if dist.is_initialized() else 0
    sums = torch.zeros(len(names), dtype=torch.int64)
    with all_or_none():
        for index in range(rank, len(names), world_size()):
            tensor = tensors[names[index]]
            for rows in tensor.blocks():
                sums[index] += bases.bits_of(StoredTensor.rows(tensor, *rows))
    if dist.is_initialized():
        dist.all_reduce(sums)
    with all_or_none():
        found = bases.of_sums(dict(zip(names, sums.tolist(), strict=True)))
        bases.check(adapter.fingerprint, found, str(adapter.directory), str(base))
