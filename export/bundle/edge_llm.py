"""A checkpoint for TensorRT Edge-LLM, NVIDIA's own engine for this model on one Jetson, DGX Spark or RTX GPU.

    python export/build.py builder=edge_llm checkpoint=<directory> out=edge
    pip install "tensorrt-edgellm[export]==0.11.0"        # in an environment of its own: it pins versions
    tensorrt-edgellm-export edge edge-onnx --skip-visual    # on any machine; engines are built on the device

Its exporter wants more than a released-format directory must have: a vision configuration, every setting of the
sampler, a tokenizer and a chat template. Here the sampler's settings are completed from the checkpoint's defaults, the
smallest vision configuration stands in for a missing one, and a template that joins the messages as they are for a
missing template. A tokenizer cannot be made up.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from export.bundle.building import link_checkpoint
from export.bundle.format import writing
from export.graph.weights import check_tensors, engine_weights
from nemo_diffgemma.config import ModelConfig
from nemo_diffgemma.diffusion.sampler_config import SamplerConfig
from nemo_diffgemma.errors import UserError
from nemo_diffgemma.parallel.layout import ParallelLayout

SMALLEST_CANVAS = 8  # the length with which version 0.11.0 traces
CONFIG, GENERATION, TEMPLATE = "config.json", "generation_config.json", "chat_template.jinja"
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
_HOLD_TEMPLATES = ("tokenizer_config.json", "processor_config.json", "chat_template.json")
_PLAIN_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


class EdgeLlmError(UserError):
    """A checkpoint that lacks what Edge-LLM needs; the message names it and what to do."""


def write_checkpoint(source: Path, target: Path) -> None:
    """Write the directory `target` from the released-format directory `source`.

    Tensors are hard links where the disk allows it. Raises `EdgeLlmError` without a tokenizer and for a canvas that is
    too short, `WeightsError` where tensors are missing or of another shape, `BundleError` where `target` is not empty;
    nothing half-written stays.
    """
    config = ModelConfig.from_pretrained(source)
    if config.canvas_length < SMALLEST_CANVAS:
        raise EdgeLlmError(
            f"{source} has canvas_length={config.canvas_length}; Edge-LLM's exporter takes {SMALLEST_CANVAS} or more; "
            "use another builder for this model, builder=tensorrt_rtx"
        )
    missing = [name for name in _TOKENIZER if not (source / name).is_file()]
    if missing:
        raise EdgeLlmError(
            f"{source} has no {' and no '.join(missing)}, and Edge-LLM works on text only; copy the tokenizer's files "
            "of the model into it: AutoTokenizer.from_pretrained(<model>).save_pretrained(<directory>)"
        )
    check_tensors(source, engine_weights(config, ParallelLayout()))
    with writing(target) as partial:
        link_checkpoint(source, partial, skip=[CONFIG, GENERATION])
        _write(partial / CONFIG, _configuration(source, config))
        _write(partial / GENERATION, _generation(source, config))
        if not _has_template(source):
            (partial / TEMPLATE).write_text(_PLAIN_TEMPLATE)


def _configuration(source: Path, config: ModelConfig) -> dict[str, Any]:
    configuration = json.loads((source / CONFIG).read_text())
    if not isinstance(configuration.get("vision_config"), dict):
        # what a model gets that was never read from a file
        configuration["vision_config"] = replace(config, source=None).to_huggingface()["vision_config"]
    return configuration


def _generation(source: Path, config: ModelConfig) -> dict[str, Any]:
    """The settings that are there, with every one that the exporter reads; it takes null for a number."""
    file = source / GENERATION
    given = json.loads(file.read_text()) if file.is_file() else {}
    sampler = SamplerConfig.of_checkpoint(source, config)
    eos = sampler.eos_token_id
    return {
        **given,
        "max_denoising_steps": sampler.max_denoising_steps,
        "t_min": sampler.t_min,
        "t_max": sampler.t_max,
        "stability_threshold": sampler.stability_threshold,
        "confidence_threshold": sampler.confidence_threshold,
        "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": sampler.entropy_bound},
        "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
        "pad_token_id": sampler.pad_token_id,
    }


def _has_template(source: Path) -> bool:
    if (source / TEMPLATE).is_file():
        return True
    holders = [source / name for name in _HOLD_TEMPLATES if (source / name).is_file()]
    return any(json.loads(file.read_text()).get("chat_template") for file in holders)


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
