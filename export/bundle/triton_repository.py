"""A model repository for Triton's Python backend, written into every bundle of one rank that has weights.

    triton/diffusion_gemma/config.pbtxt      inputs, outputs, where the bundle and this project's code are
    triton/diffusion_gemma/1/model.py        `export/bundle/triton_model.py`

    PATH=$PWD/.venv/bin:$PATH tritonserver --model-repository=bundles/mine/triton

One process serves one rank, so bundles of several have none. `export/README.md` is the guide.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from export.bundle.triton_request import INPUTS

MODEL = "diffusion_gemma"
# builders of export/build.py -> what opens the bundle
PROVIDERS = {
    "onnx": "onnxruntime",
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "tensorrt_rtx",
    "tensorrt_llm": "tensorrt_llm",
}
_OUTPUTS = {
    "tokens": ("TYPE_INT64", [-1, -1]),  # [B, new]
    "text": ("TYPE_STRING", [-1]),  # [B]
    "forwards": ("TYPE_INT64", [-1]),  # [B], with the last response
    "tokens_per_forward": ("TYPE_FP32", [-1]),  # [B], with the last response
}


def write(directory: Path, builder: str) -> None:
    """Write `triton/` into the bundle `directory`, which `builder` has made."""
    model = directory / "triton" / MODEL
    (model / "1").mkdir(parents=True)
    (model / "config.pbtxt").write_text(_configuration(PROVIDERS[builder]))
    shutil.copyfile(Path(__file__).with_name("triton_model.py"), model / "1" / "model.py")


def _configuration(provider: str) -> str:
    parameters = {
        "bundle": "../..",  # absolute, or relative to the directory of config.pbtxt
        "provider": provider,
        "code": "",  # this project's repository, where PYTHONPATH does not name it
    }
    parts = [
        f'name: "{MODEL}"',
        'backend: "python"',
        "max_batch_size: 0",
        "model_transaction_policy {\n  decoupled: true\n}",
        *(_tensor("input", name, kind, dims, optional=True) for name, (kind, dims) in INPUTS.items()),
        *(_tensor("output", name, kind, dims) for name, (kind, dims) in _OUTPUTS.items()),
        f"instance_group {{\n  count: 1\n  kind: {'KIND_CPU' if provider == 'onnxruntime' else 'KIND_GPU'}\n}}",
        *(f'parameters {{\n  key: "{k}"\n  value {{\n    string_value: "{v}"\n  }}\n}}' for k, v in parameters.items()),
    ]
    return "\n".join(parts) + "\n"


def _tensor(role: str, name: str, kind: str, dims: list[int], optional: bool = False) -> str:
    lines = [f'name: "{name}"', f"data_type: {kind}", f"dims: {dims}", *(["optional: true"] if optional else [])]
    return "\n  ".join([f"{role} {{", *lines]) + "\n}"
