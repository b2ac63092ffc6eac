"""The files of a checkpoint that is written block by block: a released-format directory, or a sharded one.

Each knows what its files are called, writes one of them, and what is written last, when all are there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import IO, Any, Protocol, cast

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from nemo_diffgemma.checkpoint import huggingface, sharded
from nemo_diffgemma.checkpoint.manifest import HashedFile, seal
from nemo_diffgemma.checkpoint.names import our_name, our_shape, released_tensors
from nemo_diffgemma.checkpoint.sharded_writer import PlanWriter
from nemo_diffgemma.checkpoint.stored import DTYPES, NAMES, StoredTensor
from nemo_diffgemma.checkpoint.tensor_files import INDEX
from nemo_diffgemma.config import ModelConfig

SHARDED_BYTES = 2 << 30  # of one file of a sharded checkpoint
VISION = f"{sharded.ASSETS}/model-vision.safetensors"
Progress = Callable[[Tensor, str], None]  # is shown every block as it lies in the source, and its tensor's name


class Convertible(Protocol):
    """What files are written from: `streaming.Source`."""

    model_config: ModelConfig
    tensors: dict[str, StoredTensor]
    carried: dict[str, StoredTensor]
    file_dtypes: dict[str, str]
    dtype: torch.dtype


class TargetFiles(Protocol):
    """Files of a checkpoint, by their `names` in its directory."""

    names: list[str]

    def mapping(self) -> dict[str, str]:
        """Where each tensor of the source goes: file and name there."""

    def size(self, name: str) -> int:
        """Bytes that are read for a file."""

    def write(self, directory: Path, name: str, progress: Progress) -> dict[str, Any]:
        """Write a file -> what `finish` has to know of it, for JSON. Raises OSError, and what `progress` raises."""

    def finish(self, directory: Path, done: list[dict[str, Any]]) -> None:
        """Write what describes all files; `done` has what `write` has returned, in the order of `names`."""


def _rows(tensor: StoredTensor, wanted: int, progress: Progress, name: str) -> Iterator[Tensor]:
    """The first `wanted` rows, block by block."""
    for start, stop in tensor.blocks():
        if start < wanted:
            block = tensor.rows(start, min(stop, wanted))
            progress(block, name)
            yield block


# -- released format -------------------------------------------------------------------------------------------------


class ReleasedFiles:
    """safetensors files of up to `SHARD_BYTES`, what is carried in files of their own, and their index."""

    def __init__(self, source: Convertible) -> None:
        self.source, self.shapes = source, released_tensors(source.model_config)
        groups = [*self._groups(source.tensors), *self._groups(source.carried)]
        self._tensors = {huggingface.file_name(i, len(groups)): names for i, names in enumerate(groups)}
        self.names = list(self._tensors)

    def _groups(self, tensors: dict[str, StoredTensor]) -> list[list[str]]:
        groups: list[list[str]] = []
        size = 0
        for name in tensors:
            if not groups or size + self._bytes(name) > huggingface.SHARD_BYTES:
                groups.append([])
                size = 0
            groups[-1].append(name)
            size += self._bytes(name)
        return groups

    def mapping(self) -> dict[str, str]:
        return {tensor: f"{file}: {tensor}" for file, tensors in self._tensors.items() for tensor in tensors}

    def _described(self, name: str) -> tuple[StoredTensor, torch.dtype, tuple[int, ...]]:
        """The tensor, and dtype and shape that it gets."""
        if name in self.source.carried:
            tensor = self.source.carried[name]
            return tensor, tensor.dtype, tensor.shape
        tensor = self.source.tensors[name]
        return tensor, DTYPES[self.source.file_dtypes[name]], self.shapes[name]

    def _bytes(self, name: str) -> int:
        _, dtype, shape = self._described(name)
        return prod(shape) * dtype.itemsize

    def size(self, name: str) -> int:
        return sum(self._described(tensor)[0].nbytes for tensor in self._tensors[name])

    def write(self, directory: Path, name: str, progress: Progress) -> dict[str, Any]:
        tensors = {tensor: self._described(tensor) for tensor in self._tensors[name]}
        write_safetensors(directory / name, tensors, progress)
        return {"tensors": list(tensors), "bytes": sum(map(self._bytes, tensors))}

    def finish(self, directory: Path, done: list[dict[str, Any]]) -> None:
        if len(self.names) > 1:
            weight_map = {t: name for name, one in zip(self.names, done, strict=True) for t in one["tensors"]}
            index = {
                "metadata": {"total_size": sum(one["bytes"] for one in done)},
                "weight_map": dict(sorted(weight_map.items())),
            }
            (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_safetensors(
    file: Path, tensors: dict[str, tuple[StoredTensor, torch.dtype, tuple[int, ...]]], progress: Progress
) -> HashedFile:
    """Write tensors in a dtype and shape as `safetensors` would: a header, then the values, the widest types first.

    https://huggingface.co/docs/safetensors: 8 bytes with the length of the header, JSON padded with spaces, values.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name][1].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        _, dtype, shape = tensors[name]
        start, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with HashedFile(file) as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor, dtype, shape = tensors[name]
            for block in _rows(tensor, shape[0] if shape else 1, progress, name):
                stream.write(block.to(dtype).flatten().view(torch.uint8).numpy())
    return stream


# -- sharded ---------------------------------------------------------------------------------------------------------


class ShardedFiles:
    """Files of up to `SHARDED_BYTES` of pieces of tensors, each of whole rows and of one block."""

    def __init__(self, source: Convertible) -> None:
        self.source, self.config = source, source.model_config
        groups: list[list[str]] = []
        size = 0
        for name, tensor in source.tensors.items():
            if not groups or size + tensor.nbytes > SHARDED_BYTES:
                groups.append([])
                size = 0
            groups[-1].append(name)
            size += tensor.nbytes
        self._tensors = {f"{sharded.WEIGHTS}_{i}.distcp": names for i, names in enumerate(groups)}
        self.names = [*self._tensors, *([VISION] if source.carried else [])]

    def mapping(self) -> dict[str, str]:
        weights = {
            t: f"{file}: {sharded.MODEL}{our_name(t)}" for file, tensors in self._tensors.items() for t in tensors
        }
        return weights | {tensor: f"{VISION}: {tensor}" for tensor in self.source.carried}

    def size(self, name: str) -> int:
        if name == VISION:
            return sum(tensor.nbytes for tensor in self.source.carried.values())
        return sum(self.source.tensors[tensor].nbytes for tensor in self._tensors[name])

    def write(self, directory: Path, name: str, progress: Progress) -> dict[str, Any]:
        (directory / name).parent.mkdir(exist_ok=True)
        if name == VISION:
            carried = {one: (tensor, tensor.dtype, tensor.shape) for one, tensor in self.source.carried.items()}
            return {"digest": write_safetensors(directory / name, carried, progress).digest, "pieces": []}
        pieces = []
        with HashedFile(directory / name) as stream:
            for tensor in self._tensors[name]:
                for start, block in self._pieces(tensor, progress):
                    place = stream.tell()
                    torch.save(block, cast(IO[bytes], stream))
                    pieces.append([our_name(tensor), start, list(block.shape), place, stream.tell() - place])
            plain = stream.tell() if name == self.names[0] else None
            if plain is not None:  # Megatron's plain values, of which there are none
                torch.save([{}], cast(IO[bytes], stream))
        return {"digest": stream.digest, "pieces": pieces, "plain": plain and [plain, stream.tell() - plain]}

    def _pieces(self, name: str, progress: Progress) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows with our shape and dtype); rows that only our padding has are zeros."""
        shape = self._shape(name)
        row, start = shape[1:], 0
        for block in _rows(self.source.tensors[name], shape[0], progress, name):
            yield start, block.to(self.source.dtype).view(-1, *row)
            start += block.shape[0]
        if start < shape[0]:
            yield start, torch.zeros(shape[0] - start, *row, dtype=self.source.dtype)

    def _shape(self, name: str) -> tuple[int, ...]:
        return our_shape(our_name(name), released_tensors(self.config)[name], self.config)

    def finish(self, directory: Path, done: list[dict[str, Any]]) -> None:
        described: dict[str, Any] = {}
        results = []
        for name in self._tensors:
            for tensor in self._tensors[name]:
                properties = TensorProperties(dtype=self.source.dtype)
                key = sharded.MODEL + our_name(tensor)
                described[key] = TensorStorageMetadata(properties, torch.Size(self._shape(tensor)), [])
        for name, one in zip(self.names, done, strict=True):
            for tensor, start, shape, place, length in one["pieces"]:
                key, offsets = sharded.MODEL + tensor, torch.Size([start, *[0] * (len(shape) - 1)])
                described[key].chunks.append(ChunkStorageMetadata(offsets, torch.Size(shape)))
                index = MetadataIndex(key, offsets, len(described[key].chunks) - 1)
                results.append(WriteResult(index, length, _StorageInfo(name, place, length)))
        plain = ShardedObject("common_state", None, (1,), (0,)).unique_key
        described[plain] = BytesStorageMetadata()
        place, length = done[0]["plain"]
        results.append(WriteResult(MetadataIndex(plain), length, _StorageInfo(self.names[0], place, length)))
        PlanWriter(directory).finish(Metadata(described), [results])
        save_config(CheckpointingConfig("torch_dist", 1), str(directory))
        (directory / sharded.DTYPES).write_text(json.dumps(self.source.file_dtypes))
        seal(
            directory, {name: (one["digest"][0], one["digest"][1]) for name, one in zip(self.names, done, strict=True)}
        )
