"""Conversion without the network: the same bytes as through it, in a few blocks, and it goes on where it was cut."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import time
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemo_diffgemma import DiffusionGemma
from nemo_diffgemma.checkpoint import huggingface, sharded, stored, streamed_files, streaming
from nemo_diffgemma.checkpoint.names import our_name, our_shape, released_name, released_shape, released_tensors
from nemo_diffgemma.checkpoint.open import FORMATS, save_network
from nemo_diffgemma.checkpoint.tensor_files import CheckpointError, tied_to
from nemo_diffgemma.config import ModelConfig
from nemo_diffgemma.repository import ROOT
from tests.commands import Command
from tests.distributed import cases
from tests.distributed.layouts import LAYOUTS
from tests.launch import verbs
from tests.launch.test_entry_points import Shown


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same(directory: Path, other: Path) -> None:
    ours, theirs = tensors_of(directory), tensors_of(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(ours[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), name


@pytest.fixture(scope="module", params=["bfloat16", "mixed"])
def source(request, checkpoint, tmp_path_factory) -> Path:
    """A released-format directory with a vocabulary that is padded, and a scalar and an empty tensor among vision's."""
    place = tmp_path_factory.mktemp("source") / "model"
    shutil.copytree(checkpoint("odd_vocab"), place)
    for number, file in enumerate(sorted(place.glob("*.safetensors"))):
        tensors = {}
        for index, (name, tensor) in enumerate(sorted(load_file(file).items())):
            dtype = torch.float32 if request.param == "mixed" and index % 3 == 0 else torch.bfloat16
            tensors[name] = tensor.to(dtype).contiguous()
        if number == 0:
            tensors["model.encoder.vision_tower.scalar"] = torch.tensor(7, dtype=torch.int64)
            tensors["model.encoder.vision_tower.empty"] = torch.zeros(0, 3, dtype=torch.float64)
        save_file(tensors, file, metadata={"format": "pt"})
        index = json.loads((place / "model.safetensors.index.json").read_text())
        index["weight_map"] |= dict.fromkeys(tensors, file.name)
        (place / "model.safetensors.index.json").write_text(json.dumps(index))
    (place / "chat_template.jinja").write_text("{{ messages }}\n")
    return place


@pytest.fixture
def small(monkeypatch) -> None:
    """Blocks and files so small that every tensor has several."""
    monkeypatch.setattr(stored, "BLOCK", 1000)
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 40_000)
    monkeypatch.setattr(streamed_files, "SHARDED_BYTES", 40_000)


def name_of(format: str) -> str:
    return "model.nemo" if format == "nemo" else format


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_becomes_every_other_bit_for_bit(single, source, small, tmp_path, format):
    first = tmp_path / "first" / name_of(format)
    streaming.convert(source, first, format)
    for other in FORMATS:
        second = tmp_path / format / name_of(other)
        streaming.convert(first, second, other)
        streaming.convert(second, tmp_path / format / other / "back", "huggingface")
        assert_same(tmp_path / format / other / "back", source)
        assert (tmp_path / format / other / "back" / "chat_template.jinja").is_file()
    assert not list(tmp_path.rglob("*.converting"))


@pytest.mark.parametrize("format", FORMATS)
def test_a_model_without_vision_and_in_one_file_is_converted(single, checkpoint, tmp_path, format):
    text = {name: tensor for name, tensor in tensors_of(checkpoint("short")).items() if "vision" not in name}
    shutil.copytree(checkpoint("short"), tmp_path / "text", ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(text, tmp_path / "text" / "model.safetensors", metadata={"format": "pt"})
    streaming.convert(tmp_path / "text", tmp_path / name_of(format), format)
    streaming.convert(tmp_path / name_of(format), tmp_path / "back", "huggingface")
    assert_same(tmp_path / "back", tmp_path / "text")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (
        tmp_path / "text" / "model.safetensors"
    ).read_bytes()


def test_what_is_written_is_what_the_network_writes(single, source, tmp_path):
    """File for file where nothing depends on how a tensor is cut, and loaded to the same weights where it does."""
    network = cases.load(source, {})
    save_network(network, tmp_path / "ours", "huggingface")
    streaming.convert(source, tmp_path / "streamed", "huggingface")
    assert_same(tmp_path / "streamed", tmp_path / "ours")
    beside = {file.name for file in (tmp_path / "ours").iterdir()} - {"model.safetensors.index.json"}
    for name in beside:
        if not name.endswith(".safetensors"):
            assert (tmp_path / "streamed" / name).read_text() == (tmp_path / "ours" / name).read_text(), name
    streaming.convert(source, tmp_path / "sharded", "sharded")
    sharded.verify(tmp_path / "sharded")
    again = DiffusionGemma.from_checkpoint(tmp_path / "sharded")
    for (name, weight), (other, loaded) in zip(network.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other and (not torch.is_tensor(weight) or torch.equal(weight, loaded)), name


@pytest.mark.parametrize("layout", ["tp2", "tp2_ep2"])
def test_any_layout_reads_it_and_what_any_layout_wrote_is_read(pool, single, source, small, tmp_path, layout):
    streaming.convert(source, tmp_path / "sharded", "sharded")
    job = "tests.checkpoint.cases:loaded_and_saved"
    pool(2).run(job, source=str(tmp_path / "sharded"), target=str(tmp_path / "written"), layout=LAYOUTS[layout][1])
    streaming.convert(tmp_path / "written", tmp_path / "back", "huggingface")
    assert_same(tmp_path / "back", source)


def test_two_processes_share_the_files(pool, source, tmp_path):
    jobs = {"source": str(source), "directory": str(tmp_path)}
    written = pool(2).run("tests.checkpoint.cases:converted_by_all", **jobs)
    assert all(written) and not set(written[0]) & set(written[1])
    assert_same(tmp_path / "back", source)


# -- interruptions -----------------------------------------------------------------------------------------------------


class Interrupted:
    """Breaks off at the `at`-th block that is read, and counts them."""

    def __init__(self, monkeypatch: Any, error: BaseException | None = None, at: int = 0) -> None:
        self.blocks = 0
        rows = stored.StoredTensor.rows

        def counted(tensor: Any, start: int, stop: int) -> Tensor:
            self.blocks += 1
            if self.blocks == at and error is not None:
                raise error
            return rows(tensor, start, stop)

        monkeypatch.setattr(stored.StoredTensor, "rows", counted)


@pytest.mark.parametrize(
    "error", [SystemExit(143), KeyboardInterrupt(), OSError(28, "No space left on device")], ids=repr
)
@pytest.mark.parametrize("format", FORMATS)
def test_an_interrupted_conversion_goes_on(single, source, small, tmp_path, monkeypatch, caplog, format, error):
    target = tmp_path / "out" / name_of(format)
    with monkeypatch.context() as patch:
        all_of_it = Interrupted(patch)
        streaming.convert(source, tmp_path / "undisturbed" / name_of(format), format)
    with monkeypatch.context() as patch:
        Interrupted(patch, error, at=all_of_it.blocks // 2)
        with pytest.raises(CheckpointError if isinstance(error, OSError) else type(error)) as told:
            streaming.convert(source, target, format)
    assert not target.exists()
    (left,) = target.parent.iterdir()
    assert left.name == f".{target.name}.converting"
    if isinstance(error, OSError):
        assert f"stays in {left}" in str(told.value) and "\n" not in str(told.value)
    with monkeypatch.context() as patch:
        rest = Interrupted(patch)
        streaming.convert(source, target, format)
    assert 0 < rest.blocks < 0.75 * all_of_it.blocks
    assert f"going on with the conversion that was interrupted in {left}" in caplog.text
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    if format == "sharded":
        sharded.verify(target)
    streaming.convert(target, tmp_path / "back", "huggingface")
    assert_same(tmp_path / "back", source)


def test_another_source_begins_anew(single, source, small, tmp_path, monkeypatch, caplog):
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    with monkeypatch.context() as patch:
        Interrupted(patch, KeyboardInterrupt(), at=100)
        with pytest.raises(KeyboardInterrupt):
            streaming.convert(copy, tmp_path / "out", "sharded")
    assert list((tmp_path / ".out.converting" / "done").iterdir())
    file = sorted(copy.glob("*.safetensors"))[0]
    changed = {name: tensor * 2 for name, tensor in load_file(file).items()}
    save_file(changed, file, metadata={"format": "pt"})
    streaming.convert(copy, tmp_path / "out", "sharded")
    assert f"{tmp_path / '.out.converting'} was left by the conversion of another source" in caplog.text
    streaming.convert(tmp_path / "out", tmp_path / "back", "huggingface")
    assert_same(tmp_path / "back", copy)


SLOWLY = """
import sys, time
from nemo_diffgemma.checkpoint import huggingface, stored, streamed_files, streaming

stored.BLOCK, huggingface.SHARD_BYTES, streamed_files.SHARDED_BYTES = 1000, 40_000, 40_000
rows = stored.StoredTensor.rows


def slowly(*arguments):
    time.sleep(0.002)
    return rows(*arguments)


stored.StoredTensor.rows = slowly
streaming.convert(*sys.argv[1:])
"""


@pytest.mark.parametrize("format", FORMATS)
def test_a_conversion_that_is_killed_goes_on(single, source, small, tmp_path, monkeypatch, caplog, format):
    """Files that were complete are not written again, and the result is that of an undisturbed one."""
    target = tmp_path / name_of(format)
    done = tmp_path / f".{target.name}.converting" / "done"
    process = Command(SLOWLY, str(source), str(target), format)
    while len(list(done.glob("*.json"))) < 2:
        assert process.poll() is None, process.communicate(10)
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate(60)
    assert process.returncode == -signal.SIGKILL and not target.exists()
    complete = {path.name.removesuffix(".json") for path in done.glob("*.json") if "partial" not in path.name}
    written, opened = [], streamed_files.HashedFile.__init__

    def noted(self: Any, path: Path) -> None:
        written.append(path.name)
        opened(self, path)

    monkeypatch.setattr(streamed_files.HashedFile, "__init__", noted)
    streaming.convert(source, target, format)
    assert complete and written and not complete & set(written)
    assert "going on with the conversion that was interrupted" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
    streaming.convert(source, tmp_path / "undisturbed" / target.name, format)
    if format != "nemo":
        assert contents_of(target) == contents_of(tmp_path / "undisturbed" / target.name)
    streaming.convert(target, tmp_path / "back", "huggingface")
    assert_same(tmp_path / "back", source)


def contents_of(directory: Path) -> dict[str, bytes]:
    """But of what names the moment of its writing, and the list of checksums of that."""
    files = {str(file.relative_to(directory)): file for file in directory.rglob("*") if file.is_file()}
    return {name: file.read_bytes() for name, file in files.items() if name not in (".metadata", "manifest.json")}


@pytest.mark.parametrize("format", FORMATS)
def test_a_disk_that_is_full_in_the_middle_of_a_file_is_told(single, source, tmp_path, format):
    """The kernel's own error, through whatever library writes; the same conversion goes on when there is room."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(CheckpointError, match="cannot convert: .*File too large; what is done stays in") as told:
            streaming.convert(source, tmp_path / name_of(format), format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(told.value) and not (tmp_path / name_of(format)).exists()
    streaming.convert(source, tmp_path / name_of(format), format)
    streaming.convert(tmp_path / name_of(format), tmp_path / "back", "huggingface")
    assert_same(tmp_path / "back", source)


@pytest.mark.parametrize("format", FORMATS)
def test_markers_without_files_count_for_nothing(single, source, small, tmp_path, monkeypatch, format):
    """A conversion that is killed between its last two steps leaves them, and the user may delete its result."""
    target = tmp_path / name_of(format)
    with monkeypatch.context() as patch:
        patch.setattr(streaming.shutil, "rmtree", lambda *_, **__: None)
        streaming.convert(source, target, format)
    left = tmp_path / f".{target.name}.converting"
    assert list((left / "done").iterdir())
    shutil.rmtree(left / "out", ignore_errors=True)
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    streaming.convert(source, target, format)
    streaming.convert(target, tmp_path / "back", "huggingface")
    assert_same(tmp_path / "back", source)


def test_a_source_that_changes_meanwhile_is_told(single, source, small, tmp_path, monkeypatch):
    """Copied over with the times of the old one, as `cp -p` and rsync do it."""
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    file = sorted(copy.glob("*.safetensors"))[0]
    write = streamed_files.ReleasedFiles.write

    def changed(self: Any, *arguments: Any) -> Any:
        stat, content = file.stat(), file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        return write(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(streamed_files.ReleasedFiles, "write", changed)
        with pytest.raises(CheckpointError, match=f"{copy} was changed meanwhile; convert it again"):
            streaming.convert(copy, tmp_path / "out", "huggingface")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_two_at_once_into_one_target_are_refused(single, source, tmp_path):
    with streaming._converting(tmp_path / "out", "{}"):
        with pytest.raises(CheckpointError, match="another process converts into .*out now"):
            streaming.convert(source, tmp_path / "out", "sharded")


@pytest.mark.parametrize("format", FORMATS)
def test_a_damaged_source_leaves_nothing(single, source, small, tmp_path, format):
    broken = tmp_path / "source" / "model"
    shutil.copytree(source, broken)
    file = sorted(broken.glob("*.safetensors"))[-1]
    tensors = load_file(file)
    name = next(name for name in tensors if "vision" not in name and tensors[name].numel() > 1)
    tensors[name].view(-1)[-1] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name} holds NaN or infinity"):
        streaming.convert(broken, tmp_path / "out" / name_of(format), format)
    assert list((tmp_path / "out").iterdir()) == []


def test_copies_of_a_weight_are_compared(single, source, tmp_path):
    broken = tmp_path / "model"
    shutil.copytree(source, broken)
    index = json.loads((broken / "model.safetensors.index.json").read_text())
    name = "model.decoder.embed_tokens.weight"
    head = load_file(broken / index["weight_map"][name])[name].clone()
    save_file({"lm_head.weight": head}, broken / "head.safetensors")
    index["weight_map"]["lm_head.weight"] = "head.safetensors"
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    streaming.convert(broken, tmp_path / "good", "huggingface")
    assert_same(tmp_path / "good", source)
    head[-1, -1] += 1
    save_file({"lm_head.weight": head}, broken / "head.safetensors")
    with pytest.raises(CheckpointError, match="lm_head.weight .* differs from model.decoder.embed_tokens.weight"):
        streaming.convert(broken, tmp_path / "bad", "huggingface")
    assert not (tmp_path / "bad").exists()


# -- the released model ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    """A directory with the names and sizes of google/diffusiongemma-26B-A4B-it as transformers has them; no values."""
    from transformers.models.diffusion_gemma.modeling_diffusion_gemma import DiffusionGemmaForBlockDiffusion
    from transformers.models.gemma4.configuration_gemma4 import Gemma4VisionConfig

    from tests.reference import tiny_config

    sizes = yaml.safe_load((ROOT / "conf/model/diffusiongemma_26b_a4b.yaml").read_text())["architecture"]
    layers = range(sizes.pop("num_hidden_layers"))
    sizes["layer_types"] = ["full_attention" if layer % 6 == 5 else "sliding_attention" for layer in layers]
    config = tiny_config(sizes)
    config.vision_config = Gemma4VisionConfig(
        num_hidden_layers=27, hidden_size=1152, intermediate_size=4304, num_attention_heads=16,
        num_key_value_heads=16, head_dim=72, standardize=True,
    )  # fmt: skip
    with torch.device("meta"):
        tensors = DiffusionGemmaForBlockDiffusion(config).state_dict()
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items() if tied_to(name) is None}
    place = tmp_path_factory.mktemp("released") / "model"
    place.mkdir()
    config.save_pretrained(place)
    names, weight_map = sorted(shapes), {}
    for number in range(11):
        header, end = {}, 0
        for name in names[number::11]:
            start, end = end, end + 2 * prod(shapes[name])
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [start, end]}
        file = place / f"model-{number + 1:05}-of-00011.safetensors"
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        file.write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(file, 8 + len(text) + end)  # holes: nothing is on the disk
        weight_map |= dict.fromkeys(header, file.name)
    (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return place


@pytest.mark.parametrize("format", FORMATS)
def test_all_tensors_of_the_released_model_map_one_to_one(single, released, tmp_path, format):
    convert, ConvertConfig = (getattr(verbs.load("convert"), name) for name in ("convert", "ConvertConfig"))
    shown = Shown()
    result = convert(ConvertConfig(str(released), str(tmp_path / "out"), format, dry_run=True), shown)
    assert result["tensors"] == 1047 and 51e9 < result["bytes"] < 54e9
    assert shown.lines[0] == "1047 tensors, each with one place: 691 of text, 356 carried as they are"
    source, files = streaming.plan(released, format)
    assert len({*files.mapping().values()}) == 1047 and not (tmp_path / "out").exists()
    config = ModelConfig.from_pretrained(released)
    for name, shape in released_tensors(config).items():
        ours = our_name(name)
        assert released_name(ours) == name
        assert released_shape(ours, our_shape(ours, shape, config), config) == shape == source.tensors[name].shape
