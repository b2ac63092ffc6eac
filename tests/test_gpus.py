"""Every file of conf/gpu is whole; a wrong one is refused by name."""

from __future__ import annotations

import pytest

from nemo_diffgemma import gpus
from nemo_diffgemma.gpus import gpu_names, load_gpu
from nemo_diffgemma.schema import ConfigurationError


def test_every_gpu_file_is_valid() -> None:
    assert gpu_names() == ["b200", "dgx_spark", "gb200", "h100", "h200", "rtx_5090", "rtx_pro_6000"]
    for gpu in map(load_gpu, gpu_names()):
        assert gpu.source
        # narrower types are never slower
        peaks = [gpu.tflops[dtype] for dtype in ("tf32", "bfloat16", "fp8", "nvfp4")]
        known = [peak for peak in peaks if peak is not None]
        assert known == sorted(known)
        assert (gpu.tflops["nvfp4"] is None) == (gpu.compute_capability == "sm_90")


def test_an_unknown_gpu_is_answered_with_those_there_are() -> None:
    with pytest.raises(ConfigurationError, match="gpu='h1000'.*use one of b200, dgx_spark.*rtx_pro_6000"):
        load_gpu("h1000")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("memory_gb: 80", "mine.yaml: memory_gb is not given"),
        ("  fp8: 1979 # 3958 / 2", "mine.yaml: tflops has"),
        ("name: NVIDIA H100 SXM 80 GB", "mine.yaml: name is not given"),
    ],
)
def test_a_gpu_file_without_a_key_is_refused_by_name(line: str, message: str, tmp_path, monkeypatch) -> None:
    text = (gpus.GPUS / "h100.yaml").read_text()
    assert line in text
    (tmp_path / "mine.yaml").write_text(text.replace(line, ""))
    monkeypatch.setattr(gpus, "GPUS", tmp_path)
    with pytest.raises(ConfigurationError, match=message):
        load_gpu("mine")


def test_a_misspelt_key_is_refused_by_name(tmp_path, monkeypatch) -> None:
    (tmp_path / "mine.yaml").write_text((gpus.GPUS / "h100.yaml").read_text() + "bandwith_gb_s: 1\n")
    monkeypatch.setattr(gpus, "GPUS", tmp_path)
    with pytest.raises(ConfigurationError, match="mine.yaml: unknown key bandwith_gb_s; did you mean bandwidth_gb_s"):
        load_gpu("mine")
