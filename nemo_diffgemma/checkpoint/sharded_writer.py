"""Writing a sharded checkpoint: planned by all ranks together, written by each, renamed when all are done.

    SaveInProgress(network, directory).write()                       # here and now

    save = SaveInProgress(network, directory, copies(tensors), common, group)
    threading.Thread(target=save.write).start()                      # while steps change the tensors

Planning asks Megatron and torch where everything goes, over the default process group; `write` needs no other rank but
at its end, over `group`: gloo, of all ranks, with nobody else using it. A thread is enough, since writing and hashing
leave the interpreter's lock; a forked process would be none that may have touched CUDA.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.strategies import torch as megatron_torch
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import SerializationFormat, _StoragePrefix, _write_item
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from nemo_diffgemma.checkpoint import huggingface, sharded
from nemo_diffgemma.checkpoint.manifest import Digest, HashedFile, seal
from nemo_diffgemma.checkpoint.tensor_files import CheckpointError
from nemo_diffgemma.lora.peft_files import collected
from nemo_diffgemma.model.network import Network
from nemo_diffgemma.parallel import megatron_cpu
from nemo_diffgemma.parallel.agreement import from_rank_zero, gather
from nemo_diffgemma.repository import user_path


def save_sharded(network: Network, directory: str | Path) -> None:
    """Write weights and assets to `directory`, which appears when it is complete.

    Collective. Raises `CheckpointError` on every rank when `directory` is not empty or cannot be written.
    """
    SaveInProgress(network, directory).write()


def copy_to_host(tensor: Tensor) -> Tensor:
    """A copy in the host's memory that later changes do not reach.

    From CUDA into pinned memory, without waiting: it is complete when an event is that was recorded afterwards on the
    same stream, and what later work of this stream writes into `tensor` comes after it.
    """
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return copy.copy_(tensor.detach(), non_blocking=True)


def copies(tensors: Mapping[str, ShardedTensor]) -> dict[str, ShardedTensor]:
    """With a copy of the data of those that this rank writes; the others are only described."""
    return {
        key: dataclasses.replace(one, data=copy_to_host(one.data)) if is_main_replica(one.replica_id) else one
        for key, one in tensors.items()
    }


class SaveInProgress:
    """A checkpoint that is planned; `write` makes it appear.

    `tensors` are what it holds, else the weights of `network`: copies where something changes them before `write` ends.
    `common` are plain values, of which rank 0's are kept. Collective. Raises `CheckpointError` on every rank when
    `directory` cannot be written.
    """

    def __init__(
        self,
        network: Network,
        directory: str | Path,
        tensors: Mapping[str, ShardedTensor] | None = None,
        common: Mapping[str, Any] | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        megatron_cpu.enable()
        self.directory = user_path(directory)
        self._network, self._group = network, group
        with contextlib.ExitStack() as stack:
            self._partial = stack.enter_context(huggingface.new_directory(self.directory, group))
            self._shared = from_rank_zero(self._partial)
            assert self._shared is not None
            self._adapter = None if network.lora is None else collected(network)
            if tensors is None:
                tensors = sharded.sharded_state_dict(network) if network.lora is None else {}
            self._plan = self._planned({**tensors, **copy.deepcopy(dict(common or {}))})
            self._copied = torch.cuda.Event() if torch.cuda.is_available() else None
            if self._copied is not None:
                self._copied.record()
            self._end = stack.pop_all()

    def _planned(self, state: dict[str, Any]) -> _Plan:
        try:
            return dist_checkpointing.save(state, str(self._shared), _Planning(), async_sharded_save=True)
        except (CheckpointException, OSError) as failure:  # torch tells every rank what befell one of them
            raise CheckpointError(f"cannot write {self.directory}: {sharded.reason(failure)}") from failure

    def write(self) -> None:
        """Write this rank's files, and wait for the others'. Collective, like the constructor in its errors."""
        with self._end:  # removes what there is unless it is renamed
            if self._copied is not None:
                self._copied.synchronize()
            written: dict[str, tuple[list[WriteResult], Digest]] = {}
            with huggingface.writing(self._shared, self._group):
                if self._partial is not None:  # first: what is wrong with them is said before much is written
                    _write_beside(self._network, self._partial)
                    if self._adapter is not None:
                        self._adapter.write(self._partial)
                written = self._plan.write()
            parts = gather({name: digest for name, (_, digest) in written.items()}, self._group)
            results = gather([result for part, _ in written.values() for result in part], self._group)
            with huggingface.writing(self._shared, self._group):
                if self._partial is not None:
                    self._plan.describe(results)
                    seal(self._partial, {name: digest for part in parts for name, digest in part.items()})


def _write_beside(network: Network, directory: Path) -> None:
    sharded.write_assets(network, directory / sharded.ASSETS)
    (directory / sharded.DTYPES).write_text(json.dumps(network.file_dtypes))


# -- Megatron's and torch's format -----------------------------------------------------------------------------------


class _Planning(megatron_torch.TorchDistSaveShardedStrategy):
    """Megatron's strategy up to where it would write."""

    def async_save(self, sharded_state_dict: Any, checkpoint_dir: Path, async_strategy: str = "") -> _Plan:
        grouped, _, _ = megatron_torch._replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        planner = megatron_torch.MCoreSavePlanner(
            dedup_replicated_tensors=False, flatten_state_dict=False, flatten_sharded_tensors=False
        )
        writer = PlanWriter(checkpoint_dir)
        (_, metadata, _), *_ = save_state_dict_async_plan(
            megatron_torch.mcore_to_pyt_state_dict(grouped, False), writer, planner=planner
        )
        return _Plan(writer, metadata, CheckpointingConfig(self.backend, self.version))


class PlanWriter(FileSystemWriter):
    """torch's writer, of which Megatron's planning asks nothing but to keep the plan."""

    can_run_decentralized_global_plan = True
    plan: SavePlan
    planner: SavePlanner

    @property
    def checkpoint_id(self) -> str:
        return str(self.path)  # goes into .metadata, which may name no class but torch's

    def prepare_decentralized_global_plan(self, plan: SavePlan) -> SavePlan:
        return dataclasses.replace(plan, storage_data=_StoragePrefix(""))

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        self.plan, self.planner = plan, planner


@dataclasses.dataclass
class _Plan:
    """What this rank has to write. `metadata` is rank 0's, of all ranks."""

    writer: PlanWriter
    metadata: Metadata | None
    config: CheckpointingConfig
    finalize_fns: list[Any] = dataclasses.field(default_factory=list)  # Megatron's, which nobody calls

    def write(self) -> dict[str, tuple[list[WriteResult], Digest]]:
        """Write this rank's files, one tensor after the other -> what is in each.

        Each kind has a file of its own: who wants the weights reads and verifies nothing else.
        """
        rank, written = dist.get_rank(), {}
        items_of: dict[str, list[WriteItem]] = {}
        for item in self.writer.plan.items:
            plain = item.type == WriteItemType.BYTE_IO
            items_of.setdefault(sharded.WEIGHTS if plain else sharded.file_kind(item.index.fqn), []).append(item)
        for kind, items in items_of.items():
            name = f"{kind}_{rank}.distcp"
            with HashedFile(Path(self.writer.path) / name) as stream:
                results = [self._write(item, name, stream) for item in items]
            written[name] = (results, stream.digest)
        return written

    def _write(self, item: WriteItem, name: str, stream: HashedFile) -> WriteResult:
        data = self.writer.planner.resolve_data(item)
        if item.type != WriteItemType.BYTE_IO:
            assert isinstance(data, Tensor)
            data = data.detach().cpu()
            if data.untyped_storage().nbytes() != data.nbytes:  # torch.save would write all of it
                data = data.clone()
        return _write_item(self.writer.transforms, stream, data, item, name, SerializationFormat.TORCH_SAVE)

    def describe(self, results: list[list[WriteResult]]) -> None:
        """Write the description of all ranks' files; rank 0 only."""
        assert self.metadata is not None
        self.writer.finish(self.metadata, results)
        save_config(self.config, str(self.writer.path))
