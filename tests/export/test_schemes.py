"""Quantised experts: what the packed tensors stand for, how they are calibrated, and their files."""

from __future__ import annotations

import fnmatch

import numpy as np
import pytest
import torch
from onnx import TensorProto, numpy_helper
from safetensors.torch import save_file
from torch import Tensor

from export.graph.model import Model, Weights
from export.graph.weights import engine_weights
from export.quantization import schemes as quantize
from export.quantization.calibration import calibrate
from export.quantization.qdq import quantize_graph
from export.quantization.schemes import (
    BLOCK,
    SCHEMES,
    QuantizationError,
    dequantize,
    is_quantized,
    packed_inputs,
    quantize_weight,
)
from tests.export import kit, quantized
from tests.export.quantized import CONFIG, HALVES, NAME, PROMPTS, WHOLE

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


# -- matrices ----------------------------------------------------------------------------------------------------------


def _representable(scheme: str) -> Tensor:
    """A matrix [4, 128] that the scheme has numbers for, and whose largest entries are the ends of its ranges."""
    generator = torch.Generator().manual_seed(0)
    if scheme == "fp8":
        codes = torch.randint(0, 127, (4, 128), generator=generator, dtype=torch.uint8)
        values = codes.view(torch.float8_e4m3fn).float()
        values[0, 0] = 448.0
        return values * 0.25
    if scheme == "int4":
        values = torch.randint(-7, 8, (4, 128), generator=generator).float()
        values[:, ::64] = 7.0
        return values * torch.tensor([0.5, 2.0]).repeat_interleave(64)
    values = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])[torch.randint(0, 8, (4, 128), generator=generator)]
    values *= torch.where(torch.rand(4, 128, generator=generator) < 0.5, -1.0, 1.0)
    values[:, ::16] = 6.0
    scales = torch.tensor([448.0, 1.0, 2.0**-9, 13.0, 0.25, 96.0, 3.5, 1.125])
    return values * scales.repeat_interleave(16) * 0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_numbers_that_the_format_has_come_back_exactly(scheme: str, dtype: torch.dtype) -> None:
    matrix = _representable(scheme).to(dtype)
    assert torch.equal(dequantize(NAME, quantize_weight(NAME, matrix, scheme, 1.0), scheme), matrix.float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_error_of_every_entry_is_within_half_a_step_of_the_format(scheme: str, dtype: torch.dtype) -> None:
    """Half of the distance between neighbours, and what lies beyond the largest number after scales are rounded."""
    generator = torch.Generator().manual_seed(1)
    spread = torch.logspace(-3, 0, 48)[:, None]
    matrix = (torch.randn(48, 256, generator=generator) * spread).to(dtype)
    packed = quantize_weight(NAME, matrix, scheme, 1.0)
    exact = matrix.float()
    scale = packed[f"{NAME}.scale"].float()
    if scheme == "fp8":  # 3 bits of mantissa: half a step is 2^-4 of the number, or of the least normal one, 2^-6
        bound = torch.maximum(exact.abs() / 16, scale * 2**-10)
        largest = 448 * scale
    elif scheme == "int4":
        bound = (scale / 2).repeat_interleave(64, 1)
        largest = 7 * scale.repeat_interleave(64, 1)
    else:  # steps of 0.5 up to 2, 1 up to 4, 2 up to 6: half of them is at most a fifth of the number beyond 1.25
        step = (scale * packed[f"{NAME}.global_scale"]).repeat_interleave(16, 1)
        bound = torch.maximum(step / 4, exact.abs() / 5)
        largest = 6 * step
    error = (dequantize(NAME, packed, scheme) - exact).abs()
    allowed = torch.maximum(bound, exact.abs() - largest)
    assert (error <= allowed * (1 + 1e-5)).all(), (error / allowed).max()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_zeros_stay_zeros_under_positive_scales(scheme: str) -> None:
    matrix = torch.zeros(4, 128)
    matrix[2, 64:] = 1.0
    packed = quantize_weight(NAME, matrix, scheme, 0.0)
    assert torch.equal(dequantize(NAME, packed, scheme), matrix)
    assert all((tensor.float() > 0).all() for key, tensor in packed.items() if key.endswith("scale"))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_chunks_of_rows_make_no_difference(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(50, 128, generator=torch.Generator().manual_seed(2))
    whole = quantize_weight(NAME, matrix, scheme, 1.0)
    monkeypatch.setattr(quantize, "_CHUNK", 3 * 128)
    chunked = quantize_weight(NAME, matrix, scheme, 1.0)
    assert all(torch.equal(_bytes(whole[key]), _bytes(chunked[key])) for key in whole)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_matrices_of_several_experts_are_packed_as_their_rows(scheme: str) -> None:
    """The sparse form has [E, N, K]; one scale for all of FP8, and no block spans two experts."""
    matrices = torch.randn(3, 10, 128, generator=torch.Generator().manual_seed(2))
    whole, rows = (quantize_weight(NAME, m, scheme, 1.0) for m in (matrices, matrices.flatten(0, 1)))
    assert all(torch.equal(_bytes(whole[key]), _bytes(rows[key])) for key in whole)
    for key, spec in packed_inputs(NAME, matrices.shape, scheme, torch.float32).items():
        assert tuple(whole[key].shape) == spec.stored and (not spec.shape or spec.shape[:2] == (3, 10)), key
    assert torch.equal(dequantize(NAME, whole, scheme).flatten(0, 1), dequantize(NAME, rows, scheme))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bytes_mean_the_same_to_onnx(scheme: str) -> None:
    matrix = torch.randn(6, 128, generator=torch.Generator().manual_seed(3))
    packed = quantize_weight(NAME, matrix, scheme, 1.0)
    spec = packed_inputs(NAME, matrix.shape, scheme, torch.float32)[NAME]
    stored = TensorProto(data_type=spec.onnx_type, dims=spec.shape, raw_data=_bytes(packed[NAME]).numpy().tobytes())
    scale = packed[f"{NAME}.scale"].float() * packed.get(f"{NAME}.global_scale", 1.0)
    blocks = scale.reshape(-1, scale.shape[-1] if scale.dim() else 1).repeat_interleave(BLOCK.get(scheme, 128), 1)
    numbers = torch.from_numpy(numpy_helper.to_array(stored).astype(np.float32))
    torch.testing.assert_close(dequantize(NAME, packed, scheme), numbers * blocks, rtol=1e-6, atol=0)


def test_what_cannot_be_quantised_is_refused_with_a_way_out() -> None:
    with pytest.raises(
        QuantizationError, match=r"\[4, 96\] cannot be cut into int4 blocks of 64 .* use quantization=fp8"
    ):
        quantize_weight(NAME, torch.ones(4, 96), "int4")
    with pytest.raises(QuantizationError, match="'int8'; use one of fp8, int4, nvfp4"):
        quantize_weight(NAME, torch.ones(4, 128), "int8")
    with pytest.raises(QuantizationError, match="calibrate"):
        quantize_weight(NAME, torch.ones(4, 128), "fp8")
    with pytest.raises(QuantizationError, match="holds nan"):
        quantize_weight(NAME, torch.tensor([[float("nan")] * 128, [1.0] * 128]), "int4")
    with pytest.raises(QuantizationError, match=f"no activation range for {NAME}"):
        quantize_graph(
            kit.traced("step", CONFIG, WHOLE, torch.float32, quantized="inputs"),
            "nvfp4",
            {k: v for k, v in quantized.amax().items() if k != NAME},
        )
    with pytest.raises(QuantizationError, match="not what to_loop or inline made of it"):
        quantize_graph(quantized.graph("step", "int4"), "int4")
    with pytest.raises(QuantizationError, match="give a few typical prompts"):
        quantize.check("fp8", CONFIG, WHOLE, "sparse", [])


# -- calibration -------------------------------------------------------------------------------------------------------


class _Watch(Weights):
    largest: dict[str, float]

    def linear(self, x: Tensor, name: str, experts: Tensor | None = None) -> Tensor:
        self.largest[name] = max(self.largest.get(name, 0.0), float(x.abs().max()))
        return super().linear(x, name, experts)


def test_calibrated_range_is_the_largest_input_of_each_matrix() -> None:
    watch = _Watch(quantized.weights())
    watch.largest = {}
    amax = calibrate(Model(CONFIG, WHOLE, torch.float32), watch, PROMPTS, steps=4)
    assert amax == watch.largest
    assert set(amax) == {name for name in quantized.weights() if is_quantized(name)}


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_file_of_a_rank_holds_its_matrices(scheme: str, tmp_path) -> None:
    spec = engine_weights(CONFIG, HALVES)
    experts = {name: quantized.as_stored(name) for name in spec if is_quantized(name)}
    save_file({name: tensor.contiguous() for name, tensor in experts.items()}, tmp_path / "model.safetensors")
    file = tmp_path / "quantized.rank1.safetensors.part"
    quantize.write_quantized(file, tmp_path, spec, 1, scheme, torch.bfloat16, quantized.amax())
    loaded = dict(quantize.load_quantized(file, scheme))
    expected: dict[str, Tensor] = {}
    for name, stored in experts.items():
        matrix = spec[name].of_rank(stored, 1).to(torch.bfloat16)
        expected |= quantize_weight(name, matrix, scheme, quantized.amax()[name])
    assert loaded.keys() == expected.keys()
    assert all(
        torch.equal(_bytes(loaded[k]), _bytes(expected[k])) and loaded[k].dtype == expected[k].dtype for k in loaded
    )
    with pytest.raises(QuantizationError, match=f"holds {scheme} weights, but other was asked for"):
        dict(quantize.load_quantized(file, "other"))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_exclusions_of_hf_quant_config_are_all_that_is_not_quantised(scheme: str) -> None:
    found = quantize.hf_quant_config(scheme)["quantization"]
    assert found["quant_algo"] == {"fp8": "FP8", "int4": "W4A16_AWQ", "nvfp4": "NVFP4"}[scheme]
    assert found.get("group_size") == BLOCK.get(scheme)
    for name, weight in engine_weights(CONFIG, WHOLE).items():
        if len(weight.shape) >= 2:
            excluded = any(fnmatch.fnmatch(name, pattern + "*") for pattern in found["exclude_modules"])
            assert excluded != is_quantized(name), name


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
