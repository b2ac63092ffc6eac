"""`.nemo` archives as NeMo writes them and as people pack them again; hostile and damaged ones."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemo_diffgemma.checkpoint import nemo_archive
from nemo_diffgemma.checkpoint.tensor_files import CheckpointError

FILES = {
    "model_config.yaml": b"seed: 1\n",
    "weights/config.json": b"{}",
    "weights/model.safetensors": bytes(5000),
    "weights/additional_chat_templates/tool_use.jinja": b"{{ tools }}",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The two members, unpacked."""
    place = tmp_path_factory.mktemp("unpacked")
    for name, content in FILES.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
    return place


def pack(archive: Path, mode: str, add: Callable[[tarfile.TarFile], object], **options) -> Path:
    with tarfile.open(archive, mode, **options) as tar:
        add(tar)
    return archive


def with_headers(tar: tarfile.TarFile, folder: Path) -> None:
    tar.pax_headers = {"comment": "packed again"}
    for name in sorted(FILES):
        member = tar.gettarinfo(folder / name, name)
        member.pax_headers = {"SCHILY.xattr.user.note": "x" * 200}
        with (folder / name).open("rb") as stream:
            tar.addfile(member, stream)


def from_a_mac(tar: tarfile.TarFile, folder: Path) -> None:
    for name in ("._model_config.yaml", "weights/._config.json"):
        member = tarfile.TarInfo("./" + name)
        member.size = 4
        tar.addfile(member, io.BytesIO(b"\0\5\26\7"))
    tar.add(folder, ".")


PACKED: dict[str, Callable[[Path, Path], Path]] = {
    "by NeMo": lambda file, folder: pack(file, "w:", lambda tar: tar.add(folder, arcname="./")),
    "by NeMo, compressed": lambda file, folder: pack(file, "w:gz", lambda tar: tar.add(folder, arcname="./")),
    "members alone": lambda file, folder: pack(file, "w", lambda tar: [tar.add(folder / n, n) for n in FILES]),
    "a folder": lambda file, folder: pack(file, "w:xz", lambda tar: tar.add(folder, "my_model")),
    "a deep folder": lambda file, folder: pack(file, "w", lambda tar: tar.add(folder, "./home/me/my_model")),
    "pax headers": lambda f, folder: pack(f, "w", lambda tar: with_headers(tar, folder), format=tarfile.PAX_FORMAT),
    "old gnu": lambda f, folder: pack(f, "w", lambda tar: tar.add(folder, "."), format=tarfile.GNU_FORMAT),
    "macOS": lambda file, folder: pack(file, "w", lambda tar: from_a_mac(tar, folder)),
}


@pytest.mark.parametrize("how", PACKED)
def test_every_way_to_pack_one_is_read(folder, tmp_path, how):
    archive = PACKED[how](tmp_path / "model.nemo", folder)
    assert nemo_archive.is_archive(archive)
    nemo_archive.extract(archive, tmp_path)
    archive.unlink()
    assert {str(f.relative_to(tmp_path)): f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == FILES


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname, made.size = kind, link, size
    return made


HOSTILE = {
    "parent": member("../escape"),
    "inner parent": member("weights/../../escape"),
    "parent in the folder": member("./weights/../../escape"),
    "absolute": member("/tmp/escape"),
    "symlink": member("weights/x.safetensors", tarfile.SYMTYPE, "/etc/passwd"),
    "hard link": member("weights/x.json", tarfile.LNKTYPE, "model_config.yaml"),
    "symlinked folder": member("weights/additional_chat_templates", tarfile.SYMTYPE, "/etc"),
    "device": member("weights/x.json", tarfile.CHRTYPE),
    "pipe": member("weights/x.json", tarfile.FIFOTYPE),
    "another folder": member("weights/deep/file"),
    "pickle": member("model_weights.ckpt"),
    "a file for a folder": member("weights/additional_chat_templates/x/y"),
}


@pytest.mark.parametrize("prefix", ["", "./", "my_model/"])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_members_refuse_the_archive(folder, tmp_path, name, prefix):
    def add(tar: tarfile.TarFile) -> None:
        tar.add(folder, prefix or ".")
        evil = HOSTILE[name]
        evil = evil.replace(name=evil.name if evil.name.startswith("/") else prefix + evil.name)
        tar.addfile(evil, io.BytesIO())

    archive = pack(tmp_path / "evil.nemo", "w", add)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="has no place in a .nemo archive"):
        nemo_archive.extract(archive, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_archive_larger_than_the_disk_is_refused_at_its_header(folder, tmp_path):
    def add(tar: tarfile.TarFile) -> None:
        tar.add(folder, ".")
        tar.fileobj.write(member("weights/x.safetensors", size=1 << 62).tobuf(tarfile.GNU_FORMAT))  # and no data

    archive = pack(tmp_path / "huge.nemo", "w", add)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="huge.nemo needs more than the .* GB that are free"):
        nemo_archive.extract(archive, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    mode=st.sampled_from(["w", "w:gz", "w:xz", "w:bz2"]),
    at=st.floats(0, 1),
    flip=st.integers(1, 255),
    cut=st.booleans(),
)
def test_a_damaged_archive_is_named_or_read(folder, tmp_path, mode, at, flip, cut):
    archive = pack(tmp_path / "model.nemo", mode, lambda tar: tar.add(folder, "."))
    content = bytearray(archive.read_bytes())
    position = min(int(at * len(content)), len(content) - 1)
    if cut:
        del content[position:]
    else:
        content[position] ^= flip
    archive.write_bytes(content)
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    try:
        nemo_archive.extract(archive, out)
    except CheckpointError as error:
        assert str(archive) in str(error) and "\n" not in str(error)


def test_an_archive_that_cannot_be_unpacked_leaves_nothing_in_tmpdir(single, folder, tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    archive = pack(tmp_path / "model.nemo", "w:gz", lambda tar: tar.add(folder, "."))
    archive.write_bytes(archive.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match="cannot be unpacked"):
        nemo_archive.unpack(archive)
    assert list((tmp_path / "tmp").iterdir()) == []
