"""What a checkpoint has beside its tensors: configuration, tokenizer, templates, processors, settings of generation."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any, Protocol

import torch

from nemo_diffgemma.checkpoint.tensor_files import INDEX, CheckpointError
from nemo_diffgemma.config import ModelConfig
from nemo_diffgemma.diffusion.sampler_config import SamplerConfig
from nemo_diffgemma.json_files import read_object

CONFIG, GENERATION = "config.json", "generation_config.json"
FOLDERS = ("additional_chat_templates",)  # that belong to a checkpoint: processors have theirs in files
_WEIGHTS = (  # other formats of the same weights
    *(".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".nemo", ".distcp"),
    *(".gguf", ".onnx", ".data", ".engine", ".msgpack", ".h5", ".npz", ".tflite"),
)
_LARGEST = 1 << 30  # bytes of one file that may belong to a checkpoint
_log = logging.getLogger(__name__)


class HasAssets(Protocol):
    """A network, or a checkpoint that is converted without one."""

    @property
    def model_config(self) -> ModelConfig: ...
    @property
    def assets(self) -> Path | None: ...
    @property
    def dtype(self) -> torch.dtype: ...


def write_assets(network: HasAssets, directory: Path) -> None:
    """Everything that belongs to `network` beside its tensors, into `directory`; rank 0 only.

    Files come from the checkpoint that the network was read from. Logs what is left out.
    """
    if network.assets is not None and network.assets.resolve() != directory.resolve():
        left_out = _copy(network.assets, directory)
        if left_out:
            _log.warning("left out, as no part of a checkpoint: %s in %s", ", ".join(left_out), network.assets)
    settings = complete_generation(directory, network)
    if settings is not None:
        (directory / GENERATION).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    config = network.model_config.to_huggingface()
    if network.model_config.source is None:
        config["dtype"] = str(network.dtype).removeprefix("torch.")
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _copy(source: Path, directory: Path) -> list[str]:
    """Copy what belongs to a checkpoint -> names of what is left out. Hidden files are nobody's."""
    left_out = []
    for entry in sorted(source.iterdir()):
        if entry.name.startswith((".", "__pycache__")) or entry.name in (INDEX, CONFIG):
            continue
        if entry.is_dir() and entry.name in FOLDERS:
            (directory / entry.name).mkdir(exist_ok=True)  # a write that was killed may have begun it
            for file in sorted(file for file in entry.iterdir() if file.is_file() and file.name[0] != "."):
                shutil.copyfile(file, directory / entry.name / file.name)
        elif entry.is_file() and not entry.name.endswith(_WEIGHTS) and entry.stat().st_size <= _LARGEST:
            shutil.copyfile(entry, directory / entry.name)
        elif entry.suffix != ".safetensors":  # tensors are written by others
            left_out.append(entry.name)
    return left_out


def complete_generation(directory: Path, network: HasAssets) -> dict[str, Any] | None:
    """The generation_config.json of `directory` with all that neighbours ask for, or None where nothing is missing."""
    file = directory / GENERATION
    there = read_object(file, CheckpointError) if file.is_file() else {}
    sampler = SamplerConfig.of_checkpoint(directory, network.model_config)
    wanted = {"bos_token_id": network.model_config.bos_token_id, "max_new_tokens": network.model_config.canvas_length}
    wanted |= sampler.to_huggingface()
    if all(value is None or there.get(key) is not None for key, value in wanted.items()):
        return None
    return wanted | {k: v for k, v in there.items() if v is not None and k not in ("entropy_bound", "sampler_config")}
