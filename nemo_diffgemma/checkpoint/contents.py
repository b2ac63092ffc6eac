"""What a checkpoint of any format holds, without reading its tensors."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from nemo_diffgemma.checkpoint import nemo_archive, sharded
from nemo_diffgemma.checkpoint.names import released_name, released_shape
from nemo_diffgemma.checkpoint.open import format_of
from nemo_diffgemma.checkpoint.tensor_files import TensorFiles, read_header
from nemo_diffgemma.config import ModelConfig
from nemo_diffgemma.lora.opening import base_of
from nemo_diffgemma.lora.peft_files import AdapterDirectory
from nemo_diffgemma.repository import user_path

_BYTES = {"F32": 4, "F16": 2, "BF16": 2}  # what a text model can have on disk


@dataclass(frozen=True)
class Contents:
    """Tensors of a checkpoint as a released-format directory has them, whatever format it is in."""

    tensors: int
    bytes: int
    dtype: str  # that holds every value of the text model exactly


def contents(checkpoint: str) -> Contents:
    """What a checkpoint holds, or an adapter merged, from headers; a `.nemo` is unpacked to get at them.

    Raises `CheckpointError`.
    """
    kind, place = format_of(checkpoint), user_path(checkpoint)
    if kind == "adapter":  # with its base
        return contents(str(base_of(AdapterDirectory(place))))
    if kind == "sharded":
        return _of_sharded(place)
    return _of_directory(nemo_archive.unpacked_weights(place) if kind == "nemo" else place)


def _of_directory(directory: Path) -> Contents:
    with TensorFiles(directory) as files:
        for name in files.files:
            files.slice(name)  # raises where a file is damaged or lacks it
        of_files = {file: read_header(file)[1] for file in set(files.files.values())}
        headers = [of_files[file][files.stored_name(name)] for name, file in files.files.items()]
    dtypes = {header["dtype"] for header in headers}
    size = sum(end - start for start, end in (header["data_offsets"] for header in headers))
    return Contents(len(headers), size, "bfloat16" if dtypes == {"BF16"} else "float32")


def _of_sharded(directory: Path) -> Contents:
    model = ModelConfig.from_pretrained(directory / sharded.ASSETS)
    dtypes = sharded.file_dtypes(directory)
    stored = {
        key.removeprefix(sharded.MODEL): tensor
        for key, tensor in sharded.described_tensors(directory).items()
        if key.startswith(sharded.MODEL)
    }
    size = 0
    for name, tensor in stored.items():
        released = released_shape(name, tuple(tensor.global_shape), model)
        size += prod(released) * _BYTES.get(dtypes.get(released_name(name), ""), tensor.dtype.itemsize)
    carried = Contents(0, 0, "float32")
    if any((directory / sharded.ASSETS).glob("*.safetensors")):
        carried = _of_directory(directory / sharded.ASSETS)
    exact = "bfloat16" if {tensor.dtype for tensor in stored.values()} == {torch.bfloat16} else "float32"
    return Contents(len(stored) + carried.tensors, size + carried.bytes, exact)
