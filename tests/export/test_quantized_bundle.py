"""Bundles with quantised experts: inputs are those described, counted as narrow as they are, checked by checksum."""

from __future__ import annotations

import functools
import json
import shutil
from math import prod
from pathlib import Path

import onnx
import pytest
import torch

from export import open_bundle
from export.bundle.building import build_bundle
from export.bundle.comparison import torch_engine
from export.bundle.format import Settings, read_bundle, verify_checksums
from export.engine.builders import build_engine
from export.graph.cost import count
from export.graph.weights import ENCODER, Weight, engine_weights
from export.quantization.schemes import SCHEMES, is_quantized, load_quantized
from export.roofline import RooflineConfig, roofline
from nemo_diffgemma import DiffusionGemma
from tests.export import kit
from tests.export.quantized import CONFIG, PROMPTS
from tests.export.test_bundle import LIMITS, SAMPLER, Shown


@pytest.fixture(scope="module")
def blocks(single, tmp_path_factory):
    """`blocks(scheme, weights, dtype)` -> a bundle of a model whose experts can be cut into blocks."""
    folder = tmp_path_factory.mktemp("blocks")
    network = DiffusionGemma(CONFIG)
    network.init_weights(0)
    network.save_huggingface(folder / "checkpoint")

    @functools.cache
    def made(scheme: str | None, weights: str = "none", dtype: str = "bfloat16") -> Path:
        out, source = folder / f"{scheme}-{weights}-{dtype}", CONFIG if weights == "none" else folder / "checkpoint"
        settings = Settings(dtype, steps=8, weights=weights, quantization=scheme, limits=LIMITS)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("export.bundle.building.trace", kit.traced)
            build_bundle(source, out, settings, prompts=PROMPTS)
        return out

    return made


@pytest.mark.parametrize("scheme", [None, *SCHEMES])
def test_inputs_are_the_weights_that_are_described_and_the_graphs_own(blocks, scheme):
    found, read = read_bundle(blocks(scheme)), set()
    for graph in found.settings.graphs:
        model = onnx.load(found.path / found.settings.file(graph, 0))
        inputs = {value.name for value in model.graph.input}
        assert inputs - found.weight_inputs == kit.own_inputs(graph, found.config)
        read |= inputs & found.weight_inputs
    constants = {name for name in found.weight_inputs if scheme == "nvfp4" and name.endswith(".input_scale")}
    last = (
        f"{ENCODER}layers.{CONFIG.num_hidden_layers - 1}.layer_scalar"  # behind the keys and values `encode` ends with
    )
    assert read == found.weight_inputs - constants - {last}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_quantised_input_is_described(blocks, scheme):
    """weights.json tells file, key, slice and transform; the file has what it says, and nothing else."""
    found = read_bundle(blocks(scheme, "inputs", "float32"))
    described = json.loads((found.path / "weights.json").read_text())["quantized"]
    matrices = engine_weights(CONFIG, found.settings.layout)
    assert set(described) == set(filter(is_quantized, matrices))
    held = dict(load_quantized(found.quantized(0), scheme))
    for name, entry in described.items():
        assert entry["file"].format(rank=0) == found.quantized(0).name
        assert Weight.from_json(entry) == matrices[name]
        for key, told in entry["inputs"].items():
            narrow = told["dtype"] in ("INT4", "FLOAT4E2M1")
            assert held.pop(key).numel() * (2 if narrow else 1) == prod(told["shape"]), key
    assert not held
    algorithm = json.loads((found.path / "config.json").read_text())["pretrained_config"]["quantization"]["quant_algo"]
    told = json.loads((found.path / "hf_quant_config.json").read_text())["quantization"]["quant_algo"]
    assert algorithm == told == {"fp8": "FP8", "int4": "W4A16_AWQ", "nvfp4": "NVFP4"}[scheme]
    # the checkpoint in the bundle is as it was: whoever reads it must not take its experts for quantised ones
    assert not list(found.assets.glob("hf_quant*"))


@pytest.mark.parametrize("scheme", ["fp8", "int4"])
def test_a_quantised_bundle_generates_what_was_traced_wherever_its_weights_lie(blocks, scheme):
    """The bundle that ONNX Runtime opens against the traced functions with the same packed experts, in PyTorch."""
    inputs, inline = (blocks(scheme, weights, "float32") for weights in ("inputs", "inline"))
    ids = torch.randint(CONFIG.vocab_size, (3, 11), generator=torch.Generator().manual_seed(0))
    given = dict(max_new_tokens=8, sampler=SAMPLER, seed=1)
    expected = torch_engine(read_bundle(inputs))[0].generate(ids, **given).sequences
    for bundle in (inputs, inline):
        engine = open_bundle(bundle)
        assert "loop" in engine._sessions
        assert torch.equal(engine.generate(ids, **given).sequences, expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_inline_weights_are_no_inputs_and_tensorrt_takes_them(blocks, scheme, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    found = read_bundle(blocks(scheme, "inline"))
    for graph in found.settings.graphs:
        file = found.path / found.settings.file(graph, 0)
        model = onnx.load(file, load_external_data=False)
        assert {value.name for value in model.graph.input} == kit.own_inputs(graph, CONFIG)
        profile = found.settings.profile(graph, CONFIG)
        report = build_engine("tensorrt_rtx", file, tmp_path / f"{graph}.engine", profile, targets=["sm_120"])
        assert set(report.network.inputs) == kit.own_inputs(graph, CONFIG)
        assert {"fp8": "QUANTIZE", "int4": "DEQUANTIZE", "nvfp4": "DYNAMIC_QUANTIZE"}[scheme] in report.network.layers


def test_a_structure_names_no_file_of_weights(blocks):
    described = json.loads((blocks("int4") / "weights.json").read_text())
    assert {entry["file"] for part in described.values() for entry in part.values()} == {None}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_of_a_quantised_structure_are_counted_narrow(blocks, scheme):
    """Before anything is downloaded: do they fit?"""
    whole, narrow = (
        roofline(RooflineConfig(str(blocks(name)), context=40), Shown())["graphs"] for name in (None, scheme)
    )
    experts = 3 * CONFIG.num_experts * CONFIG.moe_intermediate_size * CONFIG.hidden_size  # of a layer
    bytes_each = {"fp8": 1.0, "int4": 0.5 + 2 / 64, "nvfp4": 0.5 + 1 / 16}[scheme]  # with the scales of blocks
    for graph in whole:
        layers = CONFIG.num_hidden_layers - (graph == "encode")  # which ends with the last keys and values
        saved = whole[graph]["weight_bytes"] - narrow[graph]["weight_bytes"]
        assert saved == pytest.approx(layers * (2 - bytes_each) * experts, abs=100)


def test_the_bound_of_encode_holds_for_a_first_chunk(blocks):
    """A prompt longer than a chunk has chunks that read a context, and one that doesn't."""
    found = read_bundle(blocks(None))
    model = onnx.load(found.path / "encode.rank0.onnx")
    bound = roofline(RooflineConfig(str(found.path), context=40), Shown())["graphs"]["encode"]
    first = dict(batch=1, chunk=16, context_columns=1, window_columns=1)
    assert bound["bytes"] == count(model, first).bytes < count(model, {**first, "window_columns": 7}).bytes


def test_a_changed_byte_of_quantised_experts_is_found(blocks, tmp_path):
    copy = shutil.copytree(blocks("int4", "inputs"), tmp_path / "copy")
    verify_checksums(read_bundle(copy))
    file = copy / "quantized.rank0.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(ValueError, match="quantized.rank0.safetensors is not what was built: its checksum differs"):
        verify_checksums(read_bundle(copy))
