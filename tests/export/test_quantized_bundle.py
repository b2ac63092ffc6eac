"""Bundles with quantised experts: inputs are those described, counted as narrow as they are, checked by checksum."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import onnx
import pytest

from export.building import build_bundle
from export.bundle import Settings, read_bundle, verify_checksums
from export.graph_cost import count
from export.quantize import SCHEMES
from export.roofline import RooflineConfig, roofline
from export.tracing import trace
from export.weights import ENCODER
from nemo_diffgemma import DiffusionGemma
from tests.export import kit
from tests.export.test_bundle import LIMITS, Shown
from tests.export.test_quantize import CONFIG


@pytest.fixture(scope="module")
def blocks(single, tmp_path_factory):
    """`blocks(scheme, weights)` -> a bfloat16 bundle of a model whose experts can be cut into blocks."""
    folder, traced = tmp_path_factory.mktemp("blocks"), functools.cache(trace)
    network = DiffusionGemma(CONFIG)
    network.init_weights(0)
    network.save_huggingface(folder / "checkpoint")

    @functools.cache
    def made(scheme: str | None, weights: str = "none") -> Path:
        out, source = folder / f"{scheme}-{weights}", CONFIG if weights == "none" else folder / "checkpoint"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("export.building.trace", traced)
            build_bundle(source, out, Settings("bfloat16", weights=weights, quantization=scheme, limits=LIMITS))
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
