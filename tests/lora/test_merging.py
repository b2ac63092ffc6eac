"""Merging: what is written is the adapter's model, once in weights that encoder and decoder share."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from nemo_diffgemma import DiffusionGemma
from nemo_diffgemma.checkpoint import streaming
from nemo_diffgemma.errors import UserError
from tests.distributed.cases import answer
from tests.distributed.layouts import LAYOUTS
from tests.lora import kit
from tests.parity import questions

WEIGHTS = dict(damp=0.1, sublayers=0.5)


@pytest.fixture(scope="module")
def base(checkpoint):
    return checkpoint("base", **WEIGHTS)


@pytest.fixture(scope="module")
def adapter(single, base, tmp_path_factory):
    return kit.save(kit.adapted(base, kit.group()), tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def converted(adapter, tmp_path_factory):
    target = tmp_path_factory.mktemp("merged") / "model"
    streaming.convert(adapter, target, "huggingface")
    return target


def logits(network, reference):
    asked = [questions.question(reference, kind, 9) for kind in ("plain", "signal", "after_1_canvas")]
    return [answer(network, **one.asked()) for one in asked]


def off(ours, truth) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(ours, truth, strict=True))


def test_merged_logits_are_the_adapters(reference, adapter, converted):
    theirs = reference("base", **WEIGHTS)
    network = DiffusionGemma.from_checkpoint(adapter)
    truth = logits(network, theirs)
    assert off(logits(DiffusionGemma.from_checkpoint(converted), theirs), truth) < 1e-5
    network.merge_adapters()
    assert network.lora is None and off(logits(network, theirs), truth) < 1e-5


def test_transformers_loads_what_is_merged(reference, adapter, converted):
    from transformers import AutoConfig, DiffusionGemmaForBlockDiffusion

    theirs = reference("base", **WEIGHTS)
    merged = DiffusionGemmaForBlockDiffusion.from_pretrained(converted, config=AutoConfig.from_pretrained(converted))
    asked = questions.question(theirs, "signal", 9)
    truth = answer(DiffusionGemma.from_checkpoint(adapter), **asked.asked())
    with torch.no_grad():
        assert float((questions.answer(merged.eval(), asked) - truth).abs().max()) < questions.TOLERANCE


def test_streamed_and_in_a_layout_it_is_the_same(pool, adapter, converted, tmp_path):
    """And everything that has no adapter is bit for bit the base's, what is only carried included."""
    world, axes = LAYOUTS["tp2_etp2_ep2"]
    pool(world).run("tests.lora.cases:merged", path=str(adapter), layout=axes, target=str(tmp_path / "model"))
    tensors, other = whole(converted), whole(tmp_path / "model")
    assert tensors.keys() == other.keys()
    assert max(float((tensor - other[name]).abs().max()) for name, tensor in tensors.items()) < 1e-6
    before = whole(json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"])
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, tensors[name])}
    sizes = DiffusionGemma.from_checkpoint(adapter).lora.sizes
    assert changed == {f"model.decoder.{name}" + ("" if ".experts." in name else ".weight") for name in sizes}
    assert len(changed) == 3 * (3 + 1 + 3 + 1 + 2) - 1 + 3  # attention (one layer without v), mlp, router, experts


def whole(directory) -> dict:
    import pathlib

    return {k: t for file in sorted(pathlib.Path(directory).glob("*.safetensors")) for k, t in load_file(file).items()}


def test_a_network_with_adapters_is_not_written_as_a_whole(adapter, tmp_path):
    network = DiffusionGemma.from_checkpoint(adapter)
    with pytest.raises(UserError, match=r"call merge_adapters\(\)"):
        network.save_huggingface(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_conversion_refuses_another_base(adapter, checkpoint, tmp_path):
    from nemo_diffgemma.checkpoint.tensor_files import CheckpointError

    copy = kit.with_base(adapter, tmp_path / "adapter", checkpoint("base", seed=4, **WEIGHTS))
    with pytest.raises(CheckpointError, match="trained on another base"):
        streaming.convert(copy, tmp_path / "model", "huggingface")
    assert not (tmp_path / "model").exists()
