"""A model repository for Triton's Python backend, written into every bundle of one rank that has weights.

    triton/diffusion_gemma/config.pbtxt      inputs, outputs, where the bundle and this project's code are
    triton/diffusion_gemma/1/model.py        `export/bundle/triton_model.py`

    PYTHONPATH=<this repository> tritonserver --model-repository=bundles/mine/triton

To keep it elsewhere, copy `triton/` and set the parameter `bundle` in config.pbtxt to the path of the bundle. Triton's
Python must be one in which this project and the provider's package are installed (see "Creating Custom Execution
Environments" in the documentation of the backend). One process serves one rank, so bundles of several have none.
Not run in Triton itself: the tests drive model.py through a double of the backend's module, and parse config.pbtxt with
Triton's own schema where tritonclient is installed (make venv does not install it).
"""

from __future__ import annotations

import shutil
from pathlib import Path

MODEL = "diffusion_gemma"
# builders of export/build.py -> what opens the bundle
PROVIDERS = {
    "onnx": "onnxruntime",
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "tensorrt_rtx",
    "tensorrt_llm": "tensorrt_llm",
}
# fields of SamplerConfig that a request may set, with Triton's types
SETTINGS = {
    "max_denoising_steps": "TYPE_INT32",
    "entropy_bound": "TYPE_FP32",
    "t_min": "TYPE_FP32",
    "t_max": "TYPE_FP32",
    "stability_threshold": "TYPE_INT32",
    "confidence_threshold": "TYPE_FP32",
}
_INPUTS = {
    "input_ids": ("TYPE_INT64", [-1, -1]),  # [B, S]; or prompt
    "attention_mask": ("TYPE_INT64", [-1, -1]),  # [B, S], zeros on the left
    "prompt": ("TYPE_STRING", [1]),
    "max_new_tokens": ("TYPE_INT32", [1]),
    "seed": ("TYPE_INT64", [1]),
    "stream": ("TYPE_BOOL", [1]),
    **{name: (kind, [1]) for name, kind in SETTINGS.items()},
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
        *(_tensor("input", name, kind, dims, optional=True) for name, (kind, dims) in _INPUTS.items()),
        *(_tensor("output", name, kind, dims) for name, (kind, dims) in _OUTPUTS.items()),
        f"instance_group {{\n  count: 1\n  kind: {'KIND_CPU' if provider == 'onnxruntime' else 'KIND_GPU'}\n}}",
        *(f'parameters {{\n  key: "{k}"\n  value {{\n    string_value: "{v}"\n  }}\n}}' for k, v in parameters.items()),
    ]
    return "\n".join(parts) + "\n"


def _tensor(role: str, name: str, kind: str, dims: list[int], optional: bool = False) -> str:
    lines = [f'name: "{name}"', f"data_type: {kind}", f"dims: {dims}", *(["optional: true"] if optional else [])]
    return "\n  ".join([f"{role} {{", *lines]) + "\n}"
