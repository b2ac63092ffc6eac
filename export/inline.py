"""Weights inside of the graph: weight inputs become initializers that lie in files of the bundle.

An input that is a tensor of the checkpoint as it lies on disk points into the checkpoint's own safetensors file; what
is sliced, transposed or cast is written to `weights.rank{r}.bin`, one tensor after the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from onnx import ModelProto, TensorProto

from export.bundle import CHECKPOINT, stored_slice
from export.weights import Weight
from nemo_diffgemma.checkpoint.tensor_files import DTYPES, TensorFiles, read_header

_ONNX = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16, torch.bfloat16: TensorProto.BFLOAT16}
_ALIGNMENT = 4096  # so that the file can be mapped


class Place(NamedTuple):
    """Where the bytes of a weight lie: a file of the bundle, offset and length."""

    file: str
    offset: int
    length: int


def store(weights: Mapping[str, Weight], rank: int, dtype: torch.dtype, directory: Path) -> dict[str, Place]:
    """Places of the weights of a rank; those that do not lie in the checkpoint as they are, are written."""
    places = {}
    own = directory / f"weights.rank{rank}.bin"
    with TensorFiles(directory / CHECKPOINT) as files, own.open("wb") as stream:
        for name, weight in weights.items():
            stored = stored_slice(files, weight)
            if weight.is_whole and DTYPES.get(stored.get_dtype()) == dtype:
                places[name] = _in_checkpoint(files.files[weight.key], weight.key)
                continue
            stream.seek(-(-stream.tell() // _ALIGNMENT) * _ALIGNMENT)
            offset = stream.tell()
            stream.write(weight.of_rank(stored, rank).to(dtype).view(torch.uint8).numpy().data)
            places[name] = Place(own.name, offset, stream.tell() - offset)
    if not own.stat().st_size:
        own.unlink()
    return places


def inline(
    model: ModelProto, weights: Mapping[str, Weight], places: Mapping[str, Place], dtype: torch.dtype
) -> ModelProto:
    """A copy of `model` whose weight inputs are initializers at these places."""
    inlined = ModelProto()
    inlined.CopyFrom(model)
    del inlined.graph.input[:]
    for value in model.graph.input:
        if value.name in places:
            inlined.graph.initializer.append(_external(value.name, weights[value.name], places[value.name], dtype))
        else:
            inlined.graph.input.append(value)
    return inlined


def _external(name: str, weight: Weight, place: Place, dtype: torch.dtype) -> TensorProto:
    tensor = TensorProto(name=name, data_type=_ONNX[dtype], dims=weight.shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", place.file), ("offset", place.offset), ("length", place.length)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def _in_checkpoint(file: Path, key: str) -> Place:
    begin, header = read_header(file)
    start, end = header[key]["data_offsets"]
    return Place(f"{CHECKPOINT}/{file.name}", begin + start, end - start)
