"""Tensors as they lie on a disk, read by ranges of rows: what is held does not depend on how large they are.

A row is one entry along the first axis. Plain reads, no mapping: pages of a mapped file count as memory of the process.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.utils import _create_file_view

from nemo_diffgemma.checkpoint.tensor_files import CheckpointError, TensorFiles, read_header

BLOCK = 1 << 26  # bytes of one tensor that are read at a time
DTYPES = {  # safetensors' names; those of the text model, and what is only carried
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Part:
    """A piece of a tensor, row after row in `file` from byte `offset` on; `place` is its first entry in the whole."""

    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    place: tuple[int, ...]

    def rows(self, start: int, stop: int) -> Tensor:
        """Raises `CheckpointError` where the file ends before."""
        shape = (stop - start, *self.shape[1:])
        row = prod(self.shape[1:]) * self.dtype.itemsize
        data = bytearray((stop - start) * row)
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(self.offset + start * row)
            view, read = memoryview(data), 0
            while read < len(data) and (more := stream.readinto(view[read:])):
                read += more
        if read < len(data):
            raise CheckpointError(f"{self.file} is truncated; copy it again from the checkpoint")
        return torch.frombuffer(data, dtype=self.dtype).view(shape) if data else torch.empty(shape, dtype=self.dtype)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of one part or of several, which cover it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[Part, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Ranges of rows of at most `BLOCK` bytes, but of at least one row."""
        rows = max(1, BLOCK // max(1, prod(self.shape[1:]) * self.dtype.itemsize))
        count = self.shape[0] if self.shape else 1
        yield from pairwise([*range(0, count, rows), count])

    def rows(self, start: int, stop: int) -> Tensor:
        """[stop - start, ...] in the dtype of the file. Raises `CheckpointError`, and OSError."""
        if len(self.parts) == 1:
            return self.parts[0].rows(start, stop)
        block = torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype)
        for part in self.parts:
            first, last = max(start, part.place[0]), min(stop, part.place[0] + part.shape[0])
            if first < last:
                spans = [slice(at, at + size) for at, size in zip(part.place[1:], part.shape[1:], strict=True)]
                block[(slice(first - start, last - start), *spans)] = part.rows(
                    first - part.place[0], last - part.place[0]
                )
        return block


def of_files(files: TensorFiles) -> dict[str, StoredTensor]:
    """Every tensor of a released-format directory by its name, copies of tied weights too."""
    headers: dict[Path, tuple[int, dict[str, Any]]] = {}
    stored = {}
    for name, file in {**files.files, **files.copies}.items():
        if file not in headers:
            headers[file] = read_header(file)
        start, header = headers[file]
        entry = header[files.stored_name(name)]
        shape, dtype = tuple(entry["shape"]), DTYPES[entry["dtype"]]
        part = Part(file, start + entry["data_offsets"][0], dtype, shape or (1,), (0,) * len(shape))
        stored[name] = StoredTensor(shape, dtype, (part,))
    return stored


def of_sharded(directory: Path, metadata: Any, prefix: str) -> dict[str, StoredTensor]:
    """The tensors of a sharded checkpoint whose names begin with `prefix`, by the rest of the name.

    `metadata` is what its `.metadata` holds. Raises `CheckpointError` where a description does not fit a file.
    """
    parts: dict[str, list[Part]] = {}
    for index, place in metadata.storage_data.items():
        if not index.fqn.startswith(prefix):
            continue
        described = metadata.state_dict_metadata[index.fqn]
        sizes = {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in described.chunks}
        offsets = tuple(index.offset)
        data = _data_of(directory / place.relative_path, place, sizes[offsets], described.properties.dtype)
        part = Part(directory / place.relative_path, data, described.properties.dtype, sizes[offsets], offsets)
        parts.setdefault(index.fqn, []).append(part)
    stored = {}
    for name, of_tensor in parts.items():
        shape = tuple(metadata.state_dict_metadata[name].size)
        if sum(prod(part.shape) for part in of_tensor) != prod(shape):
            raise CheckpointError(f"{directory}/.metadata is damaged: {name} has gaps; copy {directory} again")
        stored[name.removeprefix(prefix)] = StoredTensor(shape, of_tensor[0].dtype, tuple(of_tensor))
    return stored


def _data_of(file: Path, place: Any, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Where in `file` the values of an item begin, which `torch.save` wrote: an archive whose data are not packed."""
    try:
        with file.open("rb") as stream:
            view: Any = _create_file_view(stream, place.offset, place.length)
            archive = torch._C.PyTorchFileReader(view)
            start = place.offset + archive.get_record_offset("data/0")  # type: ignore[attr-defined]
            view.seek(0)
            tensor = torch.load(view, map_location="meta", weights_only=True)  # its description only
    except RuntimeError as error:
        raise CheckpointError(f"{file} cannot be read ({str(error).splitlines()[0]}); copy it again") from None
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous() or tensor.storage_offset():
        raise CheckpointError(f"{file} does not hold what .metadata says of it; copy it again")
    return start
