"""The GPUs of conf/gpu: peaks, memory and links, each file with the document of its figures.

load_gpu("h100").peak("bfloat16")       # FLOP/s
"""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_diffgemma.repository import CONF
from nemo_diffgemma.schema import ConfigurationError, validate

GPUS = CONF / "gpu"
PEAKS = ("float32", "tf32", "bfloat16", "float16", "fp8", "nvfp4", "int8")
_DEVICES = {"dgx_spark": "gb10"}  # what torch calls a GPU that is not named as its file
_PCIE_GB_S = {4: 31.5, 5: 63.0, 6: 121.0}  # 16 lanes, one direction, after encoding


@dataclass
class Links:
    """How a GPU reaches others: NVLink in GB/s, both directions together, or None; and the generation of its PCIe."""

    nvlink_gb_s: float | None
    pcie_generation: int

    @property
    def bytes_per_second(self) -> float:
        """In one direction, of the faster link."""
        return 1e9 * (self.nvlink_gb_s / 2 if self.nvlink_gb_s else _PCIE_GB_S[self.pcie_generation])


@dataclass
class Gpu:
    """One file of conf/gpu. `tflops` holds dense peaks, None where the chip has no such unit."""

    name: str
    compute_capability: str  # as in sm_90
    memory_gb: float
    bandwidth_gb_s: float
    tflops: dict[str, float | None]
    links: Links
    source: str  # document of the figures

    def __post_init__(self) -> None:
        if set(self.tflops) != set(PEAKS):
            raise ConfigurationError(f"tflops has {', '.join(self.tflops)}; expected {', '.join(PEAKS)} (null: none)")
        if self.links.pcie_generation not in _PCIE_GB_S:
            raise ConfigurationError(f"links.pcie_generation={self.links.pcie_generation}; expected 4, 5 or 6")
        numbers = [self.memory_gb, self.bandwidth_gb_s, *(peak for peak in self.tflops.values() if peak is not None)]
        if min(numbers) <= 0:
            raise ConfigurationError("memory_gb, bandwidth_gb_s and every peak of tflops must be above 0")
        if not self.compute_capability.startswith("sm_"):
            raise ConfigurationError(f"compute_capability={self.compute_capability!r}; expected the form sm_90")

    def peak(self, dtype: str) -> float | None:
        """FLOP/s of products in `dtype`, None where the chip has none."""
        known = self.tflops[dtype]  # float32 is float32: export.engine.builders switches TF32 off
        return None if known is None else known * 1e12


def gpu_names() -> list[str]:
    """The files of conf/gpu."""
    return sorted(file.stem for file in GPUS.glob("*.yaml"))


def check_gpu(key: str, name: str) -> None:
    """Raise `ConfigurationError` where conf/gpu has no such file; `key` is what the user has set to `name`."""
    if name not in gpu_names():
        raise ConfigurationError(f"{key}={name!r} is no file of conf/gpu; use one of {', '.join(gpu_names())}")


def gpu_of_device(name: str) -> Gpu | None:
    """The GPU that torch calls `name`, such as "NVIDIA H100 80GB HBM3"; None where conf/gpu has no file of it.

    Cards with other peaks under the same number (PCIe, NVL, MAX-Q) are none of these.
    """
    words = f" {name.lower().replace('-', ' ')} "
    if any(f" {other} " in words for other in ("pcie", "nvl", "max q", "laptop", "d")):
        return None
    found = [file for file in gpu_names() if f" {_DEVICES.get(file, file.replace('_', ' '))} " in words]
    return load_gpu(found[0]) if found else None


def load_gpu(name: str) -> Gpu:
    """`conf/gpu/<name>.yaml`. Raises `ConfigurationError` naming the files there are, or the key that is wrong."""
    check_gpu("gpu", name)
    try:
        return validate(OmegaConf.load(GPUS / f"{name}.yaml"), Gpu)  # type: ignore[arg-type]
    except (ConfigurationError, OmegaConfBaseException) as error:
        raise ConfigurationError(f"conf/gpu/{name}.yaml: {error}") from None
