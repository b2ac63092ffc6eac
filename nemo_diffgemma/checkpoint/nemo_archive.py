"""`.nemo` archives: a tar of the run's configuration and the network in the released layout.

    model_config.yaml         configuration of the model class
    weights/                  config.json, *.safetensors, tokenizer: what `huggingface.save` writes

So an archive depends on no layout and holds no pickle. Only plain files under these two names are unpacked; a link, a
path that leaves the archive or any other member refuses the whole archive. No NeMo is needed to read one.
"""

from __future__ import annotations

import atexit
import os
import shutil
import socket
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

import torch.distributed as dist

from nemo_diffgemma.checkpoint import huggingface
from nemo_diffgemma.checkpoint.huggingface import Written
from nemo_diffgemma.checkpoint.tensor_files import CheckpointError
from nemo_diffgemma.model.network import Network
from nemo_diffgemma.parallel.agreement import agree_error

CONFIG, WEIGHTS = "model_config.yaml", "weights"


def is_archive(path: str | Path) -> bool:
    """Whether `path` is a tar file, whatever its name."""
    return Path(path).is_file() and tarfile.is_tarfile(path)


def write_archive(network: Network, path: str | Path, config: str = "") -> Written:
    """Write `network` and the YAML text `config` to `path`, replacing it when complete.

    Collective. Raises `CheckpointError` on every rank when it cannot be written.
    """
    target = Path(path).expanduser().absolute()
    error: Exception | None = None
    work = Path()
    if dist.get_rank() == 0:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
        except OSError as found:
            error = CheckpointError(f"cannot write {target}: {found}")
    agree_error(error)
    try:
        written = huggingface.save(network, work / WEIGHTS)
        if dist.get_rank() == 0:
            error = _pack(work, config, target)
        agree_error(error)
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(work, ignore_errors=True)
    return written


def _pack(work: Path, config: str, target: Path) -> CheckpointError | None:
    try:
        (work / CONFIG).write_text(config)
        with tarfile.open(work / "archive", "w") as archive:  # not compressed: weights do not shrink
            archive.add(work / CONFIG, CONFIG)
            archive.add(work / WEIGHTS, WEIGHTS)
        os.replace(work / "archive", target)
    except OSError as error:
        return CheckpointError(f"cannot write {target}: {error}")
    return None


def unpack(path: str | Path) -> Path:
    """Unpack an archive once on every machine -> a directory with its two members, removed when the process ends.

    Collective. It lies under TMPDIR and needs as much space as the archive. Raises `CheckpointError` on every rank.
    """
    source = Path(path).expanduser().absolute()
    error: CheckpointError | None = None
    directory: str | None = None
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        try:
            directory = tempfile.mkdtemp(prefix="nemo_diffgemma-")
            atexit.register(shutil.rmtree, directory, ignore_errors=True)
            extract(source, Path(directory))
        except OSError as found:
            error = CheckpointError(f"TMPDIR cannot be written ({found}); {source} is unpacked there")
        except CheckpointError as found:
            error = found
    agree_error(error)
    places = [(socket.gethostname(), directory)]
    if dist.get_world_size() > 1:
        everyone: list = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, places[0])
        places = everyone
    return Path(next(place for host, place in places if host == socket.gethostname() and place is not None))


def extract(source: Path, directory: Path) -> None:
    """The two members of an archive into `directory`. Raises `CheckpointError`."""
    try:
        with tarfile.open(source, "r:*") as archive:
            members = archive.getmembers()
            for member in members:
                _check(member, source)
            names = {member.name for member in members}
            if not {CONFIG, f"{WEIGHTS}/config.json"} <= names:
                raise CheckpointError(
                    f"{source} has no {CONFIG} and {WEIGHTS}/config.json, so it is an archive of another model class; "
                    "give one that DiffusionGemmaModel.save_to wrote"
                )
            archive.extractall(directory, members=members, filter="data")
    except (OSError, tarfile.TarError) as error:
        raise CheckpointError(
            f"{source} cannot be unpacked ({error}); is it a complete .nemo archive, and is there room for it in "
            f"{directory.parent}?"
        ) from None


def _check(member: tarfile.TarInfo, source: Path) -> None:
    parts = PurePosixPath(member.name).parts
    placed = parts == (CONFIG,) or (parts[:1] == (WEIGHTS,) and len(parts) <= 2 and ".." not in parts)
    plain = member.isfile() or (member.isdir() and parts == (WEIGHTS,))
    if not (placed and plain):
        raise CheckpointError(
            f"{source} holds {member.name!r} ({'a plain file' if member.isfile() else 'no plain file'}), which has no "
            f"place in a .nemo archive of this model ({CONFIG} and files of {WEIGHTS}/); do not use it unless you know "
            "who made it"
        )
