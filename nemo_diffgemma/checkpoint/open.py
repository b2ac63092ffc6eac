"""Any checkpoint by its path: a Hugging Face directory, a sharded checkpoint or a `.nemo`, told apart by looking.

A directory with an adapter (adapter_config.json) stands for its base and the adapter.
"""

from __future__ import annotations

from pathlib import Path

import torch

from nemo_diffgemma.checkpoint import huggingface, nemo_archive, sharded, sharded_writer
from nemo_diffgemma.checkpoint.tensor_files import CheckpointError
from nemo_diffgemma.errors import ConfigurationError
from nemo_diffgemma.model.network import Network
from nemo_diffgemma.parallel.agreement import all_or_none, is_rank_zero
from nemo_diffgemma.repository import user_path
from nemo_diffgemma.schema import DTYPES
from nemo_diffgemma.scratch import obstacle

FORMATS = ("huggingface", "sharded", "nemo")


def format_of(path: str | Path) -> str:
    """One of `FORMATS`, or `adapter`. Raises `CheckpointError` where `path` is none of them."""
    place = user_path(path)
    if not place.exists():
        raise CheckpointError(f"checkpoint {path} does not exist; give a directory or a .nemo file")
    if place.is_dir() and (place / "adapter_config.json").is_file():
        return "adapter"  # a run writes it beside the state of its optimizer
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
        "(.metadata, assets/config.json), nor a .nemo archive, nor an adapter (adapter_config.json); of a training run "
        "give run_dir/checkpoints/step-N"
    )


def assets_of(path: str | Path) -> Path:
    """The directory of what a checkpoint has beside its tensors; a `.nemo` is unpacked. Collective, raises as above."""
    with all_or_none():
        format = format_of(path)
    place = user_path(path)
    if format == "adapter":
        from nemo_diffgemma.lora import opening, peft_files

        if (place / sharded.ASSETS / "config.json").is_file():  # of a run
            return place / sharded.ASSETS
        with all_or_none():
            base = opening.base_of(peft_files.AdapterDirectory(place))
        return assets_of(base)
    if format == "nemo":
        return nemo_archive.unpacked_weights(place)
    return place / sharded.ASSETS if format == "sharded" else place


def dtype_of(name: str, key: str = "dtype") -> torch.dtype:
    """What `key=name` asks for. Raises `ConfigurationError`."""
    if name not in DTYPES:
        raise ConfigurationError(f"{key}={name!r}; use one of {', '.join(DTYPES)}")
    return DTYPES[name]


def save_network(network: Network, path: str | Path, format: str) -> None:
    """Write the weights in one of `FORMATS`. Collective; raises `CheckpointError` on every rank."""
    check_target(path, format)
    if format == "huggingface":
        huggingface.save(network, path)
    elif format == "sharded":
        sharded_writer.save_sharded(network, path)
    else:
        nemo_archive.write_archive(network, path)


def check_target(path: str | Path, format: str) -> None:
    """Raise `CheckpointError`, on every rank, where `path` is no place for a new checkpoint of that format."""
    with all_or_none():
        if format not in FORMATS:
            raise CheckpointError(f"format={format!r}; use one of {', '.join(FORMATS)}")
        reason = obstacle(user_path(path), is_directory=format != "nemo") if is_rank_zero() else None
        if reason is not None:
            raise CheckpointError(reason)
