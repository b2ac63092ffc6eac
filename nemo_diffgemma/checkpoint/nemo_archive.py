"""`.nemo` archives: a tar of the run's configuration and the network in the released layout.

    model_config.yaml         configuration of the model class
    weights/                  config.json, *.safetensors, tokenizer: what `huggingface.save` writes

So an archive depends on no layout and holds no pickle. Only plain files under these two names are unpacked; a link, a
path that leaves the archive or any other member refuses the whole archive. No NeMo is needed to read one.
"""

from __future__ import annotations

import contextlib
import lzma
import os
import shutil
import socket
import tarfile
import zlib
from functools import cache
from pathlib import Path, PurePosixPath

from nemo_diffgemma.checkpoint import huggingface
from nemo_diffgemma.checkpoint.assets import FOLDERS
from nemo_diffgemma.checkpoint.huggingface import Written
from nemo_diffgemma.checkpoint.tensor_files import CheckpointError
from nemo_diffgemma.model.network import Network
from nemo_diffgemma.parallel.agreement import all_or_none, gather, is_rank_zero, on_rank_zero
from nemo_diffgemma.repository import user_path
from nemo_diffgemma.scratch import obstacle, temporary_directory

CONFIG, WEIGHTS = "model_config.yaml", "weights"


def is_archive(path: str | Path) -> bool:
    """Whether `path` is a tar file, whatever its name."""
    return Path(path).is_file() and tarfile.is_tarfile(path)


def write_archive(network: Network, path: str | Path, config: str = "") -> Written:
    """Write `network` and the YAML text `config` to `path`, which appears when it is complete.

    Collective. Raises `CheckpointError` on every rank when `path` exists or cannot be written.
    """
    target = user_path(path).absolute()
    with contextlib.ExitStack() as stack:
        work = Path()
        with huggingface.writing(target):
            if is_rank_zero():
                work = stack.enter_context(huggingface.partial_of(target, is_directory=False))
        written = huggingface.save(network, work / WEIGHTS)
        with huggingface.writing(target):
            if is_rank_zero():
                pack(work, config, work / "archive")
                reason = obstacle(target, is_directory=False)  # again: writing took its time
                if reason is not None:
                    raise CheckpointError(reason)
                os.replace(work / "archive", target)
    return written


def pack(directory: Path, config: str, archive: Path) -> None:
    """The archive of `directory`, which has the weights, with this configuration. Raises OSError."""
    (directory / CONFIG).write_text(config, encoding="utf-8")
    with tarfile.open(archive, "w") as members:  # not compressed: weights do not shrink
        members.add(directory / CONFIG, CONFIG)
        members.add(directory / WEIGHTS, WEIGHTS)


def unpacked_weights(path: Path) -> Path:
    """The released-format directory inside an archive, unpacked once for as long as it is the same file. Collective."""

    def identity() -> tuple[str, int, int, int]:
        stat = path.stat()
        return str(path.absolute()), stat.st_ino, stat.st_size, stat.st_mtime_ns

    return _unpacked_weights(*on_rank_zero(identity))


@cache
def _unpacked_weights(path: str, *_: int) -> Path:
    return unpack(path) / WEIGHTS


def unpack(path: str | Path) -> Path:
    """Unpack an archive once on every machine -> a directory with its two members, removed when the process ends.

    Collective. It lies under TMPDIR and needs as much space as the archive. Raises `CheckpointError` on every rank.
    """
    source = user_path(path).absolute()
    directory: Path | None = None
    with all_or_none():
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            try:
                directory, stack = temporary_directory("nemo_diffgemma-unpacked")
                with contextlib.ExitStack() as failing:
                    failing.callback(stack.close)
                    extract(source, directory)
                    failing.pop_all()
            except OSError as failure:
                raise CheckpointError(f"TMPDIR cannot be written ({failure}); {source} is unpacked there") from failure
    places = gather((socket.gethostname(), directory))
    return next(place for host, place in places if host == socket.gethostname() and place is not None)


def extract(source: Path, directory: Path) -> None:
    """The two members of an archive into `directory`. Raises `CheckpointError`."""
    try:
        with tarfile.open(source, "r:*") as archive:
            members = _members(archive, source, shutil.disk_usage(directory).free)
            archive.extractall(directory, members=members, filter="data")
    except CheckpointError:
        raise
    except (OSError, tarfile.TarError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        reason = " ".join(str(error).split())  # tarfile's own may have many lines
        raise CheckpointError(
            f"{source} cannot be unpacked ({reason}); is it a complete .nemo archive, and is there room for it in "
            f"{directory.parent}?"
        ) from None


def _members(archive: tarfile.TarFile, source: Path, free: int) -> list[tarfile.TarInfo]:
    """The members to unpack, under their names in a directory of their own.

    Written by NeMo they begin with `./`; packed again by people they may lie in one folder, and macOS adds `._` files.
    """
    members: list[tuple[PurePosixPath, tarfile.TarInfo]] = []
    size = 0
    for member in archive:  # one after the other: a compressed bomb is refused at its header
        path = PurePosixPath(member.name)
        if path.name.startswith("._") and member.isfile() and ".." not in path.parts:
            continue
        size += member.size
        if size > free:
            raise CheckpointError(
                f"{source} needs more than the {free / 1e9:.1f} GB that are free where it is unpacked; set TMPDIR to a "
                "larger disk"
            )
        if path.is_absolute() or ".." in path.parts or not (member.isfile() or member.isdir()):
            raise _misplaced(member, source)
        members.append((path, member))
    parents = [path.parent for path, member in members if path.name == CONFIG and member.isfile()]
    prefix = min(parents, key=lambda parent: len(parent.parts), default=PurePosixPath())
    placed = []
    for path, member in members:
        if prefix.is_relative_to(path) and member.isdir():
            continue
        inside = path.relative_to(prefix) if path.is_relative_to(prefix) else None
        if inside is None or not _has_place(inside.parts, member):
            raise _misplaced(member, source)
        placed.append(member.replace(name=str(inside), deep=False))
    if not {CONFIG, f"{WEIGHTS}/config.json"} <= {member.name for member in placed}:
        raise CheckpointError(
            f"{source} has no {CONFIG} and {WEIGHTS}/config.json, so it is an archive of another model class; "
            "give one that DiffusionGemmaModel.save_to wrote"
        )
    return placed


def _has_place(parts: tuple[str, ...], member: tarfile.TarInfo) -> bool:
    if parts[:1] == (WEIGHTS,) and parts[1:2] and parts[1] in FOLDERS:
        return len(parts) == (2 if member.isdir() else 3)
    if member.isdir():
        return parts == (WEIGHTS,)
    return parts == (CONFIG,) or (parts[:1] == (WEIGHTS,) and len(parts) == 2)


def _misplaced(member: tarfile.TarInfo, source: Path) -> CheckpointError:
    return CheckpointError(
        f"{source} holds {member.name!r} ({'a plain file' if member.isfile() else 'no plain file'}), which has no "
        f"place in a .nemo archive of this model ({CONFIG} and files of {WEIGHTS}/); do not use it unless you know "
        "who made it"
    )
