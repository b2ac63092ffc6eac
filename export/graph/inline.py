"""Weights inside of the graph: weight inputs become initializers that lie in files of the bundle.

An input that is a tensor of the checkpoint as it lies on disk points into the checkpoint's own safetensors file; what
is sliced, transposed or cast is written to `weights.rank{r}.bin`, one tensor after the other. The graph itself stays
small: protobuf ends at 2 GB.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from onnx import ModelProto, TensorProto, ValueInfoProto

from export.bundle.format import CHECKPOINT
from export.graph.weights import Weight, stored_slice
from nemo_diffgemma.checkpoint.tensor_files import DTYPES, TensorFiles, read_header

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
        held = {file: places_in(file, directory) for file in set(files.files.values())}
        for name, weight in weights.items():
            stored = stored_slice(files, weight)
            if weight.is_whole and DTYPES.get(stored.get_dtype()) == dtype:
                places[name] = held[files.files[weight.key]][files.stored_name(weight.key)]
                continue
            stream.seek(-(-stream.tell() // _ALIGNMENT) * _ALIGNMENT)
            offset = stream.tell()
            stream.write(weight.of_rank(stored, rank).to(dtype).view(torch.uint8).numpy().data)
            places[name] = Place(own.name, offset, stream.tell() - offset)
    if not own.stat().st_size:
        own.unlink()
    return places


def places_in(file: Path, bundle: Path) -> dict[str, Place]:
    """Places of the tensors of a safetensors file of a bundle."""
    begin, header = read_header(file)
    header.pop("__metadata__", None)
    where, spans = str(file.relative_to(bundle)), {name: entry["data_offsets"] for name, entry in header.items()}
    return {name: Place(where, begin + start, end - start) for name, (start, end) in spans.items()}


def inline(model: ModelProto, places: Mapping[str, Place]) -> ModelProto:
    """A copy of `model` whose inputs that have a place are initializers there."""
    inlined = ModelProto()
    inlined.CopyFrom(model)
    del inlined.graph.input[:]
    for value in model.graph.input:
        if value.name in places:
            inlined.graph.initializer.append(_external(value, places[value.name]))
        else:
            inlined.graph.input.append(value)
    return inlined


def _external(value: ValueInfoProto, place: Place) -> TensorProto:
    kind = value.type.tensor_type
    dims = [dim.dim_value for dim in kind.shape.dim]
    tensor = TensorProto(name=value.name, data_type=kind.elem_type, dims=dims)
    tensor.data_location = TensorProto.EXTERNAL
    for key, where in (("location", place.file), ("offset", place.offset), ("length", place.length)):
        tensor.external_data.add(key=key, value=str(where))
    return tensor
