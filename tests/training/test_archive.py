"""`.nemo` archives and sharded checkpoints: any layout reads them, and nothing in them is believed but tensors."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from nemo_diffgemma.checkpoint.tensor_files import CheckpointError
from tests.training import cases


@pytest.fixture(scope="module")
def trained(pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks (TP2 x EP2): `run/checkpoints/step-2` and `model.nemo`."""
    place = tmp_path_factory.mktemp("trained")
    pool(2).run(
        "tests.training.cases:save_archive",
        directory=str(place / "run"),
        path=str(place / "model.nemo"),
        layout={"tensor": 2, "expert": 2},
    )
    return place


@pytest.mark.parametrize("layout", [{}, {"expert": 2}, {"tensor": 2, "expert_tensor": 2}], ids=str)
def test_every_layout_restores_the_same_weights(pool, single, trained, layout):
    sharded = cases.weights_of(str(trained / "run" / "checkpoints" / "step-2"), {})
    for call, path in (("weights_of_archive", "model.nemo"), ("weights_of", "run/checkpoints/step-2")):
        restored = pool(2).run(f"tests.training.cases:{call}", path=str(trained / path), layout=layout)[0]
        assert restored.keys() == sharded.keys()
        assert all(np.array_equal(restored[name], sharded[name]) for name in sharded)


def test_an_archive_is_restored_without_a_trainer_and_generates(single, trained):
    import torch

    from nemo_diffgemma.training.nemo_model import DiffusionGemmaModel

    config = DiffusionGemmaModel.restore_from(trained / "model.nemo", return_config=True)
    assert config.data.global_batch_size == 8 and "model" not in config
    config.seed = 5
    model = DiffusionGemmaModel.restore_from(trained / "model.nemo", override_config_path=config)
    assert model.settings.seed == 5
    sequences = model.generate(torch.tensor([[2, 4, 4, 3]]), max_new_tokens=16).sequences
    assert sequences.shape == (1, 20)


def test_a_restored_model_goes_on_training(single, trained, tmp_path):
    lines = cases.run(str(tmp_path), steps=1, model__checkpoint=str(trained / "model.nemo"))
    first = (trained / "run" / "metrics.jsonl").read_text().splitlines()[0]
    assert lines[0]["loss"] < float(first.split('"loss": ')[1].split(",")[0])


def test_the_archive_does_not_choose_the_class(single, trained):
    from nemo_diffgemma.training.nemo_model import DiffusionGemmaModel

    config = DiffusionGemmaModel.restore_from(trained / "model.nemo", return_config=True)
    config.target = "subprocess.Popen"
    assert type(DiffusionGemmaModel.restore_from(trained / "model.nemo", None)) is DiffusionGemmaModel
    assert type(DiffusionGemmaModel.restore_from(trained / "model.nemo", config)) is DiffusionGemmaModel
    assert type(DiffusionGemmaModel.from_config_dict(config)) is DiffusionGemmaModel


def _member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    return member


@pytest.mark.parametrize(
    "member",
    [
        _member("../escape.txt"),
        _member("/tmp/escape.txt"),
        _member("weights/../../escape.txt"),
        _member("weights/deep/file.txt"),
        _member("weights/model.safetensors", tarfile.SYMTYPE, "/etc/passwd"),
        _member("weights/hard.json", tarfile.LNKTYPE, "model_config.yaml"),
        _member("model_weights.ckpt"),
    ],
    ids=["parent", "absolute", "inner-parent", "deep", "symlink", "hardlink", "pickle"],
)
def test_an_archive_with_another_member_is_refused(single, trained, tmp_path, member):
    from nemo_diffgemma.checkpoint.nemo_archive import unpack

    evil = tmp_path / "evil.nemo"
    shutil.copy(trained / "model.nemo", evil)
    with tarfile.open(evil, "a") as archive:
        archive.addfile(member, io.BytesIO())
    with pytest.raises(CheckpointError, match="has no place"):
        unpack(evil)
    assert not list(tmp_path.parent.glob("**/escape.txt"))


class _Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_metadata_that_names_a_foreign_class_is_refused(single, trained, tmp_path, capsys):
    evil = tmp_path / "step-2"
    shutil.copytree(trained / "run" / "checkpoints" / "step-2", evil)
    (evil / ".metadata").write_bytes(pickle.dumps(_Evil()))
    with pytest.raises(CheckpointError, match="builtins.print"):
        cases.weights_of(str(evil), {})
    assert "executed" not in capsys.readouterr().out


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("*.distcp", _truncate),
        ("*.distcp", Path.unlink),
        (".metadata", _truncate),
        ("metadata.json", _truncate),
        ("dtypes.json", _truncate),
        ("dtypes.json", Path.unlink),
        ("metadata.json", Path.unlink),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name_before_any_weight_is_set(single, trained, tmp_path, name, damage):
    from nemo_diffgemma import DiffusionGemma, ModelConfig
    from nemo_diffgemma.checkpoint.sharded import load_sharded, read_common

    broken = tmp_path / "step-2"
    shutil.copytree(trained / "run" / "checkpoints" / "step-2", broken)
    damage(sorted(broken.glob(name))[0])
    network = DiffusionGemma(ModelConfig(**cases.ARCHITECTURE))
    for parameter in network.parameters():
        parameter.data.fill_(7.0)
    with pytest.raises(CheckpointError, match=str(broken)) as told:
        load_sharded(network, broken)
    assert "again" in str(told.value) and "\n" not in str(told.value)
    assert all((parameter == 7.0).all() for parameter in network.parameters())
    if name == "*.distcp":
        with pytest.raises(CheckpointError, match=str(broken)):
            read_common(broken)


def test_a_checkpoint_that_is_damaged_inside_is_refused(single, trained, tmp_path, monkeypatch):
    """By its manifest; one of before there were any, by whoever reads the tensors."""
    from nemo_diffgemma.checkpoint import manifest

    broken = tmp_path / "step-2"
    shutil.copytree(trained / "run" / "checkpoints" / "step-2", broken)
    for file in broken.glob("*.distcp"):
        file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(CheckpointError, match=f"{broken} is damaged: weights_0.distcp"):
        cases.weights_of(str(broken), {})
    monkeypatch.setattr(manifest, "verify", lambda *_: None)
    with pytest.raises(CheckpointError, match=f"{broken} cannot be read"):
        cases.weights_of(str(broken), {})


def test_what_is_no_checkpoint_is_named(single, tmp_path):
    from nemo_diffgemma import DiffusionGemma

    (tmp_path / "file.nemo").write_text("no archive")
    for path in (tmp_path / "nothing", tmp_path, tmp_path / "file.nemo"):
        with pytest.raises(CheckpointError, match=str(path)):
            DiffusionGemma.from_checkpoint(path)


def test_the_sizes_of_another_model_are_named(single, trained):
    from nemo_diffgemma import DiffusionGemma, ModelConfig
    from nemo_diffgemma.checkpoint.sharded import load_sharded

    network = DiffusionGemma(ModelConfig(**{**cases.ARCHITECTURE, "moe_intermediate_size": 32}))
    with pytest.raises(CheckpointError, match="gate_up_proj has shape"):
        load_sharded(network, trained / "run" / "checkpoints" / "step-2")


def test_fine_tuning_keeps_what_the_checkpoint_carried(pool, single, checkpoint, tmp_path):
    """Vision tensors, dtypes and configuration survive a run, its sharded checkpoint and the way back."""
    from safetensors.torch import load_file

    from nemo_diffgemma import DiffusionGemma

    source = checkpoint("deep")
    pool(2).run(
        "tests.training.cases:run",
        directory=str(tmp_path / "run"),
        steps=1,
        layout={"tensor": 2, "expert": 2},
        model__checkpoint=str(source),
    )
    network = DiffusionGemma.from_checkpoint(tmp_path / "run" / "checkpoints" / "step-1")
    network.save_huggingface(tmp_path / "back")
    before, after = ({k: v for f in d.glob("*.safetensors") for k, v in load_file(f).items()} for d in
                     (source, tmp_path / "back"))  # fmt: skip
    assert before.keys() == after.keys()
    assert {k: v.dtype for k, v in before.items()} == {k: v.dtype for k, v in after.items()}
    carried = [name for name in before if "vision" in name]
    assert carried and all(before[name].equal(after[name]) for name in carried)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )
