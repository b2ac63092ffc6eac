"""Any checkpoint by its path: a Hugging Face directory, a sharded checkpoint or a `.nemo`, told apart by looking."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from nemo_diffgemma.checkpoint import huggingface, nemo_archive, sharded
from nemo_diffgemma.checkpoint.tensor_files import CheckpointError
from nemo_diffgemma.config import ConfigError, ModelConfig
from nemo_diffgemma.diffusion_gemma import DiffusionGemma
from nemo_diffgemma.parallel.agreement import agree_error
from nemo_diffgemma.scratch import obstacle

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # what a network can be loaded as
FORMATS = ("huggingface", "sharded", "nemo")


def format_of(path: str | Path) -> str:
    """One of `FORMATS`. Raises `CheckpointError` where `path` is none of them."""
    place = Path(path).expanduser()
    if not place.exists():
        raise CheckpointError(f"checkpoint {path} does not exist; give a directory or a .nemo file")
    if place.is_dir() and sharded.is_sharded(place):
        return "sharded"
    if place.is_dir() and (place / "config.json").is_file():
        return "huggingface"
    if place.is_dir() and (place / ".metadata").is_file():
        sharded.check_complete(place)
    if nemo_archive.is_archive(place):
        return "nemo"
    raise CheckpointError(
        f"checkpoint {path} is neither a Hugging Face directory (config.json, *.safetensors), nor a sharded checkpoint "
        "(.metadata, assets/config.json), nor a .nemo archive; of a training run give run_dir/checkpoints/step-N"
    )


def load_network(path: str | Path, dtype: torch.dtype = torch.float32) -> DiffusionGemma:
    """The network of any checkpoint, in the current layout, weights only and ready for inference. Collective.

    Raises `CheckpointError`, `ConfigError` or `LayoutError`, on every rank.
    """
    format, config, error = "", None, None
    place = Path(path).expanduser()
    try:
        format = format_of(place)
        if format == "sharded":
            config = ModelConfig.from_pretrained(place / sharded.ASSETS)
            sharded.check(config, place)  # before memory is taken for sizes that may be wrong
    except (CheckpointError, ConfigError) as failure:
        error = failure
    agree_error(error)
    if format == "huggingface":
        return DiffusionGemma.from_huggingface(place, dtype)
    if format == "nemo":
        return DiffusionGemma.from_huggingface(nemo_archive.unpack(place) / nemo_archive.WEIGHTS, dtype)
    assert config is not None
    network = DiffusionGemma(config, dtype)
    sharded.load_sharded(network, place)
    return network.eval()


def save_network(network: DiffusionGemma, path: str | Path, format: str) -> None:
    """Write the weights in one of `FORMATS`. Collective; raises `CheckpointError` on every rank."""
    check_target(path, format)
    if format == "huggingface":
        huggingface.save(network, path)
    elif format == "sharded":
        sharded.save_sharded(network, path)
    else:
        nemo_archive.write_archive(network, path)


def check_target(path: str | Path, format: str) -> None:
    """Raise `CheckpointError`, on every rank, where `path` is no place for a new checkpoint of that format."""
    error: CheckpointError | None = None
    if format not in FORMATS:
        error = CheckpointError(f"format={format!r}; use one of {', '.join(FORMATS)}")
    elif dist.get_rank() == 0:
        reason = obstacle(Path(path).expanduser(), is_directory=format != "nemo")
        error = None if reason is None else CheckpointError(reason)
    agree_error(error)
