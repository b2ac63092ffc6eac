"""Whatever happens to a file of a sharded checkpoint is noticed, by name, before a weight is set."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemo_diffgemma import DiffusionGemma
from nemo_diffgemma.checkpoint import manifest, sharded
from nemo_diffgemma.checkpoint.open import save_network
from nemo_diffgemma.checkpoint.tensor_files import CheckpointError
from tests import commands
from tests.distributed import cases


@pytest.fixture(scope="module")
def written(single, checkpoint, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("written") / "model"
    save_network(cases.load(checkpoint("base"), {}), path, "sharded")
    return path


KINDS = ("missing", "empty", "cut", "longer", "zeros from a block on", "one byte doubled", "two halves turned")


def files(directory: Path) -> list[str]:
    return sorted(str(file.relative_to(directory)) for file in directory.rglob("*") if file.is_file())


def test_every_file_is_in_the_manifest(written):
    assert sorted([*json.loads((written / manifest.MANIFEST).read_text())["xxh3_128"], manifest.MANIFEST]) == files(
        written
    )
    sharded.verify(written)


@given(data=st.data())
def test_one_bit_of_any_file_is_noticed(written, data):
    name = data.draw(st.sampled_from([name for name in files(written) if name != manifest.MANIFEST]))
    content = (written / name).read_bytes()
    position = data.draw(st.integers(0, len(content) - 1))
    bit = data.draw(st.sampled_from([1 << number for number in range(8)]))
    try:
        (written / name).write_bytes(bytes([*content[:position], content[position] ^ bit, *content[position + 1 :]]))
        with pytest.raises(CheckpointError, match=name) as told:
            manifest.verify(written, lambda _: True)
        with pytest.raises(CheckpointError, match=str(written)):
            sharded.verify(written)
        assert "copy it again" in str(told.value) and "\n" not in str(told.value)
    finally:
        (written / name).write_bytes(content)


def damage(content: bytes, kind: str, at: int) -> bytes | None:
    """What a disk, a copy or a power cut make of a file; None: it is not there."""
    half = min(at, len(content) - 1)
    return {
        "missing": None,
        "empty": b"",
        "cut": content[:half],
        "longer": content + content[:1],
        "zeros from a block on": content[:half] + bytes(len(content) - half) if any(content[half:]) else b"",
        "one byte doubled": content[:half] + content[half : half + 1] + content[half:],
        "two halves turned": content[half:] + content[:half] if content[half:] + content[:half] != content else b"",
    }[kind]


@given(data=st.data())
def test_whatever_happens_to_any_file_is_noticed(written, data):
    """To the manifest as well."""
    name = data.draw(st.sampled_from(files(written)))
    content = (written / name).read_bytes()
    kind = data.draw(st.sampled_from(KINDS))
    damaged = damage(content, kind, data.draw(st.integers(0, len(content) - 1)))
    try:
        (written / name).unlink() if damaged is None else (written / name).write_bytes(damaged)
        with pytest.raises(CheckpointError, match=str(written)) as told:
            sharded.verify(written)
        assert name in str(told.value) and "copy it again" in str(told.value) and "\n" not in str(told.value)
    finally:
        (written / name).write_bytes(content)
    sharded.verify(written)


@given(data=st.data())
def test_one_bit_of_the_manifest_is_noticed_or_says_the_same(written, data):
    file = written / manifest.MANIFEST
    content = file.read_bytes()
    position = data.draw(st.integers(0, len(content) - 1))
    flipped = content[position] ^ data.draw(st.sampled_from([1 << number for number in range(8)]))
    try:
        file.write_bytes(bytes([*content[:position], flipped, *content[position + 1 :]]))
        try:
            same = json.loads(file.read_bytes()) == json.loads(content)
        except ValueError:
            same = False
        if same:  # a space
            sharded.verify(written)
        else:
            with pytest.raises(CheckpointError, match=manifest.MANIFEST):
                sharded.verify(written, kinds=[sharded.WEIGHTS])
    finally:
        file.write_bytes(content)


def test_a_file_that_was_changed_on_purpose_is_sealed_anew(written, tmp_path):
    changed = tmp_path / "model"
    shutil.copytree(written, changed)
    settings = changed / "assets" / "generation_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"max_new_tokens": 8}))
    with pytest.raises(CheckpointError, match=f"if you changed it: python -m {manifest.__name__} {changed}"):
        DiffusionGemma.from_checkpoint(changed)
    command = "nemo_diffgemma/checkpoint/manifest.py"
    refused = commands.run(command, str(tmp_path))
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert commands.run(command, str(changed)).returncode == 0
    sharded.verify(changed)
    DiffusionGemma.from_checkpoint(changed)


def test_a_copy_of_each_machine_is_verified_there(pool, written, tmp_path):
    """Ranks that see one directory share its files; a copy elsewhere that is damaged is named, on every rank."""
    places = [tmp_path / "one", tmp_path / "two"]
    for place in places:
        shutil.copytree(written, place)
    job = "tests.checkpoint.cases:verified"
    read = pool(2).run(job, directories=[str(places[0])] * 2)
    assert (
        sorted(read[0] + read[1]) == sorted(set(read[0] + read[1])) == sorted(set(files(written)) - {"manifest.json"})
    )
    apart = pool(2).run(job, directories=[str(place) for place in places])
    assert sorted(apart[0]) == sorted(apart[1]) == sorted(read[0] + read[1])
    for rank in (0, 1):
        file = places[rank] / "weights_0.distcp"
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        told = pool(2).run(job, directories=[str(place) for place in places])
        assert all(f"{places[rank]} is damaged: weights_0.distcp" in message for message in told)
        file.write_bytes(content)


def test_a_damaged_weight_is_refused_where_a_model_is_loaded(written, tmp_path):
    broken = tmp_path / "model"
    shutil.copytree(written, broken)
    (weights,) = broken.glob("*.distcp")
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{broken} is damaged: {weights.name}"):
        DiffusionGemma.from_checkpoint(broken)


@pytest.mark.parametrize("text", ["{}", '{"xxh3_128": {"weights_0.distcp": 3}}', "[", '{"xxh3_128": [1]}'])
def test_a_damaged_manifest_is_named(written, tmp_path, text):
    broken = tmp_path / "model"
    shutil.copytree(written, broken)
    (broken / manifest.MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match=manifest.MANIFEST):
        DiffusionGemma.from_checkpoint(broken)


def test_a_file_that_is_missing_is_named(written, tmp_path):
    broken = tmp_path / "model"
    shutil.copytree(written, broken)
    (broken / "assets" / "generation_config.json").unlink()
    with pytest.raises(CheckpointError, match=f"{broken} lacks assets/generation_config.json"):
        DiffusionGemma.from_checkpoint(broken)


def test_a_checkpoint_of_an_older_version_is_loaded(written, tmp_path):
    """Megatron's own writer, one mixed file a rank, no manifest."""
    from megatron.core import dist_checkpointing

    network = DiffusionGemma.from_checkpoint(written)
    old = tmp_path / "old"
    shutil.copytree(written, old, ignore=shutil.ignore_patterns("*.distcp", "*metadata*", manifest.MANIFEST))
    dist_checkpointing.save({**sharded.sharded_state_dict(network), "lightning": {"epoch": 0}}, str(old))
    assert [file.name for file in old.glob("*.distcp")] == ["__0_0.distcp"]
    assert sharded.is_sharded(old) and sharded.read_common(old) == {"lightning": {"epoch": 0}}
    loaded = dict(DiffusionGemma.from_checkpoint(old).named_parameters())
    assert all(torch.equal(loaded[name], tensor) for name, tensor in network.named_parameters())


def test_a_disk_that_fails_is_no_damage(written, monkeypatch):
    """Wherever it fails: then the checkpoint is not to blame, and nothing says so."""

    def fails(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    places = [
        (manifest, "_digest"),
        (sharded, "read_metadata"),
        (sharded, "load_tensors_metadata"),
        (sharded.dist_checkpointing, "load"),
        (sharded, "load_common_state_dict"),
        (sharded, "read_object"),
        (torch.distributed.checkpoint.FileSystemReader, "read_data"),
        (Path, "read_bytes"),
    ]
    for place, name in places:
        with monkeypatch.context() as patch:
            patch.setattr(place, name, fails)
            with pytest.raises(OSError, match="Errno 5"):
                DiffusionGemma.from_checkpoint(written)
                sharded.read_common(written)
