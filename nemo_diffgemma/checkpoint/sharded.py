"""Sharded checkpoints: every rank writes what it holds, any layout reads it back.

Tensors go through Megatron's dist_checkpointing under layout-free names and whole shapes, described by the same `Shard`
that loading and initialisation use. A directory is complete in itself:

    .metadata, metadata.json, *.distcp     tensors `model.<name>`, and `optimizer.<kind>.<name>` if training wrote it
    assets/                                config.json, tokenizer, generation_config.json, carried vision tensors
    dtypes.json                            dtype of each tensor in the released files, for writing those back

It appears under its name only when complete. Loading unpickles nothing but torch's description of the tensors, and that
only after checking that it names no other class.
"""

from __future__ import annotations

import io
import json
import pickle
import queue
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.serialization import load_common_state_dict, load_tensors_metadata
from megatron.core.dist_checkpointing.strategies import filesystem_async
from safetensors.torch import save_file
from torch import Tensor

from nemo_diffgemma.checkpoint import huggingface
from nemo_diffgemma.checkpoint.huggingface import CheckpointError
from nemo_diffgemma.checkpoint.names import text_tensors
from nemo_diffgemma.model.network import Network
from nemo_diffgemma.parallel import megatron_cpu
from nemo_diffgemma.parallel.groups import agree_error, process_groups
from nemo_diffgemma.parallel.sharding import shard_of

MODEL = "model."
ASSETS, DTYPES = "assets", "dtypes.json"


def is_sharded(path: str | Path) -> bool:
    """Whether `path` is a complete sharded checkpoint."""
    directory = Path(path)
    return all((directory / name).is_file() for name in (".metadata", "metadata.json", f"{ASSETS}/config.json"))


# -- describing ------------------------------------------------------------------------------------------------------


def sharded_tensor(key: str, data: Tensor, like: Tensor, replica: int | None = None) -> ShardedTensor:
    """`data`, of the shape of `like`, as this rank's part of the whole tensor `key`.

    Of the ranks that hold the same part, the one whose replica number is all zeros writes it; `replica` replaces the
    number among data-parallel replicas.
    """
    shard, groups = shard_of(like), process_groups()
    if shard.expert:
        number = (0, groups.expt_dp.rank() if replica is None else replica)
    else:
        within = 0 if shard.cuts else groups.tp.rank()
        number = (within, groups.dp_cp.rank() if replica is None else replica)
    return ShardedTensor.from_rank_offsets(key, data.detach(), *shard.cuts, replica_id=number)


def sharded_state_dict(network: Network) -> dict[str, ShardedTensor]:
    """Every parameter and buffer, by its name in the checkpoint."""
    return {MODEL + name: sharded_tensor(MODEL + name, tensor, tensor) for name, tensor in text_tensors(network)}


# -- writing ---------------------------------------------------------------------------------------------------------


def save_sharded(
    network: Network,
    directory: str | Path,
    tensors: Mapping[str, ShardedTensor] | None = None,
    common: Mapping[str, Any] | None = None,
) -> None:
    """Write weights, assets, and what training adds: more `tensors`, and `common` plain values (rank 0's are kept).

    Collective. Raises `CheckpointError` on every rank when `directory` is not empty or cannot be written.
    """
    megatron_cpu.enable()
    with huggingface.new_directory(Path(directory)) as partial:
        paths = [partial]
        if dist.get_world_size() > 1:
            dist.broadcast_object_list(paths, src=0)
        assert paths[0] is not None
        state = {**sharded_state_dict(network), **(tensors or {}), **(common or {})}
        _write_in_process()
        dist_checkpointing.save(state, str(paths[0]))
        _on_first_rank(lambda: _write_beside(network, paths[0]))  # type: ignore[arg-type]


def _write_in_process() -> None:
    """Megatron passes the results of its writer through a queue in a process started by spawn, also where, as here, the
    writer runs in this process: 3 s at the first save, a script that must guard its main part, and a child that a
    signal to the job kills and that outlives a killed parent. A plain queue does.
    """
    filesystem_async._results_queue = filesystem_async._results_queue or queue.SimpleQueue()


def write_assets(network: Network, assets: Path) -> None:
    """What a checkpoint has beside the text model: configuration, tokenizer, carried vision tensors. Rank 0 only."""
    assets.mkdir(parents=True, exist_ok=True)
    carried = huggingface.carried_tensors(network)
    if carried:
        save_file(carried, assets / "model-vision.safetensors", metadata={"format": "pt"})
    huggingface.write_assets(network, assets)


def _write_beside(network: Network, directory: Path) -> None:
    write_assets(network, directory / ASSETS)
    (directory / DTYPES).write_text(json.dumps(network.file_dtypes))


# -- reading ---------------------------------------------------------------------------------------------------------


def load_sharded(network: Network, directory: str | Path) -> None:
    """Fill `network` from a sharded checkpoint of any layout: weights only, whatever else it holds.

    Raises `CheckpointError` on every rank, before any weight is set.
    """
    source = Path(directory)
    state = sharded_state_dict(network)
    agree_error(_error(lambda: _check(state, source)))
    read_tensors(state, source)
    network.file_dtypes = json.loads((source / DTYPES).read_text())
    network.assets = source / ASSETS


def read_tensors(state: dict[str, ShardedTensor], directory: Path) -> None:
    """Fill the data of `state` in place. Collective."""
    megatron_cpu.enable()
    wanted = {key: tensor.data for key, tensor in state.items()}
    try:
        loaded = dist_checkpointing.load(state, str(directory), validate_access_integrity=False)
    except (CheckpointingException, OSError, RuntimeError) as error:
        raise CheckpointError(f"{directory} cannot be read ({error}); is it copied completely?") from error
    with torch.no_grad():
        for key, data in wanted.items():
            if loaded[key].data_ptr() != data.data_ptr():
                data.copy_(loaded[key])


def read_common(directory: str | Path) -> dict[str, Any]:
    """The plain values that training stored; loaded as weights only, so no class but a container's is made."""
    _refuse_foreign_classes(Path(directory))
    return load_common_state_dict(str(directory))


def keys(directory: Path) -> dict[str, tuple[int, ...]]:
    """Name and whole shape of every tensor of a checkpoint."""
    return {key: tuple(found.global_shape) for key, found in load_tensors_metadata(str(directory)).items()}


def _check(state: Mapping[str, ShardedTensor], directory: Path) -> None:
    if not is_sharded(directory):
        raise CheckpointError(
            f"{directory} is not a complete sharded checkpoint: it needs .metadata, metadata.json and "
            f"{ASSETS}/config.json; was it copied completely?"
        )
    _refuse_foreign_classes(directory)
    found = keys(directory)
    missing = [key for key in state if key not in found]
    if missing:
        raise CheckpointError(
            f"{directory} lacks {len(missing)} tensors of this model, first {', '.join(missing[:3])}; are the sizes "
            f"those of its {ASSETS}/config.json?"
        )
    for key, tensor in state.items():
        if found[key] != tuple(tensor.global_shape):
            raise CheckpointError(
                f"tensor {key} has shape {list(found[key])} in {directory}, but this model makes it "
                f"{list(tensor.global_shape)}; are the sizes those of its {ASSETS}/config.json?"
            )


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


def _refuse_foreign_classes(directory: Path) -> None:
    """torch reads `.metadata` with plain pickle; read it first with one that knows torch's classes only."""
    try:
        _PlainMetadata(io.BytesIO((directory / ".metadata").read_bytes())).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError) as error:
        raise CheckpointError(
            f"{directory}/.metadata is damaged or not of a checkpoint ({error}); do not load it unless you made it"
        ) from None


# -- errors ----------------------------------------------------------------------------------------------------------


def _error(action: Callable[[], None]) -> Exception | None:
    try:
        action()
    except (CheckpointError, CheckpointingException, OSError) as error:
        return error
    return None


def _on_first_rank(action: Callable[[], None]) -> None:
    agree_error(_error(action) if dist.get_rank() == 0 else None)
