"""The released layout: read in any layout, written back byte for byte, read by transformers, refused when damaged."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemo_diffgemma import ModelConfig
from nemo_diffgemma.checkpoint.tensor_files import INDEX
from tests.distributed import cases
from tests.distributed.layouts import LAYOUTS
from tests.parity import questions
from tests.reference import save_released_layout

SINGLE = (1, {})


def tensors_of(directory: Path) -> dict[str, Tensor]:
    """All tensors, and that the index, if there is one, says where they are."""
    found: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors = load_file(file)
        assert not set(tensors) & set(found)
        found |= tensors
    if (directory / INDEX).exists():
        index = json.loads((directory / INDEX).read_text())
        assert set(index["weight_map"]) == set(found)
        for name, file in index["weight_map"].items():
            assert name in load_file(directory / file)
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    else:
        assert [file.name for file in directory.glob("*.safetensors")] == ["model.safetensors"]
    return found


def assert_same_bytes(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and ours[name].shape == tensor.shape, name
        assert torch.equal(ours[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), name


@pytest.fixture(scope="module")
def released(reference, tmp_path_factory) -> Callable[..., Path]:
    """A checkpoint as it might be published: bfloat16 with some tensors in float32, a tokenizer and a template."""
    made: dict[tuple, Path] = {}

    def make(size: str, files: int, flat: bool) -> Path:
        key = (size, files, flat)
        if key not in made:
            path = tmp_path_factory.mktemp("released") / "model"
            save_released_layout(reference(size), path, shards=files, flat_per_layer_config=flat)
            for file in path.glob("*.safetensors"):
                tensors = load_file(file)
                for index, name in enumerate(sorted(tensors)):
                    precise = name.endswith(("router.proj.weight", "per_expert_scale")) or index % 5 == 0
                    tensors[name] = tensors[name].to(torch.float32 if precise else torch.bfloat16).contiguous()
                save_file(tensors, file, metadata={"format": "pt"})
            index = json.loads((path / INDEX).read_text())
            index["metadata"]["total_size"] = sum(
                tensor.nbytes for file in path.glob("*.safetensors") for tensor in load_file(file).values()
            )
            (path / INDEX).write_text(json.dumps(index))
            if files == 1:
                (path / INDEX).unlink()
                next(path.glob("*.safetensors")).rename(path / "model.safetensors")
            (path / "tokenizer.json").write_text('{"version": "1.0"}')
            (path / "chat_template.jinja").write_text("{{ messages }}\n")
            made[key] = path
        return made[key]

    return make


@pytest.mark.parametrize("layout", ["single", "tp2_ep2", "tp2_etp2_ep2"])
@pytest.mark.parametrize(
    ("size", "files", "flat", "shard_bytes"),
    [
        ("base", 1, True, None),
        ("base", 3, False, 20_000),
        ("one_global_kv", 2, True, None),
        ("odd_vocab", 2, False, 20_000),
    ],
    ids=["base-one_file", "base-many_files-per_layer_config", "one_global_kv", "odd_vocab-many_files-per_layer_config"],
)
def test_what_was_read_is_written_back_byte_for_byte(
    single, pool, released, tmp_path, layout, size, files, flat, shard_bytes
):
    """Text and vision tensors, each in its own dtype; configuration, tokenizer and template beside them."""
    world, axes = LAYOUTS.get(layout, SINGLE)
    source, target = released(size, files, flat), tmp_path / "written"
    arguments = dict(path=source, layout=axes, target=target, shard_bytes=shard_bytes)
    ranks = (
        [cases.round_trip(**arguments)]
        if world == 1
        else pool(world).run("tests.distributed.cases:round_trip", **arguments)
    )
    before, after = tensors_of(source), tensors_of(target)
    assert {tensor.dtype for tensor in before.values()} == {torch.bfloat16, torch.float32}
    assert_same_bytes(after, before)
    assert set(ranks) == {(len(before), sum(tensor.nbytes for tensor in before.values()))}
    assert (len(list(target.glob("*.safetensors"))) > 4) == (shard_bytes is not None)
    assert json.loads((target / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    for name in ("generation_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (target / name).read_bytes() == (source / name).read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["written"]


def test_loading_in_bfloat16_loses_nothing_of_a_bfloat16_checkpoint(single, released, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(released("base", 1, True), source)
    file = source / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    cases.round_trip(source, {}, tmp_path / "written", dtype="bfloat16")
    assert_same_bytes(tensors_of(tmp_path / "written"), tensors_of(source))


@pytest.mark.parametrize("flat", [True, False], ids=["flat", "per_layer_config"])
def test_transformers_reads_what_was_written(single, pool, reference, tmp_path, flat):
    from transformers.models.diffusion_gemma import DiffusionGemmaForBlockDiffusion

    source, target = tmp_path / "source", tmp_path / "written"
    save_released_layout(reference("one_global_kv"), source, shards=2, flat_per_layer_config=flat)
    pool(2).run("tests.distributed.cases:round_trip", path=source, layout=LAYOUTS["tp2_ep2"][1], target=target)
    theirs, info = DiffusionGemmaForBlockDiffusion.from_pretrained(target, output_loading_info=True)
    assert not any(info.values()), info
    theirs.set_experts_implementation("eager")
    original = reference("one_global_kv")
    before, after = original.state_dict(), theirs.state_dict()
    assert set(before) == set(after) and all(torch.equal(before[name], after[name]) for name in before)
    asked = questions.question(original, "after_1_canvas", 9)
    change = questions.answer(theirs.eval(), asked) - questions.answer(original, asked)
    assert change.abs().max() < 1e-5  # the same weights at other addresses: not always the same bits


@pytest.mark.parametrize("layout", ["single", "tp2_ep2"])
def test_transformers_reads_a_model_from_scratch(single, pool, checkpoint, tmp_path, layout):
    """Only the vision tower, which a text model does not have, is missing."""
    from transformers.models.diffusion_gemma import DiffusionGemmaForBlockDiffusion

    config = dataclasses.replace(
        ModelConfig.from_pretrained(checkpoint("odd_vocab")), source=None, initializer_range=0.3
    )
    world, axes = LAYOUTS.get(layout, SINGLE)
    arguments = dict(config=config, layout=axes, target=tmp_path / "new", seed=1)
    if world == 1:
        cases.save_initial(**arguments)
    else:
        pool(world).run("tests.distributed.cases:save_initial", **arguments)
    theirs, info = DiffusionGemmaForBlockDiffusion.from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert all(name.startswith(("model.encoder.vision_tower.", "model.encoder.embed_vision."))
               for name in info["missing_keys"])  # fmt: skip
    asked = questions.question(theirs, "after_1_canvas", 9)
    ours = cases.answer(cases.load(tmp_path / "new", {}), **asked.asked())
    assert ours.sub(questions.answer(theirs.eval(), asked)).abs().max() < questions.TOLERANCE
    assert ours.std() > 0.1  # and it is not all zero


# -- damage ------------------------------------------------------------------------------------------------------------


def _edit(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    """Change the tensors of the first file, and let the index know."""

    def damage(path: Path) -> None:
        file = path / "model-00001-of-00002.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
        index = json.loads((path / INDEX).read_text())
        others = {n: f for n, f in index["weight_map"].items() if f != file.name}
        index["weight_map"] = others | dict.fromkeys(tensors, file.name)
        (path / INDEX).write_text(json.dumps(index))

    return damage


def _truncate(path: Path) -> None:
    file = path / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def _swap(path: Path) -> None:
    """The index says the opposite of the files."""
    index = json.loads((path / INDEX).read_text())
    names = sorted(set(index["weight_map"].values()))
    index["weight_map"] = {n: names[1 - names.index(f)] for n, f in index["weight_map"].items()}
    (path / INDEX).write_text(json.dumps(index))


NORM = "model.decoder.layers.0.input_layernorm.weight"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file is missing": (
        lambda path: (path / "model-00002-of-00002.safetensors").unlink(),
        "names model-00002-of-00002.safetensors, which .* does not hold; copy the missing files",
    ),
    "a file is truncated": (_truncate, "is truncated or not a safetensors file .*; copy it again from the checkpoint"),
    "a file is empty": (
        lambda path: (path / "model-00001-of-00002.safetensors").write_bytes(b""),
        "is truncated or not a safetensors file",
    ),
    "no files": (
        lambda path: [file.unlink() for file in (*path.glob("*.safetensors"), path / INDEX)],
        "holds no safetensors; give a directory with model.safetensors, or with model.safetensors.index.json",
    ),
    "a tensor is missing": (
        _edit(lambda tensors: tensors.pop(NORM)),
        f"lacks 1 tensors, first {NORM}; is the download complete, and is config.json of the same checkpoint",
    ),
    "a tensor is foreign": (
        _edit(lambda tensors: tensors.update({"model.decoder.layers.0.per_layer_input_gate.weight": torch.ones(3)})),
        "holds 1 tensors that this model does not have, first model.decoder.layers.0.per_layer_input_gate.weight",
    ),
    "a tensor has another shape": (
        _edit(lambda tensors: tensors.update({NORM: torch.ones(31)})),
        rf"tensor {NORM} has shape \[31\] in .*, but config.json makes it \[32\]",
    ),
    "config.json is of another model": (
        lambda path: (path / "config.json").write_text(
            (path / "config.json").read_text().replace('"intermediate_size": 48', '"intermediate_size": 40')
        ),
        "but config.json makes it .*; the two are of different checkpoints",
    ),
    "the index is of another checkpoint": (
        _swap,
        "does not hold tensor .*; model.safetensors.index.json is of another checkpoint",
    ),
    "the index is cut off": (
        lambda path: (path / INDEX).write_text((path / INDEX).read_text()[:100]),
        "index.json is not valid JSON .*; copy it again from the checkpoint",
    ),
    "the index is something else": (
        lambda path: (path / INDEX).write_text("[]"),
        "index.json is damaged: it holds .*; copy it again from the checkpoint",
    ),
    "config.json is missing": (
        lambda path: (path / "config.json").unlink(),
        "has no config.json; give a directory in the released Hugging Face format",
    ),
    "config.json asks for what is not there": (
        lambda path: (path / "config.json").write_text(
            json.dumps(json.loads((path / "config.json").read_text()) | {"tie_word_embeddings": False})
        ),
        "sets tie_word_embeddings=False, which DiffusionGemma does not have",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_on_every_rank_in_one_paragraph(pool, checkpoint, tmp_path, damage):
    import re

    path = tmp_path / "damaged"
    shutil.copytree(checkpoint("base"), path)
    change, message = DAMAGE[damage]
    change(path)
    errors = pool(2).run(
        "tests.distributed.cases:error_of", case="load", path=path, layout=LAYOUTS["tp2_ep2"][1], timeout=60
    )
    for error in errors:
        assert error.startswith(("CheckpointError: ", "ConfigError: "))
        assert re.search(message, error), error
        assert "\n" not in error and str(path) in error


def test_a_path_that_does_not_exist(single, tmp_path):
    assert "has no config.json; give a directory" in cases.error_of("load", path=tmp_path / "nowhere", layout={})


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("at", ["config", "weights"])
def test_where_one_rank_cannot_read_all_raise(pool, checkpoint, rank, at):
    """A node whose file system hangs must not leave the others waiting in a collective."""
    errors = pool(2).run(
        "tests.distributed.cases:error_of",
        case="load_where_a_rank_fails",
        path=checkpoint("base"),
        layout=LAYOUTS["tp2_ep2"][1],
        rank=rank,
        at=at,
        timeout=60,
    )
    assert "Stale file handle" in errors[rank]
    assert f"rank {rank} stopped: OSError: Stale file handle" in errors[1 - rank]


# -- writing where one cannot ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["single", "tp2_ep2"])
@pytest.mark.parametrize("after", [0, 2, "vision"])
def test_a_full_disk_leaves_nothing_behind(single, pool, checkpoint, tmp_path, layout, after):
    """In the first file, in the middle, or at the last; every rank raises."""
    world, axes = LAYOUTS.get(layout, SINGLE)
    if after == "vision":  # the file after those of the text model, and the last
        cases.round_trip(checkpoint("base"), {}, tmp_path / "counted" / "model", shard_bytes=20_000)
        after = len(list((tmp_path / "counted" / "model").glob("*.safetensors"))) - 1
        shutil.rmtree(tmp_path / "counted")
    arguments = dict(
        case="save_where_the_disk_is_full", path=checkpoint("base"), layout=axes, target=tmp_path / "new", after=after
    )
    errors = (
        [cases.error_of(**arguments)]
        if world == 1
        else pool(world).run("tests.distributed.cases:error_of", **arguments, timeout=60)
    )
    assert all("cannot write" in error and "No space left on device" in error for error in errors), errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("layout", ["single", "tp2_ep2"])
def test_a_source_that_is_gone_leaves_nothing_behind(single, pool, checkpoint, tmp_path, layout):
    """The vision tensors can no longer be carried over: that is an error, not a checkpoint without them."""
    world, axes = LAYOUTS.get(layout, SINGLE)
    source = tmp_path / "source"
    shutil.copytree(checkpoint("base"), source)
    arguments = dict(case="save_where_the_source_is_gone", path=source, layout=axes, target=tmp_path / "new")
    errors = (
        [cases.error_of(**arguments)]
        if world == 1
        else pool(world).run("tests.distributed.cases:error_of", **arguments, timeout=60)
    )
    assert all("safetensors" in error for error in errors), errors
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("layout", ["single", "tp2_ep2"])
def test_nothing_that_exists_is_overwritten(single, pool, checkpoint, tmp_path, layout):
    world, axes = LAYOUTS.get(layout, SINGLE)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "model.safetensors").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for target, message in (
        (tmp_path / "full", "full exists already; delete it or give another path"),
        (tmp_path / "file", "file exists already; delete it or give another path"),
        (tmp_path / "file" / "below", "cannot write"),
    ):
        arguments = dict(case="round_trip", path=checkpoint("base"), layout=axes, target=target)
        errors = (
            [cases.error_of(**arguments)]
            if world == 1
            else pool(world).run("tests.distributed.cases:error_of", **arguments, timeout=60)
        )
        assert all(message in error for error in errors), errors
    assert (tmp_path / "full" / "model.safetensors").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "model.safetensors"]


def test_an_empty_directory_is_a_place_to_write(single, checkpoint, tmp_path):
    (tmp_path / "empty").mkdir()
    cases.round_trip(checkpoint("base"), {}, tmp_path / "empty")
    assert_same_bytes(tensors_of(tmp_path / "empty"), tensors_of(checkpoint("base")))
