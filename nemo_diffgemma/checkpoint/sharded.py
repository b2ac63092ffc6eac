"""Sharded checkpoints: every rank writes what it holds, any layout reads it back.

Tensors go through Megatron's dist_checkpointing under layout-free names and whole shapes, described by the same `Shard`
that loading and initialisation use. A directory is complete in itself:

    .metadata, metadata.json     description of the tensors in the files
    weights_<rank>.distcp        tensors `model.<name>`, and plain values of training
    training_<rank>.distcp       tensors `optimizer.<kind>.<name>`, if training wrote it
    <kind>_<rank>.distcp         tensors `<kind>.<name>`, whatever else a run keeps (DiffusionGemmaModel.saved_tensors)
    assets/                      config.json, tokenizer, generation_config.json, carried vision tensors
    dtypes.json                  dtype of each tensor in the released files, for writing those back
    manifest.json                lengths and checksums: manifest.py

It appears under its name only when complete: sharded_writer.py. Loading unpickles nothing but torch's description of
the tensors, and that only after checking that it names no other class.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import pickle
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.serialization import load_common_state_dict, load_tensors_metadata
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from nemo_diffgemma.checkpoint import huggingface, manifest, tensor_files
from nemo_diffgemma.checkpoint.assets import write_assets as _write_assets
from nemo_diffgemma.checkpoint.names import released_name, released_shape, released_tensors, text_tensors
from nemo_diffgemma.checkpoint.tensor_files import CheckpointError, is_fault_of_machine
from nemo_diffgemma.config import ModelConfig
from nemo_diffgemma.json_files import brief, read_object
from nemo_diffgemma.model.network import Network
from nemo_diffgemma.non_finite import DAMAGED, first_non_finite
from nemo_diffgemma.parallel import megatron_cpu
from nemo_diffgemma.parallel.agreement import all_or_none
from nemo_diffgemma.parallel.groups import process_groups
from nemo_diffgemma.parallel.sharding import shard_of

MODEL = "model."
ASSETS, DTYPES = "assets", "dtypes.json"
WEIGHTS, TRAINING = "weights", "training"  # what names of *.distcp files begin with; older ones are mixed

_FILES = (".metadata", "metadata.json", DTYPES, f"{ASSETS}/config.json")  # beside the *.distcp that .metadata names


def is_sharded(path: str | Path) -> bool:
    """Whether `path` has what every sharded checkpoint has."""
    return all((Path(path) / name).is_file() for name in _FILES)


def file_kind(key: str) -> str:
    """What the name of the file begins with that has the tensor `key`."""
    kind = key.partition(".")[0]
    return {"model": WEIGHTS, "optimizer": TRAINING}.get(kind, kind)


def verify(directory: Path, kinds: Collection[str] | None = None) -> None:
    """Check that every file is there, in full length, and has the checksum of the manifest, if there is one.

    With `kinds` only tensors of these kinds of file are read, and what is beside tensors.

    Collective: the ranks share the files. Raises `CheckpointError` on every rank, or OSError where the disk fails.
    """
    with all_or_none():
        check_complete(directory)
    manifest.verify(directory, lambda name: kinds is None or _kind_of_file(name) in (*kinds, None))
    with all_or_none():
        metadata = read_metadata(directory)
        _check_sizes(directory, metadata)
        is_older = not any(part.relative_path.startswith(f"{WEIGHTS}_") for part in metadata.storage_data.values())
        if not is_older and not (directory / manifest.MANIFEST).is_file():
            raise CheckpointError(
                f"{directory} lacks {manifest.MANIFEST}, which tells whether its files are whole; copy it again"
            )


def _kind_of_file(name: str) -> str | None:
    return name.rpartition("_")[0] if name.endswith(".distcp") else None


def check_complete(directory: Path) -> None:
    """Raise `CheckpointError` unless `is_sharded`."""
    missing = [name for name in _FILES if not (directory / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{directory} is not a complete sharded checkpoint: it lacks {', '.join(missing)}; copy it again"
        )


@contextlib.contextmanager
def in_use(directory: Path) -> Iterator[None]:
    """A run that keeps only some of its checkpoints (training/saving.py) leaves this one until the block ends."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # not there: who reads it says so; or a file system without locks
            stream = stack.enter_context((directory / ".metadata").open("rb"))
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield


@contextlib.contextmanager
def unused(directory: Path) -> Iterator[bool]:
    """Whether nobody reads it, nor begins to until the block ends: the opposite of `in_use`. Raises OSError."""
    with (directory / ".metadata").open("r+b") as stream:  # NFS locks what is open for writing
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:  # a file system without locks
            pass
        yield True


# -- describing ------------------------------------------------------------------------------------------------------


def sharded_tensor(key: str, data: Tensor, like: Tensor, replica: int | None = None) -> ShardedTensor:
    """`data`, of the shape of `like`, as this rank's part of the whole tensor `key`.

    Several ranks may hold the same part; the one whose replica number is all zeros writes it; `replica` replaces the
    number among data-parallel replicas.
    """
    shard, groups = shard_of(like), process_groups()
    if shard.expert:
        within = 0 if len(shard.cuts) > 1 else groups.expt_tp.rank()  # of an adapter, one side is whole
        number = (within, groups.expt_dp.rank() if replica is None else replica)
    else:
        within = 0 if shard.cuts else groups.tp.rank()
        number = (within, groups.dp_cp.rank() if replica is None else replica)
    return ShardedTensor.from_rank_offsets(key, data.detach(), *shard.cuts, replica_id=number)


def sharded_state_dict(network: Network) -> dict[str, ShardedTensor]:
    """Every parameter and buffer, by its name in the checkpoint."""
    return {MODEL + name: sharded_tensor(MODEL + name, tensor, tensor) for name, tensor in text_tensors(network)}


# -- writing ---------------------------------------------------------------------------------------------------------


def write_assets(network: Network, assets: Path) -> None:
    """Write configuration, tokenizer and carried vision tensors beside the text model. Rank 0 only."""
    assets.mkdir(parents=True, exist_ok=True)
    carried = {} if network.lora is not None else huggingface.carried_tensors(network)  # they are the base's
    if carried:
        save_file(carried, assets / "model-vision.safetensors", metadata={"format": "pt"})
    _write_assets(network, assets)


# -- reading ---------------------------------------------------------------------------------------------------------


def load_sharded(network: Network, directory: str | Path) -> None:
    """Fill `network` from a sharded checkpoint of any layout: weights only, whatever else it holds.

    Raises `CheckpointError` on every rank, before any weight is set unless a weight is NaN or infinite, or a file of
    the right size is damaged inside and there is no manifest to tell.
    """
    with in_use(Path(directory)):
        verify(Path(directory), kinds=[WEIGHTS])
        fill(network, directory)


def fill(network: Network, directory: str | Path) -> None:
    """`load_sharded` of a checkpoint that is verified."""
    source = Path(directory)
    with all_or_none():
        check(network.model_config, source)
    restore(sharded_state_dict(network), source)
    network.file_dtypes = file_dtypes(source)
    network.assets = source / ASSETS


def restore(state: dict[str, ShardedTensor], directory: Path) -> None:
    """`read_tensors` of what must be there, in these shapes and finite. Raises `CheckpointError` on every rank."""
    with all_or_none():
        there = keys(directory)
        missing = [key for key in state if key not in there]
        if missing:
            raise CheckpointError(
                f"{directory} lacks {len(missing)} of {len(state)} tensors of this run, first {missing[0]}: it was "
                "saved with other settings (adapters, average of weights); use those it was saved with, or start a "
                "new run"
            )
        for key, tensor in state.items():
            if there[key] != tuple(tensor.global_shape):
                raise CheckpointError(
                    f"tensor {key} has shape {list(there[key])} in {directory}, but {list(tensor.global_shape)} in "
                    "this run; use the settings it was saved with, or start a new run"
                )
    if state:
        read_tensors(state, directory)
    with all_or_none():
        weight = first_non_finite((_told(tensor.key), tensor.data) for tensor in state.values())
        if weight is not None:
            raise CheckpointError(f"{weight}, in {directory}: {DAMAGED}")


def _told(key: str) -> str:
    """A weight has the name that users know from released files."""
    return released_name(key.removeprefix(MODEL)) if key.startswith(MODEL) else key


def read_tensors(state: dict[str, ShardedTensor], directory: Path) -> None:
    """Fill the data of `state` in place. Collective."""
    megatron_cpu.enable()
    wanted = {key: tensor.data for key, tensor in state.items()}
    try:
        loaded = dist_checkpointing.load(state, str(directory), validate_access_integrity=False)
    except (dist.DistError, ConnectionError):  # another rank is gone, and no file is to blame
        raise
    except _UNREADABLE as error:
        raise _unreadable(directory, error) from error
    with torch.no_grad():
        for key, data in wanted.items():
            if loaded[key].data_ptr() != data.data_ptr():
                data.copy_(loaded[key])


def read_common(directory: str | Path) -> dict[str, Any]:
    """The plain values that training stored; loaded as weights only, so no class but a container's is made.

    Collective. Raises `CheckpointError` on every rank.
    """
    values: dict[str, Any] = {}

    with all_or_none():
        _check_sizes(Path(directory), read_metadata(Path(directory)))
        try:
            values.update(load_common_state_dict(str(directory)))
        except (*_UNREADABLE, ValueError, TypeError, EOFError, pickle.UnpicklingError) as error:
            raise _unreadable(directory, error) from error
    return values


def keys(directory: Path) -> dict[str, tuple[int, ...]]:
    """Name and whole shape of every tensor of a checkpoint. Raises `CheckpointError`."""
    return {key: tuple(tensor.global_shape) for key, tensor in described_tensors(directory).items()}


def described_tensors(directory: Path) -> dict[str, Any]:
    """Shape and dtype of every tensor, without its values; files are checked. Raises `CheckpointError`."""
    check_complete(directory)
    _check_sizes(directory, read_metadata(directory))
    read_object(directory / "metadata.json", CheckpointError)
    try:
        return load_tensors_metadata(str(directory))
    except (*_UNREADABLE, ValueError, TypeError, LookupError, AttributeError) as error:  # metadata.json of another kind
        raise _unreadable(directory, error) from error


def check(config: ModelConfig, directory: str | Path) -> None:
    """Raise `CheckpointError` unless a sharded checkpoint holds the tensors of `config`; reads no tensor."""
    source = Path(directory)
    shapes = {key.removeprefix(MODEL): shape for key, shape in keys(source).items() if key.startswith(MODEL)}
    file_dtypes(source)
    expected = released_tensors(config)
    stored = {released_name(name): (name, shape) for name, shape in shapes.items()}
    missing = [name for name in expected if name not in stored]
    if missing:
        raise CheckpointError(
            f"{source} lacks {len(missing)} tensors of this model, first {', '.join(missing[:3])}; are the sizes "
            f"those of its {ASSETS}/config.json?"
        )
    for released, shape in expected.items():
        name, whole = stored[released]
        padded = (config.padded_vocab_size, *whole[1:]) if name == "embed_tokens.weight" else whole
        if released_shape(name, whole, config) != shape or padded != whole:
            raise CheckpointError(
                f"tensor {name} has shape {list(whole)} in {source}, but this model makes another of it (in a released "
                f"file {list(shape)}); are the sizes those of its {ASSETS}/config.json?"
            )


def _check_sizes(directory: Path, metadata: Any) -> None:
    """Check that the files named by `.metadata` exist and are as long as it says."""
    ends: dict[str, int] = {}
    for part in metadata.storage_data.values():
        ends[part.relative_path] = max(ends.get(part.relative_path, 0), part.offset + part.length)
    for name, end in ends.items():
        file = directory / name
        size = file.stat().st_size if file.is_file() else None
        if size is None or size < end:
            held = "lacks it" if size is None else f"has {size} of its {end} bytes or more"
            raise CheckpointError(f"{directory} is not complete: of {name} it {held}; copy it again")


def file_dtypes(directory: Path) -> dict[str, str]:
    """Dtype that each tensor has in released files. Raises `CheckpointError`."""
    file = directory / DTYPES
    try:
        dtypes = read_object(file, CheckpointError)
    except OSError as error:
        raise _unreadable(directory, error) from error
    known = tuple(tensor_files.DTYPES)
    unknown = next((name for name, dtype in dtypes.items() if dtype not in known), None)
    if unknown is not None:
        raise CheckpointError(
            f"{file} is damaged: it gives {brief(unknown)} the type {brief(dtypes[unknown])}, expected one of "
            f"{', '.join(known)}; copy {directory} again"
        )
    return dtypes


_METADATA = {  # what torch's writer puts into `.metadata`, by exact name: a dotted one would reach other modules
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
}


class _PlainMetadata(pickle.Unpickler):
    """Unpickles torch's checkpoint metadata and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or name in _METADATA.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_metadata(directory: Path) -> Any:
    """torch reads `.metadata` with plain pickle; read it first with one that knows torch's classes only."""
    try:
        metadata = _PlainMetadata(io.BytesIO((directory / ".metadata").read_bytes())).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"it holds {type(metadata).__name__}")
        return metadata
    except Exception as error:  # damaged bytes may lead pickle to any
        if is_fault_of_machine(error):
            raise
        raise CheckpointError(
            f"{directory}/.metadata is damaged or not of a checkpoint ({error}); if you made {directory}, copy it "
            "again, else do not load it"
        ) from None


# -- errors ----------------------------------------------------------------------------------------------------------

_UNREADABLE = (CheckpointException, CheckpointingException, OSError, RuntimeError)  # torch's is a BaseException


def _unreadable(directory: str | Path, error: BaseException) -> Exception:
    """What to raise: OSError where the disk failed, which no damage of the checkpoint is, else `CheckpointError`."""
    failures = [error]
    if isinstance(error, CheckpointException):
        failures = [failure for failure, _ in error.failures.values()]
    of_machine = next((failure for failure in failures if is_fault_of_machine(failure)), None)
    if isinstance(of_machine, OSError):
        return OSError(of_machine.errno, f"{directory} cannot be read ({of_machine}); when the disk works, start again")
    return CheckpointError(f"{directory} cannot be read ({reason(error)}); copy it again")


def reason(error: BaseException) -> str:
    """In one line: torch's own exception carries a traceback of each rank."""
    if isinstance(error, CheckpointException):
        rank, (failure, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {type(failure).__name__}: {failure}".splitlines()[0]
    return str(error)
