"""The safetensors files of a released-format directory, by tensor name. Needs neither Megatron nor process groups."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from nemo_diffgemma.errors import UserError

INDEX = "model.safetensors.index.json"
DTYPES = {  # a file's names
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}


class CheckpointError(UserError):
    """A checkpoint that cannot be read or written; the message names the file or tensor and what to do."""


def read_header(file: Path) -> tuple[int, dict[str, Any]]:
    """Of a safetensors file: where its tensors begin, and dtype, shape and data_offsets of each by name."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        return 8 + length, json.loads(stream.read(length))


class TensorFiles:
    """The safetensors files of a directory, opened once, by tensor name."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._stack = contextlib.ExitStack()
        self._handles: dict[Path, Any] = {}
        self.files = self._locate()

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _locate(self) -> dict[str, Path]:
        index = self.directory / INDEX
        if index.is_file():
            try:
                weights = dict(json.loads(index.read_text())["weight_map"])
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(f"{index} is damaged ({error!r}); copy it again from the checkpoint") from None
            missing = sorted({file for file in weights.values() if not (self.directory / file).is_file()})
            if missing:
                raise CheckpointError(
                    f"{index} names {', '.join(missing)}, which {self.directory} does not hold; copy the missing files"
                )
            return {name: self.directory / file for name, file in weights.items()}
        files = sorted(self.directory.glob("*.safetensors"))
        return {name: file for file in files for name in self.open(file).keys()}  # noqa: SIM118 (no mapping)

    def open(self, file: Path) -> Any:
        if file not in self._handles:
            try:
                self._handles[file] = self._stack.enter_context(safe_open(str(file), framework="pt"))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{file} is truncated or not a safetensors file ({error}); copy it again from the checkpoint"
                ) from None
        return self._handles[file]

    def slice(self, name: str) -> Any:
        """Lazy view of a tensor: `get_shape()`, `get_dtype()`, and indexing that reads only what it selects."""
        if name not in self.files:
            raise CheckpointError(f"{self.directory} has no tensor {name}")
        try:
            return self.open(self.files[name]).get_slice(name)
        except SafetensorError as error:
            raise CheckpointError(
                f"{self.files[name]} does not hold tensor {name} ({error}); its index is of another checkpoint"
            ) from None
