"""An adapter with its base: loaded from files, or made for a training run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from nemo_diffgemma.checkpoint import manifest
from nemo_diffgemma.checkpoint.tensor_files import CheckpointError
from nemo_diffgemma.errors import ConfigurationError
from nemo_diffgemma.lora import base as bases
from nemo_diffgemma.lora.attach import attach, attach_beside, check_mergeable, freeze, initialise, log_report
from nemo_diffgemma.lora.peft_files import CONFIG, WEIGHTS, AdapterDirectory, fill, is_adapter
from nemo_diffgemma.model.adapter_size import AdapterSize
from nemo_diffgemma.model.adapter_size import is_adapter as is_of_adapter
from nemo_diffgemma.model.adapters import Adapted
from nemo_diffgemma.parallel.agreement import all_or_none
from nemo_diffgemma.repository import user_path

if TYPE_CHECKING:
    from nemo_diffgemma.diffusion_gemma import DiffusionGemma
    from nemo_diffgemma.schema import ModelGroup


def base_of(directory: AdapterDirectory) -> Path:
    """The checkpoint of an adapter. Raises `CheckpointError` where it is not there, or is an adapter itself."""
    base = user_path(directory.base)
    where = f"write its path into base_model_name_or_path of {directory.directory / CONFIG}"
    if not base.exists():
        raise CheckpointError(f"the base of the adapter, {directory.base}, does not exist; {where}")
    if is_adapter(base):
        raise CheckpointError(f"the base of the adapter, {base}, is an adapter itself; merge that one, then {where}")
    return base


def verify(directory: AdapterDirectory) -> None:
    """Compare the files with the manifest, if a run has written one. Collective; raises `CheckpointError`."""
    manifest.verify(directory.directory, lambda name: name in (CONFIG, WEIGHTS))


def load(kind: type[DiffusionGemma], path: Path, dtype: torch.dtype) -> DiffusionGemma:
    """The base of an adapter, with the adapter beside its weights. Collective; raises `CheckpointError`."""
    with all_or_none():
        directory = AdapterDirectory(path)
        base = base_of(directory)
    verify(directory)
    network = kind.from_checkpoint(base, dtype)
    _load_onto(network, directory, base)
    return network.eval()


def _load_onto(network: DiffusionGemma, directory: AdapterDirectory, base: Path) -> None:
    found = bases.fingerprint(network) if directory.fingerprint else ""
    with all_or_none():
        bases.check(directory.fingerprint, found, str(directory.directory), str(base))
        sizes = directory.sizes(network.model_config)
        attach(network, Adapted(sizes, base=str(base.absolute()), fingerprint=found))
    fill(network, directory)


def load_beside(network: DiffusionGemma, paths: Mapping[str, str]) -> None:
    """Adapters that sequences may have by name, each from a directory of its own; where the base lies is no matter.

    Collective. Raises `CheckpointError` for files that are no adapter of this network, and `ConfigurationError` for a
    network with an adapter of its own.
    """
    if not paths:
        return
    with all_or_none():
        if network.lora is not None:
            raise ConfigurationError(
                f"the checkpoint is an adapter itself, so none of adapters={list(paths)} can stand beside it; give its "
                f"base, checkpoint={network.lora.base}, and the adapter among adapters=..."
            )
        directories = {name: _directory_of(name, path) for name, path in paths.items()}
    found = bases.fingerprint(network) if any(one.fingerprint for one in directories.values()) else ""
    for name, directory in directories.items():
        verify(directory)
        with all_or_none():
            bases.check(directory.fingerprint, found, str(directory.directory), "the checkpoint that is served")
            attach_beside(network, name, Adapted(directory.sizes(network.model_config)))
        fill(network, directory, network.beside[name])


def _directory_of(name: str, path: str) -> AdapterDirectory:
    place = user_path(path)
    if not is_adapter(place):
        raise CheckpointError(
            f"adapters.{name}={path} is no adapter; give a directory with {CONFIG} and {WEIGHTS}, as PEFT and "
            "launch/train.py write it"
        )
    return AdapterDirectory(place)


# -- training --------------------------------------------------------------------------------------------------------


def prepare(network: DiffusionGemma, group: ModelGroup, seed: int, checkpoint: Path | None = None) -> None:
    """Adapters and frozen weights as `group` wants them, with initial values or those of a run's `checkpoint`.

    Collective. Raises `ConfigurationError` where what is asked for is not there, and `CheckpointError` where the
    checkpoint is of another base or has adapters of another size.
    """
    with all_or_none():
        if group.freeze:
            freeze(network, group.freeze)
        if network.lora is not None:
            _check_given(group, network.lora)
    if network.lora is not None:
        _continue(network, group)
    elif group.lora.rank is not None:
        _begin(network, group, seed)
    if checkpoint is not None and network.lora is not None:
        resume(network, checkpoint)
    log_report(network)


def prepare_sizes(network: DiffusionGemma, group: ModelGroup) -> None:
    """`prepare` without values, base and collectives: for a network that has none."""
    if group.freeze:
        freeze(network, group.freeze)
    if group.lora.rank is not None:
        attach(network, Adapted(group.lora.sizes(network.model_config), group.lora.dropout))


def _begin(network: DiffusionGemma, group: ModelGroup, seed: int) -> None:
    if group.checkpoint is None:
        raise ConfigurationError(
            f"model.lora.rank={group.lora.rank} without model.checkpoint; adapters belong to weights that have been "
            "trained: give model.checkpoint, or train all weights with model.lora.rank=null"
        )
    base = str(user_path(group.checkpoint).absolute())
    with all_or_none():
        sizes = group.lora.sizes(network.model_config)
    found = bases.fingerprint(network)
    attach(network, Adapted(sizes, group.lora.dropout, base, found))
    initialise(network, seed)


def _continue(network: DiffusionGemma, group: ModelGroup) -> None:
    """Train the adapters of a checkpoint that has some."""
    assert network.lora is not None
    lora = network.lora
    with all_or_none():
        for module, size in lora.sizes.items():
            check_mergeable(module, size)
    for parameter in (p for name, p in network.named_parameters() if is_of_adapter(name)):
        parameter.requires_grad_(True)
    found = lora.fingerprint or bases.fingerprint(network)
    network.lora = Adapted(lora.sizes, lora.dropout, lora.base, found)


def _check_given(group: ModelGroup, adapted: Adapted) -> None:
    """That `group` asks for the adapters that are there, or leaves them to the checkpoint."""
    ranks = sorted({size.rank for size in adapted.sizes.values()})
    if group.lora.rank is not None and ranks != [group.lora.rank]:
        raise ConfigurationError(
            f"model.lora.rank={group.lora.rank}, but the adapters of model.checkpoint={group.checkpoint} have rank "
            f"{', '.join(map(str, ranks))}; give that one, or model.lora.rank=null to take them as they are"
        )


def resume(network: DiffusionGemma, checkpoint: Path) -> None:
    """Fill the adapters from a checkpoint of their run. Collective; raises `CheckpointError` for another's."""
    assert network.lora is not None
    with all_or_none():
        directory = AdapterDirectory(checkpoint)
        bases.check(directory.fingerprint, network.lora.fingerprint, str(checkpoint), network.lora.base)
        there, here = directory.sizes(network.model_config), network.lora.sizes
        other = next((name for name in here if name not in there or _differ(there[name], here[name])), None)
        if other is not None or there.keys() != here.keys():
            name = other or next(name for name in there if name not in here)
            raise CheckpointError(
                f"{checkpoint} has {_described(there.get(name))} on {name}, but model.lora asks for "
                f"{_described(here.get(name))}; give model.lora as the run began, or another exp_manager.version"
            )
    fill(network, directory)


def _differ(one: AdapterSize, other: AdapterSize) -> bool:
    return (one.rank, one.scale) != (other.rank, other.scale)


def _described(size: AdapterSize | None) -> str:
    return "no adapter" if size is None else f"an adapter of rank {size.rank} and scale {size.scale:g}"
