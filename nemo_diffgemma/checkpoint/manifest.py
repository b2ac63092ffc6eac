"""The manifest of a checkpoint: length and checksum of each of its files, written last and verified before loading.

    manifest.json    {"xxh3_128": {"weights_0.distcp": [BYTES, CHECKSUM], "assets/config.json": ...}, "manifest": ...}

    python -m nemo_diffgemma.checkpoint.manifest DIRECTORY      # after a file was changed on purpose: seal it anew

XXH3 finds damage (a bit that a disk, a network or a copy has turned) and hashes 6 GB/s on a core, where zlib's CRC-32
makes 1 GB/s and SHA-256 0.4; against a forger neither helps, since who changes a file can change the manifest too.
A checkpoint of an older version has no manifest: it is loaded by the lengths of its files alone. `manifest` is the
checksum of the list itself, so that a damaged name does not leave its file unread.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch.distributed as dist
import xxhash

from nemo_diffgemma.checkpoint.tensor_files import CheckpointError
from nemo_diffgemma.json_files import is_whole, read_object
from nemo_diffgemma.parallel.agreement import all_or_none, gather
from nemo_diffgemma.scratch import put_on_disk

MANIFEST = "manifest.json"
_HASH, _OWN = "xxh3_128", "manifest"
_PIECE = 1 << 24  # bytes hashed at a time

Digest = tuple[int, str]  # bytes, checksum


class HashedFile(io.RawIOBase):
    """A new file that is hashed as it is written, and on the disk when it is closed.

    What a disk says is raised again when it is closed: `torch.save` makes something else of it.
    """

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("wb")
        self._hash, self._size = xxhash.xxh3_128(), 0
        self._failure: OSError | None = None

    def write(self, data: Any) -> int:
        if self._failure is not None:
            raise self._failure
        view = memoryview(data).cast("B")
        self._hash.update(view)
        self._size += len(view)
        try:
            return self._file.write(view)
        except OSError as failure:
            self._failure = failure
            raise

    def tell(self) -> int:
        return self._size

    def close(self) -> None:
        if self._file.closed:
            return
        try:
            with self._file:
                self._file.flush()
                os.fsync(self._file.fileno())
        except OSError as failure:
            self._failure = self._failure or failure
        super().close()
        if self._failure is not None:
            raise self._failure

    @property
    def digest(self) -> Digest:
        return self._size, self._hash.hexdigest()


def seal(directory: Path, known: Mapping[str, Digest]) -> None:
    """Write the manifest of `directory`, whose files but the `known` ones are hashed and put on the disk here."""
    digests, entries = dict(known), sorted(directory.rglob("*"))
    for file in entries:
        name = str(file.relative_to(directory))
        if file.is_file() and name not in (*digests, MANIFEST):
            digests[name] = _digest(file)
            put_on_disk(file)
    with HashedFile(directory / MANIFEST) as stream:
        manifest = {_HASH: digests, _OWN: _checksum(digests)}
        stream.write((json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode())
    for folder in (*filter(Path.is_dir, entries), directory):  # names, too, are on the disk before anybody sees them
        put_on_disk(folder)


def _checksum(digests: Mapping[str, Digest]) -> str:
    listed = {name: list(digest) for name, digest in digests.items()}
    return xxhash.xxh3_128_hexdigest(json.dumps(listed, sort_keys=True).encode())


def verify(directory: Path, wanted: Callable[[str], bool]) -> None:
    """Compare the `wanted` files of a checkpoint with its manifest, if there is one.

    Collective: ranks that see the same directory share its files; on a disk of each machine each has its own.
    Raises `CheckpointError` on every rank where one is damaged or missing, and OSError where one cannot be read.
    """
    with all_or_none():
        digests = _read(directory)
    mine, sharers = _share(directory)
    with all_or_none():
        names = sorted(filter(wanted, digests))
        for name in names[mine::sharers]:
            file = directory / name
            size = file.stat().st_size if file.is_file() else None
            if size != digests[name][0] or _digest(file) != digests[name]:
                what = "lacks" if size is None else "is damaged:"
                raise CheckpointError(
                    f"{directory} {what} {name} ({MANIFEST} has its length and checksum); copy it again, or "
                    f"if you changed it: python -m nemo_diffgemma.checkpoint.manifest {directory}"
                )


def _share(directory: Path) -> tuple[int, int]:
    """Which of how many ranks this is among those that see the same directory. Collective."""
    file = directory / MANIFEST
    stat = file.stat() if file.is_file() else None
    places = gather(stat and (stat.st_ino, stat.st_ctime_ns))
    alike = [rank for rank, place in enumerate(places) if place == places[_rank()]]
    return alike.index(_rank()), len(alike)


def _read(directory: Path) -> dict[str, Digest]:
    file = directory / MANIFEST
    if not file.is_file():
        return {}
    manifest = read_object(file, CheckpointError)
    digests = manifest.get(_HASH)
    if not isinstance(digests, dict) or not all(
        isinstance(value, list) and len(value) == 2 and is_whole(value[0], most=2**63) and isinstance(value[1], str)
        for value in digests.values()
    ):
        raise CheckpointError(f"{file} is damaged: expected {_HASH} of each file; copy {directory} again")
    known = {name: (size, checksum) for name, (size, checksum) in digests.items()}
    if manifest.get(_OWN) != _checksum(known):
        raise CheckpointError(f"{file} is damaged: its list has another checksum; copy {directory} again")
    return known


def _digest(file: Path) -> Digest:
    state, size, buffer = xxhash.xxh3_128(), 0, bytearray(_PIECE)
    with file.open("rb", buffering=0) as stream:
        while read := stream.readinto(buffer):
            state.update(memoryview(buffer)[:read])
            size += read
    return size, state.hexdigest()


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


if __name__ == "__main__":
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / ".metadata").is_file():
        print("give the directory of one sharded checkpoint: it is sealed anew, as its files are now", file=sys.stderr)
        raise SystemExit(2)
    seal(Path(sys.argv[1]), {})
