"""The released Hugging Face layout, streamed: config.json, safetensors with an index, tokenizer and template beside it.

Every rank reads only its own slices; writing gathers one tensor after the other on rank 0 and holds one file's worth.
A directory is written under a temporary name and renamed when complete: nothing half-written is left behind.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from nemo_diffgemma.checkpoint.assets import write_assets
from nemo_diffgemma.checkpoint.names import (
    CARRIED_PREFIXES,
    released_name,
    released_shape,
    released_tensors,
    text_tensors,
)
from nemo_diffgemma.checkpoint.tensor_files import DTYPES, INDEX, SINGLE, CheckpointError, TensorFiles
from nemo_diffgemma.config import ModelConfig
from nemo_diffgemma.config_keys import QUANTISED
from nemo_diffgemma.model.network import Network
from nemo_diffgemma.non_finite import DAMAGED, first_non_finite
from nemo_diffgemma.parallel.agreement import all_or_none, from_rank_zero, is_rank_zero
from nemo_diffgemma.parallel.groups import process_groups
from nemo_diffgemma.parallel.sharding import Shard, shard_of
from nemo_diffgemma.repository import user_path
from nemo_diffgemma.scratch import follow_umask, obstacle, put_on_disk, scratch_directory

SHARD_BYTES = 5 << 30
_PACKED = ("I8", "U8", "I32", "U32")  # a matrix of the text model in one of these is quantised
_CARRIED = (*DTYPES, "F64", "I64", "I32", "I16", "I8", "U8", "BOOL")  # written back without a look at them
_log = logging.getLogger(__name__)


# -- reading ---------------------------------------------------------------------------------------------------------


def check(config: ModelConfig, directory: str | Path) -> None:
    """Raise `CheckpointError` unless a released-format directory holds the tensors of `config`; reads headers only."""
    with TensorFiles(Path(directory)) as files:
        if not files.files:
            raise CheckpointError(
                f"{files.directory} holds no safetensors; give a directory with {SINGLE}, or with {INDEX} and "
                "the files that it names"
            )
        if files.overridden and is_rank_zero():
            _log.warning(
                "%s holds %s, which is used; %s beside it count for nothing",
                *(files.directory, SINGLE, ", ".join([INDEX, *files.overridden])),
            )
        _check_dtypes(files)
        _check_shapes(released_tensors(config), files)


def _check_dtypes(files: TensorFiles) -> None:
    """Check that every tensor can be written back bit for bit."""
    for name, file in files.files.items():
        dtype = files.slice(name).get_dtype()
        if dtype.startswith(("F8_", "F6_", "F4")) or (dtype in _PACKED and not name.startswith(CARRIED_PREFIXES)):
            raise CheckpointError(f"tensor {name} is {dtype} in {file}: {QUANTISED}")
        if dtype not in (_CARRIED if name.startswith(CARRIED_PREFIXES) else DTYPES):
            raise CheckpointError(
                f"tensor {name} is {dtype} in {file}, which this network cannot hold exactly; convert it to float32, "
                "bfloat16 or float16 first"
            )


def _check_shapes(expected: Mapping[str, tuple[int, ...]], files: TensorFiles) -> None:
    missing = [name for name in expected if name not in files.files]
    if missing:
        raise CheckpointError(
            f"{files.directory} lacks {len(missing)} tensors, first {', '.join(missing[:3])}; is the download "
            "complete, and is config.json of the same checkpoint?"
        )
    foreign = [n for n in files.files if n not in expected and not n.startswith(CARRIED_PREFIXES)]
    if foreign:
        raise CheckpointError(
            f"{files.directory} holds {len(foreign)} tensors that this model does not have, first "
            f"{', '.join(foreign[:3])} in {files.files[foreign[0]].name}; is config.json of the same checkpoint?"
        )
    for name, shape in expected.items():
        stored = tuple(files.slice(name).get_shape())
        if stored != shape:
            raise CheckpointError(
                f"tensor {name} has shape {list(stored)} in {files.files[name]}, but config.json makes it "
                f"{list(shape)}; the two are of different checkpoints"
            )


def load(network: Network, directory: str | Path) -> None:
    """Fill `network` from a released-format directory that `check` accepts.

    Collective. Raises `CheckpointError` on every rank: with no weight set where two copies of a weight differ, and
    where a weight is NaN or infinite.
    """
    with all_or_none():
        _check_copies(Path(directory))
    with all_or_none():
        _fill(network, Path(directory))
        check_finite(network, Path(directory))
    network.assets = Path(directory)


def check_finite(network: Network, directory: Path) -> None:
    """Raise `CheckpointError` where a weight of this rank is NaN or infinite.

    An attention kernel may turn a query that is NaN into zeros, so results alone do not tell.
    """
    weight = first_non_finite((released_name(name), tensor) for name, tensor in text_tensors(network))
    if weight is not None:
        raise CheckpointError(f"{weight}, in {directory}: {DAMAGED}")


def _check_copies(directory: Path) -> None:
    """Every rank compares its share of the copies, whole."""
    with TensorFiles(directory) as files:
        for name in sorted(files.copies)[dist.get_rank() :: dist.get_world_size()]:
            files.check_copy(name)


def _fill(network: Network, directory: Path) -> None:
    network.file_dtypes = {}
    with TensorFiles(directory) as files, torch.no_grad():
        for name, tensor in text_tensors(network):
            stored = files.slice(released_name(name))
            network.file_dtypes[released_name(name)] = stored.get_dtype()
            _read_slices(name, tensor, stored, network.model_config.vocab_size)


def _read_slices(name: str, tensor: Tensor, stored: Any, vocab_size: int) -> None:
    spans = shard_of(tensor).slices(tuple(tensor.shape))
    if name == "embed_tokens.weight":
        end = min(spans[0].stop, vocab_size)
        tensor.zero_()  # padding
        if spans[0].start < end:
            tensor[: end - spans[0].start] = stored[spans[0].start : end]
    elif name.endswith("experts.gate_up_proj"):  # on disk gate rows, then up rows, in one axis
        experts, _, width, _ = spans
        half = stored.get_shape()[1] // 2
        for part in (0, 1):
            tensor[:, part] = stored[experts, part * half + width.start : part * half + width.stop]
    else:
        tensor.copy_(stored[spans])


# -- writing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Written:
    """What was written: number of tensors and their bytes."""

    tensors: int
    bytes: int


def save(network: Network, directory: str | Path) -> Written:
    """Write a released-format directory from any layout; tensors keep the dtype of the file they came from.

    Raises `CheckpointError` on every rank when `directory` exists and is not empty, or cannot be written, and for a
    network with adapters.
    """
    if network.lora is not None:  # the same on every rank
        raise CheckpointError("this network has adapters; call merge_adapters() before it is written as a whole")
    target = user_path(directory)
    written = Written(0, 0)
    with new_directory(target) as partial:
        shards = _plan(network)
        weight_map: dict[str, str] = {}
        carried: dict[str, Tensor] = {}
        with writing(partial):
            if partial is not None:
                write_assets(network, partial)  # first: what is wrong with them is said before tensors are gathered
                carried = carried_tensors(network)
        files = len(shards) + bool(carried)
        for index, names in enumerate(shards):
            file = file_name(index, files)
            tensors = {released_name(n): t for n, t in full_tensors(network, names)}
            with writing(partial):  # the others must not wait in the next gather when the disk is full
                if partial is not None:
                    save_file(tensors, partial / file, metadata={"format": "pt"})
                    weight_map |= dict.fromkeys(tensors, file)
                    written = _add(written, tensors)
        with writing(partial):
            if partial is not None:
                if carried:  # byte for byte, in a file of their own
                    save_file(carried, partial / file_name(files - 1, files), metadata={"format": "pt"})
                    weight_map |= dict.fromkeys(carried, file_name(files - 1, files))
                    written = _add(written, carried)
                _write_index(partial, weight_map, written)
    return from_rank_zero(written)


def _add(written: Written, tensors: Mapping[str, Tensor]) -> Written:
    return Written(written.tensors + len(tensors), written.bytes + sum(t.nbytes for t in tensors.values()))


def file_name(index: int, files: int) -> str:
    """transformers reads `model.safetensors` and nothing else where there is one, so it must be the only file."""
    return SINGLE if files == 1 else f"model-{index + 1:05}-of-{files:05}.safetensors"


def _write_index(partial: Path, weight_map: dict[str, str], written: Written) -> None:
    if len(set(weight_map.values())) > 1:
        index = {"metadata": {"total_size": written.bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (partial / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def carried_tensors(network: Network) -> dict[str, Tensor]:
    """Vision tensors of the checkpoint this model came from."""
    if network.assets is None or not (any(network.assets.glob("*.safetensors")) or (network.assets / INDEX).is_file()):
        return {}
    with TensorFiles(network.assets) as files:
        names = [name for name in files.files if name.startswith(CARRIED_PREFIXES)]
        return {name: files.open(files.files[name]).get_tensor(name) for name in names}


def _plan(network: Network) -> list[list[str]]:
    """Names of the tensors of each file, in the order of the model, each file up to `SHARD_BYTES`."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in text_tensors(network):
        full = tensor.element_size() * int(torch.Size(shard_of(tensor).full_shape(tuple(tensor.shape))).numel())
        if shards[-1] and size + full > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += full
    return shards


def full_tensors(network: Network, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """(our name, whole tensor in its released shape, on the CPU), one after the other; on rank 0 only.

    Collective: every rank calls it with the same names.
    """
    tensors = dict(text_tensors(network))
    for name in names:
        full = gathered(tensors[name].detach(), shard_of(tensors[name]))
        if is_rank_zero():
            dtype = DTYPES.get(network.file_dtypes.get(released_name(name), ""), full.dtype)
            shape = released_shape(name, tuple(full.shape), network.model_config)
            full = full[: shape[0]] if name == "embed_tokens.weight" else full.reshape(shape)
            yield name, full.to(dtype).cpu().clone(memory_format=torch.contiguous_format)


def gathered(tensor: Tensor, shard: Shard) -> Tensor:
    groups = process_groups()
    group = groups.tp_ep if shard.expert else groups.tp
    if not shard.cuts or group.size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    places: list[Any] = [None] * group.size()
    dist.all_gather_object(places, shard.slices(tuple(tensor.shape)), group=group)
    full = tensor.new_empty(shard.full_shape(tuple(tensor.shape)))
    for part, place in zip(parts, places, strict=True):
        full[place] = part
    return full


@contextlib.contextmanager
def writing(partial: Path | None, group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Collective block in which rank 0 writes: if it fails there, every rank raises `CheckpointError`."""
    with all_or_none(group):
        try:
            yield
        except (OSError, SafetensorError) as failure:
            raise CheckpointError(f"cannot write {partial}: {failure}") from failure


@contextlib.contextmanager
def new_directory(target: Path, group: dist.ProcessGroup | None = None) -> Iterator[Path | None]:
    """A directory that appears under its name only when complete. Rank 0 gets a temporary path, others None.

    Collective; the end of the block may come in another thread, with a `group` of its own. Raises `CheckpointError` on
    every rank where `target` is in use or cannot be written.
    """
    with contextlib.ExitStack() as stack:
        partial: Path | None = None
        with writing(target):
            if is_rank_zero():
                partial = stack.enter_context(partial_of(target, is_directory=True))
        yield partial
        with writing(partial, group):
            if partial is not None:
                follow_umask(partial)
                if target.exists():
                    target.rmdir()
                partial.rename(target)
                put_on_disk(target.absolute().parent)  # its name, too, outlives a power cut


@contextlib.contextmanager
def partial_of(target: Path, is_directory: bool) -> Iterator[Path]:
    """A scratch directory beside `target`. Raises `CheckpointError` where something is in the way, and OSError."""
    reason = obstacle(target, is_directory)
    if reason is not None:
        raise CheckpointError(reason)
    target.parent.mkdir(parents=True, exist_ok=True)
    with scratch_directory(target.absolute().parent, target.name) as partial:
        yield partial
