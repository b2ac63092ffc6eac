"""Which tensors are the checkpoint: several files, tied copies, quantised tensors, dtypes that cannot be kept."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemo_diffgemma import ModelConfig
from nemo_diffgemma.checkpoint.names import CARRIED_PREFIXES, released_tensors
from nemo_diffgemma.checkpoint.tensor_files import INDEX
from tests.checkpoint.test_huggingface import _edit, assert_same_bytes, tensors_of
from tests.distributed import cases
from tests.distributed.layouts import LAYOUTS

TABLE = "model.decoder.embed_tokens.weight"
ENCODER = "model.encoder.language_model."


@pytest.fixture
def path(checkpoint, tmp_path) -> Path:
    """A copy of a checkpoint in two files that a test may change."""
    shutil.copytree(checkpoint("base"), tmp_path / "model")
    return tmp_path / "model"


def all_tensors(path: Path) -> dict[str, Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def table_of(path: Path) -> Tensor:
    return cases.load(path, {}).embed_tokens.weight.detach()[:64]


def test_a_model_safetensors_comes_before_an_index(single, path, caplog):
    """As in transformers; the shards of the index are named as what counts for nothing."""
    from transformers.models.diffusion_gemma import DiffusionGemmaForBlockDiffusion

    tensors = all_tensors(path)
    tensors[TABLE] = tensors[TABLE] + 1
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    theirs = DiffusionGemmaForBlockDiffusion.from_pretrained(path).model.decoder.embed_tokens.weight
    assert torch.equal(table_of(path), tensors[TABLE]) and torch.equal(theirs, tensors[TABLE])
    assert (
        "model-00001-of-00002.safetensors, model-00002-of-00002.safetensors beside it count for nothing" in caplog.text
    )
    for file in path.glob("model-*"):
        file.unlink()  # the index is stale now, and nobody asks it
    assert torch.equal(table_of(path), tensors[TABLE])


@pytest.mark.parametrize("index", [True, False], ids=["index", "no_index"])
def test_a_tensor_in_two_files_is_refused_with_their_names(single, path, index):
    stray = path / ("model-00002-of-00002.safetensors" if index else "model-00003-of-00003.safetensors")
    first = load_file(path / "model-00001-of-00002.safetensors")
    twice = sorted(first)[0]
    tensors = (load_file(stray) if index else {}) | {twice: first[twice] + 1}
    save_file(tensors, stray, metadata={"format": "pt"})
    if not index:
        (path / INDEX).unlink()
    error = cases.error_of("load", path=path, layout={})
    assert f"tensor {twice} is in " in error and "model-00001-of-00002.safetensors" in error and stray.name in error


def test_files_beside_those_of_the_index_count_for_nothing(single, path):
    before = table_of(path)
    save_file({TABLE: torch.zeros(64, 32)}, path / "zz.safetensors", metadata={"format": "pt"})
    assert torch.equal(table_of(path), before)


COPIES = {
    "head": {"lm_head.weight": TABLE},
    "encoder": {
        ENCODER + "embed_tokens.weight": TABLE,
        ENCODER + "norm.weight": "model.decoder.norm.weight",
        ENCODER + "layers.1.experts.down_proj": "model.decoder.layers.1.experts.down_proj",
        ENCODER + "layers.0.router.per_expert_scale": "model.decoder.layers.0.router.per_expert_scale",
        ENCODER + "layers.0.self_attn.q_norm.weight": "model.decoder.layers.0.self_attn.q_norm.weight",
    },
}


@pytest.mark.parametrize("which", COPIES)
@pytest.mark.parametrize("kept", ["both", "copies alone"])
def test_tied_copies_are_one_weight(single, path, tmp_path, which, kept):
    """transformers loads both kinds; what is written has each weight once."""
    from transformers.models.diffusion_gemma import DiffusionGemmaForBlockDiffusion

    before = all_tensors(path)
    for file in path.glob("*.safetensors"):
        tensors = load_file(file)
        if file.name.startswith("model-00001"):
            tensors |= {copy: before[weight].clone() for copy, weight in COPIES[which].items()}
        if kept == "copies alone":
            tensors = {name: tensor for name, tensor in tensors.items() if name not in COPIES[which].values()}
        save_file(tensors, file, metadata={"format": "pt"})
    (path / INDEX).unlink()
    assert cases.round_trip(path, {}, tmp_path / "written")[0] == len(before)
    assert_same_bytes(tensors_of(tmp_path / "written"), before)
    save_file(all_tensors(path), path / "model.safetensors", metadata={"format": "pt"})
    theirs = DiffusionGemmaForBlockDiffusion.from_pretrained(path).state_dict()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(("copy", "rank"), [("lm_head.weight", 0), (ENCODER + "norm.weight", 1)])
def test_a_copy_that_differs_is_refused_on_every_rank(pool, path, copy, rank):
    """In its last element; the ranks share the comparison, and `rank` is the one that sees it."""
    before = all_tensors(path)
    added = {
        "lm_head.weight": before[TABLE].clone(),
        ENCODER + "norm.weight": before["model.decoder.norm.weight"].clone(),
    }
    added[copy].view(-1)[-1] += 1e-3
    _edit(lambda tensors: tensors.update(added))(path)
    errors = pool(2).run("tests.distributed.cases:error_of", case="load", path=path, layout=LAYOUTS["tp2_ep2"][1])
    assert all(f"{copy} in " in error and "has one weight for both" in error for error in errors), errors
    assert errors[rank].startswith("CheckpointError")


SCALED = "model.decoder.layers.0.mlp.up_proj.weight"
TYPES: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "float8": (lambda t: t.update({SCALED: t[SCALED].to(torch.float8_e4m3fn)}), "is F8_E4M3 in .*is quantised"),
    "float8 with its scale": (
        lambda t: t.update({SCALED: t[SCALED].to(torch.float8_e4m3fn), SCALED + "_scale": torch.ones(1)}),
        "holds .*up_proj.weight_scale: this checkpoint is quantised.*google/diffusiongemma-26B-A4B-it",
    ),
    "block scales": (lambda t: t.update({SCALED + "_scale_inv": torch.ones(1)}), "weight_scale_inv: this .* quantised"),
    "packed int4": (
        lambda t: t.update({SCALED.removesuffix("weight") + "weight_packed": t.pop(SCALED).to(torch.int32)}),
        "weight_packed: this checkpoint is quantised",
    ),
    "int8": (lambda t: t.update({SCALED: t[SCALED].to(torch.int8)}), "is I8 in .*is quantised"),
    "float64": (
        lambda t: t.update({SCALED: t[SCALED].double()}),
        "is F64 .*cannot hold exactly; convert it to float32",
    ),
    "int64": (lambda t: t.update({SCALED: t[SCALED].long()}), "is I64 in .*cannot hold exactly"),
    "complex": (
        lambda t: t.update({"model.encoder.embed_vision.x": torch.ones(2, dtype=torch.complex64)}),
        "embed_vision.x is C64 in .*cannot hold exactly",
    ),
}


@pytest.mark.parametrize("name", TYPES)
def test_dtypes_that_cannot_be_kept_are_refused_before_anything_is_written(single, path, tmp_path, name):
    change, message = TYPES[name]
    tensors = all_tensors(path)
    change(tensors)
    for file in (*path.glob("*.safetensors"), path / INDEX):
        file.unlink()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    error = cases.error_of("round_trip", path=path, layout={}, target=tmp_path / "written")
    assert re.search(message, error) and "\n" not in error, error
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.float64, torch.bool])
def test_dtypes_that_can_be_kept_come_back_byte_for_byte(single, path, tmp_path, dtype):
    """Those of half the width in the text model, and any that carried tensors may have."""
    for file in path.glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors:
            if name.startswith("model.encoder.vision") or dtype.itemsize == 2:
                tensors[name] = tensors[name].mul(10).to(dtype)
        save_file(tensors, file, metadata={"format": "pt"})
    cases.round_trip(path, {}, tmp_path / "written")
    assert_same_bytes(all_tensors(tmp_path / "written"), all_tensors(path))


@pytest.mark.parametrize("size", ["base", "one_global_kv", "odd_vocab", "deep"])
def test_the_tensors_of_a_configuration_are_known_without_a_network(checkpoint, size):
    tensors = all_tensors(checkpoint(size))
    stored = {name: tuple(tensor.shape) for name, tensor in tensors.items() if not name.startswith(CARRIED_PREFIXES)}
    assert released_tensors(ModelConfig.from_pretrained(checkpoint(size))) == stored
