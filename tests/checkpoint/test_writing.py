"""What is written: every file of a checkpoint, complete for its neighbours, readable, never over something."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest
import torch

from nemo_diffgemma import DiffusionGemma, ModelConfig, SamplerConfig
from nemo_diffgemma.checkpoint.open import FORMATS, save_network
from nemo_diffgemma.checkpoint.tensor_files import CheckpointError
from nemo_diffgemma.errors import UserError
from tests.distributed import cases

BESIDE = {
    "tokenizer.json": '{"version": "1.0"}',
    "vocab.bpe": "a b",
    "merges.txt": "a b",
    "spiece.model": "binary",
    "modeling_extra.py": "VALUE = 1\n",
    "preprocessor_config.json": "{}",
    "LICENSE": "Apache",
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tool_use.jinja": "{{ tools }}",
}
LEFT_OUT = {"pytorch_model.bin": "pickle", "model.gguf": "", "original/params.json": "{}"}
HIDDEN = {".gitattributes": "", ".cache/file": ""}


@pytest.fixture(scope="module")
def source(checkpoint, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("source") / "model"
    shutil.copytree(checkpoint("base"), path)
    for name, content in (BESIDE | LEFT_OUT | HIDDEN).items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(content)
    (path / "tokenizer.json").chmod(0o400)
    return path


@pytest.fixture(scope="module")
def network(single, source) -> DiffusionGemma:
    return cases.load(source, {})


def name_of(format: str) -> str:
    return "model.nemo" if format == "nemo" else "model"


def files_beside(path: Path, format: str) -> dict[str, str]:
    """Text of what a checkpoint has beside its tensors, by name."""
    if format == "nemo":
        with tarfile.open(path) as archive:
            archive.extractall(path.parent / "unpacked", filter="data")
        path = path.parent / "unpacked" / "weights"
    elif format == "sharded":
        path = path / "assets"
    weights = (".safetensors", ".safetensors.index.json")
    files = [file for file in path.rglob("*") if file.is_file() and not file.name.endswith(weights)]
    return {str(file.relative_to(path)): file.read_text() for file in files}


@pytest.mark.parametrize("format", FORMATS)
def test_everything_that_belongs_to_a_checkpoint_is_copied_or_named(network, source, tmp_path, caplog, format):
    save_network(network, tmp_path / "first" / name_of(format), format)
    assert "left out, as no part of a checkpoint: model.gguf, original, pytorch_model.bin in " in caplog.text
    again = DiffusionGemma.from_checkpoint(tmp_path / "first" / name_of(format))
    save_network(again, tmp_path / "second" / name_of(format), format)  # and from there once more
    for place in ("first", "second"):
        there = files_beside(tmp_path / place / name_of(format), format)
        expected = BESIDE | {n: (source / n).read_text() for n in ("config.json", "generation_config.json")}
        assert {**there, "config.json": json.loads(there["config.json"])} == {
            **expected,
            "config.json": json.loads(expected["config.json"]),
        }


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
@pytest.mark.parametrize("format", FORMATS)
def test_permissions_follow_the_umask_in_every_format(network, tmp_path, format, umask):
    before = os.umask(umask)
    try:
        save_network(network, tmp_path / name_of(format), format)
    finally:
        os.umask(before)
    place = tmp_path / name_of(format)
    files = [place] if format == "nemo" else [file for file in place.rglob("*") if file.is_file()]
    assert files and {file.stat().st_mode & 0o777 for file in files} == {0o666 & ~umask}
    folders = [] if format == "nemo" else [place, *(path for path in place.rglob("*") if path.is_dir())]
    assert {folder.stat().st_mode & 0o777 for folder in folders} <= {0o777 & ~umask}


@pytest.mark.parametrize("format", FORMATS)
def test_a_target_in_use_is_refused_and_untouched(network, tmp_path, format):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    for target in ("file", "full", "full/file", "file/below"):
        with pytest.raises(CheckpointError, match=f"{tmp_path}/{target}"):
            save_network(network, tmp_path / target, format)
    if format == "nemo":
        (tmp_path / "empty").mkdir()
        with pytest.raises(CheckpointError, match="is a directory, but one file is to be written; give e.g. .*nemo"):
            save_network(network, tmp_path / "empty", format)
        (tmp_path / "empty").rmdir()
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "full" / "file").read_text() == "mine"


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, OSError("No space left on device")])
def test_whatever_interrupts_writing_leaves_nothing(network, tmp_path, monkeypatch, format, error):
    """Commands make SIGTERM and SIGINT such exceptions."""
    from nemo_diffgemma.checkpoint import huggingface, sharded

    def interrupted(*_, **__):
        assert list(tmp_path.iterdir())  # something is half-written
        raise error

    monkeypatch.setattr(huggingface, "save_file", interrupted)
    monkeypatch.setattr(sharded, "save_file", interrupted)
    with pytest.raises(CheckpointError if isinstance(error, OSError) else error):
        save_network(network, tmp_path / name_of(format), format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", FORMATS)
def test_a_model_from_scratch_has_all_settings_of_generation(single, checkpoint, tmp_path, format):
    """As the released file spells them: vLLM and transformers read no checkpoint without."""
    from transformers.models.diffusion_gemma.generation_diffusion_gemma import DiffusionGemmaGenerationConfig

    config = ModelConfig.from_pretrained(checkpoint("base"))
    model = DiffusionGemma(ModelConfig(**{**vars(config), "source": None}))
    model.init_weights(1)
    save_network(model, tmp_path / name_of(format), format)
    written = json.loads(files_beside(tmp_path / name_of(format), format)["generation_config.json"])
    released = json.loads((checkpoint("base") / "generation_config.json").read_text())
    assert set(released) - set(written) <= {"transformers_version", "return_dict_in_generate"}
    assert written["sampler_config"] == {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.1}
    theirs = DiffusionGemmaGenerationConfig(**written)
    assert (theirs.stability_threshold, theirs.confidence_threshold, theirs.max_new_tokens) == (1, 0.005, 4)
    assert DiffusionGemma.from_checkpoint(tmp_path / name_of(format)).sampler_defaults == SamplerConfig(
        eos_token_id=1, pad_token_id=0
    )


def test_settings_that_are_there_are_kept_and_the_others_added(single, checkpoint, tmp_path):
    shutil.copytree(checkpoint("base"), tmp_path / "source")
    (tmp_path / "source" / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [1, 3], "entropy_bound": 0.5, "t_min": 0, "max_new_tokens": 8, "cache_config": {}})
    )
    network = cases.load(tmp_path / "source", {})
    before = network.sampler_defaults
    network.save_huggingface(tmp_path / "written")
    written = json.loads((tmp_path / "written" / "generation_config.json").read_text())
    assert (written["max_new_tokens"], written["eos_token_id"], written["cache_config"]) == (8, [1, 3], {})
    assert written["sampler_config"]["entropy_bound"] == 0.5 and "entropy_bound" not in written
    assert cases.load(tmp_path / "written", {}).sampler_defaults == before


@pytest.mark.parametrize("format", FORMATS)
def test_settings_that_mean_nothing_are_refused_before_a_checkpoint_appears(single, checkpoint, tmp_path, format):
    shutil.copytree(checkpoint("base"), tmp_path / "source")
    file = tmp_path / "source" / "generation_config.json"
    file.write_text(json.dumps({"t_max": float("inf")}))
    network = cases.load(tmp_path / "source", {})
    with pytest.raises(UserError, match="generation_config.json: t_max=inf; expected a finite number"):
        save_network(network, tmp_path / name_of(format), format)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_archive_that_was_written_anew_is_read_anew(network, tmp_path):
    archive, place = tmp_path / "model.nemo", network.norm.weight
    save_network(network, archive, "nemo")
    before = DiffusionGemma.from_checkpoint(archive).norm.weight.clone()
    archive.unlink()
    old = place.data.clone()
    try:
        place.data.add_(1)
        save_network(network, archive, "nemo")
    finally:
        place.data.copy_(old)
    torch.testing.assert_close(DiffusionGemma.from_checkpoint(archive).norm.weight, before + 1)
