"""From one format into another without the network: a few blocks of rows are held, whatever the size of the model.

    convert("CKPT", "out", "sharded")       # collective: the processes share the files that are written

What is written lies in `.<target>.converting` beside the target until it is complete. Interrupted, killed or out of
disk, the same conversion goes on there with the file that it was at, as long as its source is the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from nemo_diffgemma.checkpoint import average, huggingface, nemo_archive, sharded, stored
from nemo_diffgemma.checkpoint.assets import write_assets
from nemo_diffgemma.checkpoint.names import CARRIED_PREFIXES, our_name, released_tensors
from nemo_diffgemma.checkpoint.open import format_of
from nemo_diffgemma.checkpoint.stored import StoredTensor
from nemo_diffgemma.checkpoint.streamed_files import ReleasedFiles, ShardedFiles, TargetFiles
from nemo_diffgemma.checkpoint.tensor_files import CheckpointError, TensorFiles, tied_to
from nemo_diffgemma.config import ModelConfig
from nemo_diffgemma.errors import UserError
from nemo_diffgemma.lora import merging
from nemo_diffgemma.lora.opening import base_of, verify
from nemo_diffgemma.lora.peft_files import AdapterDirectory
from nemo_diffgemma.non_finite import DAMAGED, first_non_finite
from nemo_diffgemma.parallel.agreement import all_or_none, gather, is_rank_zero, on_rank_zero, world_size
from nemo_diffgemma.repository import user_path
from nemo_diffgemma.scratch import follow_umask, obstacle, put_on_disk

_VERSION = 1  # of what lies in a `.converting` directory
_log = logging.getLogger(__name__)


@dataclass
class Source:
    """A checkpoint to convert: its tensors as they lie on the disk, by released name, and what is beside them.

    Assets are written from it as from a network.
    """

    model_config: ModelConfig
    tensors: dict[str, StoredTensor]  # of the text model: as a directory has them, or with our shapes
    carried: dict[str, StoredTensor]
    file_dtypes: dict[str, str]  # safetensors' names: what a released-format directory stores them as
    dtype: torch.dtype  # that holds every value of the text model exactly
    assets: Path
    files: list[Path]  # the checkpoint itself, for its identity
    copies: dict[str, StoredTensor] = field(default_factory=dict)  # of tied weights
    averaged: bool = False  # trained weights are those of the run's average, which its optimizer's files hold
    adapter: AdapterDirectory | None = None  # of which `tensors` have what it adds

    @classmethod
    def open(cls, path: str | Path, weights: str = "trained") -> Source:
        """From headers; a `.nemo` is unpacked, and an adapter is its base with what it adds. Collective.

        `weights` "ema": the average that a run has kept in place of the trained ones.

        Raises `CheckpointError` on every rank where a tensor is missing, foreign or of another shape.
        """
        kind, place = format_of(path), user_path(path)
        if kind == "adapter":
            if weights == "ema":
                raise CheckpointError(f"{place} is an adapter, of which no average is taken; leave weights=ema out")
            return cls._of_adapter(place)
        directory = nemo_archive.unpacked_weights(place) if kind == "nemo" else place
        source: list[Source] = []
        with all_or_none():
            if weights == "ema" and kind != "sharded":
                raise average.no_average(place)
            source.append(cls._of_sharded(place, weights) if kind == "sharded" else cls._of_directory(directory))
        if kind == "nemo":
            source[0].files = [place]
        return source[0]

    @classmethod
    def _of_adapter(cls, directory: Path) -> Source:
        with all_or_none():
            adapter = AdapterDirectory(directory)
            base = base_of(adapter)
        source = cls.open(base)
        with all_or_none():
            sizes = adapter.sizes(source.model_config)
            tensors = merging.merged(source.tensors, adapter, sizes, source.model_config.num_experts)
        files = source.files + merging.files_of(directory)
        return dataclasses.replace(source, tensors=tensors, files=files, adapter=adapter)

    def verify(self) -> None:
        """Read what is to be checked before anything is written. Collective; raises `CheckpointError`."""
        if self.assets.name == sharded.ASSETS and sharded.is_sharded(self.assets.parent):
            sharded.verify(self.assets.parent, kinds=[sharded.WEIGHTS, sharded.TRAINING][: 1 + self.averaged])
        if self.adapter is not None:
            verify(self.adapter)
            merging.check_base(self.tensors, self.adapter, self.adapter.base)
        with all_or_none():
            for name in sorted(self.copies)[_rank() :: world_size()]:
                _check_copy(name, self.copies[name], self.tensors[str(tied_to(name))])

    @classmethod
    def _of_directory(cls, directory: Path) -> Source:
        config = ModelConfig.from_pretrained(directory)
        huggingface.check(config, directory)
        with TensorFiles(directory) as files:
            every = stored.of_files(files)
            copies = {name: every[name] for name in files.copies}
            there = sorted({*files.files.values(), *files.copies.values()})
        tensors = {name: every[name] for name in released_tensors(config)}
        dtypes = {name: stored.NAMES[tensor.dtype] for name, tensor in tensors.items()}
        return cls(config, tensors, _carried(every), dtypes, _common_dtype(tensors), directory, there, copies)

    @classmethod
    def _of_sharded(cls, directory: Path, weights: str) -> Source:
        assets = directory / sharded.ASSETS
        config = ModelConfig.from_pretrained(assets)
        sharded.check(config, directory)
        metadata = sharded.read_metadata(directory)
        ours = stored.of_sharded(directory, metadata, sharded.MODEL)
        tensors = {name: ours[our_name(name)] for name in released_tensors(config)}
        dtypes = {name: stored.NAMES[tensor.dtype] for name, tensor in tensors.items()}
        common = _common_dtype(tensors)
        if weights == "ema":
            averaged = stored.of_sharded(directory, metadata, average.PREFIX)
            if not averaged:
                raise average.no_average(directory)
            ours |= averaged
            tensors = {name: ours[our_name(name)] for name in tensors}
        carried = {}
        if any(assets.glob("*.safetensors")):
            with TensorFiles(assets) as files:
                carried = _carried(stored.of_files(files))
        of_files = {**dtypes, **sharded.file_dtypes(directory)}
        there = sorted({part.file for tensor in ours.values() for part in tensor.parts})
        return cls(config, tensors, carried, of_files, common, assets, there, averaged=weights == "ema")

    def identity(self) -> list[Any]:
        """Changes with the files, also where one is copied over with the time of the old one. Raises OSError."""
        stats = [(str(file.absolute()), file.stat()) for file in self.files]
        return [[name, stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns] for name, stat in stats]


def _carried(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(CARRIED_PREFIXES)}


def _common_dtype(tensors: dict[str, StoredTensor]) -> torch.dtype:
    low = {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    return torch.bfloat16 if low else torch.float32


def _check_copy(name: str, copy: StoredTensor, original: StoredTensor) -> None:
    same = copy.shape == original.shape and all(
        torch.equal(copy.rows(*rows).float(), original.rows(*rows).float()) for rows in original.blocks()
    )
    if not same:
        raise CheckpointError(
            f"{name} in {copy.parts[0].file} differs from {tied_to(name)}, but DiffusionGemma has one weight for both "
            "(tie_word_embeddings); a checkpoint with the two untied is of another architecture"
        )


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


# -- converting ------------------------------------------------------------------------------------------------------


def plan(source: str | Path, format: str, weights: str = "trained") -> tuple[Source, TargetFiles]:
    """What would be converted into which files, from headers. Collective; raises `CheckpointError` on every rank."""
    opened = Source.open(source, weights)
    files: TargetFiles = ShardedFiles(opened) if format == "sharded" else ReleasedFiles(opened)
    mapping = files.mapping()
    assert mapping.keys() == opened.tensors.keys() | opened.carried.keys(), "a tensor has no place"
    assert len({*mapping.values()}) == len(mapping), "two tensors have one place"
    return opened, files


def convert(source: str | Path, target: str | Path, format: str, weights: str = "trained") -> None:
    """Write `source`, of any format, to `target`. Collective; the caller has checked the target.

    `weights` "ema" takes the average that a run has kept.

    Raises `CheckpointError` on every rank where the source is no sound checkpoint or the target cannot be written.
    """
    with sharded.in_use(user_path(source)):
        opened, files = plan(source, format, weights)
        opened.verify()
        _convert(opened, files, user_path(target).absolute(), format)


def _convert(opened: Source, files: TargetFiles, place: Path, format: str) -> None:
    identity = opened.identity()
    what = json.dumps({"version": _VERSION, "format": format, "files": files.names, "source": identity})
    with _converting(place, what) as work:
        weights = work / "out" / nemo_archive.WEIGHTS if format == "nemo" else work / "out"
        with _kept(work):
            if is_rank_zero():
                weights.mkdir(parents=True, exist_ok=True)
        with _kept(work):
            _write_share(opened, files, weights, work / "done")
        with _kept(work):
            if is_rank_zero():
                done = [json.loads(_marker(work / "done", name).read_text()) for name in files.names]
                assets = weights / sharded.ASSETS if format == "sharded" else weights
                assets.mkdir(exist_ok=True)
                write_assets(opened, assets)
                files.finish(weights, done)
                follow_umask(work / "out")
                if opened.identity() != identity:
                    raise CheckpointError(f"{opened.files[0].parent} was changed meanwhile; convert it again")
                _appear(work, place, format)


def _write_share(source: Source, files: TargetFiles, directory: Path, done: Path) -> None:
    """Write this rank's files that are not there yet; a bar on rank 0 shows its share."""
    done.mkdir(exist_ok=True)
    names = files.names[_rank() :: world_size()]
    sizes = {name: files.size(name) for name in names}
    total, mine = sum(sizes.values()), is_rank_zero()
    with tqdm(total=total, unit="B", unit_scale=True, file=sys.stderr, mininterval=1, disable=not mine) as bar:
        for name in names:
            if _is_done(_marker(done, name), directory / name):
                bar.update(sizes[name])
                continue
            written = files.write(directory, name, lambda block, of: bar.update(_checked(source, block, of)))
            written["size"] = (directory / name).stat().st_size
            partial = _marker(done, f"{name}.partial")
            partial.write_text(json.dumps(written))
            put_on_disk(partial)
            partial.replace(_marker(done, name))


def _marker(done: Path, name: str) -> Path:
    return done / f"{name.replace('/', '-')}.json"


def _is_done(marker: Path, file: Path) -> bool:
    """Whether a file is there as it was written: a conversion that was killed at its very end leaves markers only."""
    try:
        return json.loads(marker.read_text())["size"] == file.stat().st_size
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _checked(source: Source, block: Tensor, name: str) -> int:
    """Bytes of a block that is fit to be written. Raises `CheckpointError` where a weight is NaN or infinite."""
    if not name.startswith(CARRIED_PREFIXES):
        weight = first_non_finite([(name, block)])
        if weight is not None:
            raise CheckpointError(f"{weight}, in {source.assets}: {DAMAGED}")
    return block.nbytes


def _appear(work: Path, target: Path, format: str) -> None:
    out = work / "out"
    if format == "nemo":
        nemo_archive.pack(out, "", work / "archive")
        out = work / "archive"
    reason = obstacle(target, is_directory=format != "nemo")  # again: writing took its time
    if reason is not None:
        raise CheckpointError(reason)
    if target.is_dir():
        target.rmdir()
    out.rename(target)
    put_on_disk(target.parent)
    shutil.rmtree(work, ignore_errors=True)


# -- what an interruption leaves -------------------------------------------------------------------------------------


@contextlib.contextmanager
def _converting(target: Path, what: str) -> Iterator[Path]:
    """The directory of an unfinished conversion, this process's alone, emptied unless it is of the same work `what`."""
    work, held = target.with_name(f".{target.name}.converting"), -1

    def begin() -> None:
        nonlocal held
        try:
            work.mkdir(parents=True, exist_ok=True)
            held = _lock(work, target)
            if not (work / "plan.json").is_file() or (work / "plan.json").read_text() != what:
                if any((work / "done").glob("*.json")):
                    _log.warning(
                        "%s was left by the conversion of another source, or of this one before it changed: what it "
                        "had done is removed, and this one begins anew", work,
                    )  # fmt: skip
                for entry in work.iterdir():
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
                (work / "plan.json").write_text(what)
            elif any((work / "done").glob("*.json")):
                _log.warning("going on with the conversion that was interrupted in %s", work)
        except OSError as error:
            raise CheckpointError(f"cannot write {work}: {error}") from error

    try:
        on_rank_zero(begin)
        yield work
    finally:
        if held >= 0:
            os.close(held)


def _lock(work: Path, target: Path) -> int:
    descriptor = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise CheckpointError(
            f"another process converts into {target} now; wait for it, or give another path"
        ) from None
    except OSError:  # a file system without locks
        pass
    return descriptor


class _DiskError(CheckpointError):
    """The target cannot be written."""


@contextlib.contextmanager
def _kept(work: Path) -> Iterator[None]:
    """Collective block. What a full or failing disk leaves is kept and told; after an error of the source nothing."""
    try:
        with all_or_none():
            try:
                yield
            except OSError as error:
                raise _DiskError(
                    f"cannot convert: {error}; what is done stays in {work}, and the same command goes on from there"
                ) from error
    except UserError as error:
        of_disk = any(gather(isinstance(error, _DiskError)))
        if is_rank_zero() and not of_disk:
            shutil.rmtree(work, ignore_errors=True)
        raise
