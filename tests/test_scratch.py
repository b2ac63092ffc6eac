"""Scratch directories vanish with their block, whatever ends it, and what a killed process left is swept."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from nemo_diffgemma.scratch import follow_umask, obstacle, scratch_directory, sweep, temporary_directory


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt, GeneratorExit])
def test_any_exception_removes_it(tmp_path, error):
    with pytest.raises(error), scratch_directory(tmp_path, "model") as place:
        (place / "deep").mkdir()
        (place / "deep" / "file").write_text("half")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_what_was_renamed_stays(tmp_path):
    with scratch_directory(tmp_path, "model") as place:
        (place / "file").write_text("whole")
        place.rename(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"] and (tmp_path / "model" / "file").exists()


def child_in_scratch(parent: Path) -> int:
    """A process that has a scratch directory in `parent` and waits."""
    ready, write = os.pipe()
    child = os.fork()
    if child == 0:
        with scratch_directory(parent, "model") as place:
            (place / "file").write_text("half")
            os.write(write, b".")
            time.sleep(60)
        os._exit(0)
    os.close(write)
    assert os.read(ready, 1) == b"."
    os.close(ready)
    return child


def test_what_sigkill_left_is_swept_by_the_next_start_and_no_sooner(tmp_path):
    child = child_in_scratch(tmp_path)
    (left,) = tmp_path.iterdir()
    sweep(tmp_path)
    assert left.exists()  # its owner lives
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert (left / "file").exists()
    with scratch_directory(tmp_path, "another") as place:
        assert list(tmp_path.iterdir()) == [place]


@pytest.mark.parametrize(
    "name",
    [
        ".model.another-host.{dead}.0123abcd.partial",
        ".model.{host}.{dead}.0123abcd.backup",
        "model.{host}.{dead}.0123abcd.partial",
        ".model.partial",
        ".step-5.x.partial",
    ],
)
def test_what_is_not_ours_is_left_alone(tmp_path, name):
    """Of another machine on a shared file system, or of another program."""
    child = child_in_scratch(tmp_path)
    (left,) = tmp_path.iterdir()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    host, pid = left.name.split(".")[2:4]
    foreign = tmp_path / name.format(host=host, dead=pid)
    left.rename(foreign)
    file = tmp_path / f".file.{host}.{pid}.0123abcd.partial"
    file.write_text("no directory")
    sweep(tmp_path)
    assert foreign.exists() and file.exists()


def test_a_process_number_that_is_anothers_by_now_protects_nothing_for_long(tmp_path, monkeypatch):
    with scratch_directory(tmp_path, "model") as place:
        reused = tmp_path / place.name.replace(".model.", ".old.")
    reused.mkdir()
    sweep(tmp_path)
    assert reused.exists()  # as young as this, its owner may be about to lock it
    monkeypatch.setattr("nemo_diffgemma.scratch._SETTLED", -1.0)
    sweep(tmp_path)
    assert not reused.exists()


def test_a_temporary_directory_is_private_and_can_be_given_back_early(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    place, stack = temporary_directory("unpacked")
    assert place.parent == tmp_path and place.stat().st_mode & 0o777 == 0o700
    stack.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("umask", "files", "folders"), [(0o022, 0o644, 0o755), (0o002, 0o664, 0o775), (0o077, 0o600, 0o700)]
)
def test_permissions_follow_the_umask(tmp_path, umask, files, folders):
    other = tmp_path / "elsewhere"
    other.write_text("somebody's")
    other.chmod(0o640)
    before = os.umask(umask)
    try:
        with scratch_directory(tmp_path, "model") as place:
            (place / "deep").mkdir(mode=0o700)
            for file, mode in (
                (place / "narrow", 0o600),
                (place / "deep" / "wide", 0o777),
                (place / "read-only", 0o400),
            ):
                file.write_text("")
                file.chmod(mode)
            os.link(other, place / "link")
            follow_umask(place)
            modes = {path.name: path.stat().st_mode & 0o777 for path in [place, *place.rglob("*")]}
    finally:
        os.umask(before)
    assert modes.pop("link") == 0o640
    assert modes == {place.name: folders, "deep": folders, "narrow": files, "wide": files, "read-only": files}


def test_obstacles(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for free, is_directory in (
        ("new", True),
        ("new", False),
        ("deep/er/new", True),
        ("empty", True),
        ("a.nemo", False),
    ):
        assert obstacle(tmp_path / free, is_directory) is None
    for taken, is_directory, message in (
        ("full", True, "exists already"),
        ("full", False, "is a directory, but one file is to be written"),
        ("empty", False, "is a directory, but one file is to be written"),
        ("full/file", True, "exists already"),
        ("full/file", False, "exists already"),
        ("dangling", False, "exists already"),
        ("full/file/below", True, "full/file is not a directory; give another path"),
        ("x" * 300, True, "cannot write"),
    ):
        assert message in (obstacle(tmp_path / taken, is_directory) or ""), taken
    assert "is a mount point" in (obstacle(Path("/proc"), True) or "")
