"""Adapters into a network: made, filled with initial values, merged into the weights; and frozen weights."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from nemo_diffgemma.checkpoint.names import our_name, released_name, text_tensors
from nemo_diffgemma.diffusion.seeds import check_seed
from nemo_diffgemma.errors import ConfigurationError
from nemo_diffgemma.lora.targets import DECODER, EXPERTS, frozen_tensors
from nemo_diffgemma.model.adapter_size import CHILD, AdapterSize
from nemo_diffgemma.model.adapters import Adapted, Adapter, ExpertAdapter
from nemo_diffgemma.model.attention import SharedKeyValue
from nemo_diffgemma.model.initialisation import fill
from nemo_diffgemma.model.network import Network
from nemo_diffgemma.parallel.agreement import is_rank_zero
from nemo_diffgemma.parallel.sharding import shard_of

NAME = "default"  # of the adapter of a network that has one
_BESIDE = "beside"
_log = logging.getLogger(__name__)


def attach(network: Network, adapted: Adapted) -> None:
    """Give linears and experts their adapters, without values, and freeze everything else."""
    assert network.lora is None and not network.beside, "a network has one set of adapters, or several by name"
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    _attach(network, adapted, NAME)
    network.lora = adapted


def attach_beside(network: Network, name: str, adapted: Adapted) -> None:
    """Adapters, without values, that sequences may have by `name`, beside others (`Network.run`)."""
    assert network.lora is None, "a network has one set of adapters, or several by name"
    network.beside[name] = key = f"{_BESIDE}{len(network.beside)}"  # names may have what those of modules may not
    _attach(network, adapted, key)


def _attach(network: Network, adapted: Adapted, key: str) -> None:
    for module, size in adapted.sizes.items():
        owner, matrix = _owner(network, module)
        adapter = _made(network, owner, matrix, module, size, adapted.dropout)
        adapters = owner._modules.setdefault(CHILD, nn.ModuleDict())
        assert isinstance(adapters, nn.ModuleDict)
        if matrix is None:
            adapters[key] = adapter.requires_grad_(key == NAME)
        else:
            if key not in adapters:
                adapters[key] = nn.ModuleDict()
            adapters[key].add_module(matrix, adapter.requires_grad_(key == NAME))


def _owner(network: Network, module: str) -> tuple[nn.Module, str | None]:
    """The module that holds the weight, and the name of the weight where it is a matrix of experts."""
    if module.endswith(EXPERTS):
        parent, _, matrix = our_name(DECODER + module).rpartition(".")
        return network.get_submodule(parent), matrix
    return network.get_submodule(our_name(f"{DECODER}{module}.weight").removesuffix(".weight")), None


def _made(
    network: Network, owner: nn.Module, matrix: str | None, module: str, size: AdapterSize, dropout: float
) -> Adapter | ExpertAdapter:
    weight = getattr(owner, matrix or "weight")
    if matrix is not None:
        return ExpertAdapter(size, weight, shard_of(weight), network.groups, is_input_cut=matrix == "down_proj")
    rows = owner.rows if isinstance(owner, SharedKeyValue) else None
    return Adapter(size, module, weight, shard_of(weight), network.groups, dropout, rows)


def adapters(network: Network) -> Iterator[tuple[str, Adapter | ExpertAdapter, Tensor]]:
    """(module name, adapter, weight beside which it stands) of every adapter."""
    yield from adapters_at(network, network.lora.sizes if network.lora is not None else (), NAME)


def adapters_at(
    network: Network, modules: Iterable[str], key: str
) -> Iterator[tuple[str, Adapter | ExpertAdapter, Tensor]]:
    """The same of the adapters of one key."""
    for module in modules:
        owner, matrix = _owner(network, module)
        adapter = owner.get_submodule(f"{CHILD}.{key}" + (f".{matrix}" if matrix else ""))
        assert isinstance(adapter, Adapter | ExpertAdapter)
        yield module, adapter, getattr(owner, matrix or "weight")


# -- values ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def initialise(network: Network, seed: int) -> None:
    """A uniform up to 1 / sqrt(in), as PEFT draws it, a function of (seed, module, expert); B zero."""
    check_seed(seed)
    for module, adapter, _ in adapters(network):
        adapter.B.zero_()
        features = shard_of(adapter.A).full_shape(tuple(adapter.A.shape))[-1]
        draw_uniform(adapter.A, f"{seed}/{module}/lora_A", bound=features**-0.5)  # Kaiming's, a = sqrt(5)


def draw_uniform(tensor: Tensor, key: str, bound: float) -> None:
    """Values from -bound to bound, a function of the key and, where `tensor` is cut over experts, of the expert."""
    fill(tensor, key, lambda shape, generator: (torch.rand(shape, generator=generator) * 2 - 1) * bound)


@torch.no_grad()
def merge(network: Network) -> None:
    """Add the adapters to the weights and remove them; each rank merges what it holds, tied weights once.

    Raises `ConfigurationError` where adapters differ between encoder and decoder.
    """
    for module, adapter, _ in adapters(network):
        check_mergeable(module, adapter.size)
    for _, adapter, weight in list(adapters(network)):
        weight.copy_((weight.float() + delta(adapter)).to(weight.dtype))
    for module in network.lora.sizes if network.lora is not None else ():
        _owner(network, module)[0]._modules.pop(CHILD, None)
    network.lora = None


def check_mergeable(module: str, size: AdapterSize) -> None:
    """Raise `ConfigurationError` where the adapter is not one for both encoder and decoder."""
    if size.parts is not None:
        raise ConfigurationError(
            f"the adapters of {module} differ between encoder and decoder, whose weights are one: they cannot be "
            "merged or trained on. Generate with checkpoint=<the adapter>, or train adapters with model.lora here"
        )


def delta(adapter: Adapter | ExpertAdapter) -> Tensor:
    """`scale * B A` of this rank's part of the weight, float32."""
    if isinstance(adapter, Adapter):
        return adapter.size.scale * (adapter.B.float() @ adapter.A.float())
    a, b = (x.float() for x in adapter.of_experts())
    return adapter.size.scale * torch.einsum("l...r,lri->l...i", b, a)


# -- freezing --------------------------------------------------------------------------------------------------------


def freeze(network: Network, patterns: Sequence[str]) -> None:
    """Weights that `patterns` name get no gradient. Raises `ConfigurationError` where one names nothing."""
    frozen = frozen_tensors(network.model_config, patterns)
    for name, tensor in text_tensors(network):
        if released_name(name) in frozen:
            tensor.requires_grad_(False)


def report(network: Network, masters: bool) -> str:
    """What is trained, and the memory that frozen weights save on this rank, in one line; `masters`: of bfloat16."""
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in network.parameters() if not p.requires_grad)
    each = 4 + 8 + (4 if masters else 0)
    return (
        f"{trained:,} parameters are trained and {frozen:,} frozen, of those that this process holds: "
        f"{frozen * each / 1e9:.2f} GB of gradients and optimizer state less ({each} bytes each, of which a "
        "distributed optimizer would share all but 4 over replicas)"
    )


def log_report(network: Network) -> None:
    """`report`, where something is frozen, by rank 0."""
    if is_rank_zero() and any(not parameter.requires_grad for parameter in network.parameters()):
        _log.warning("%s", report(network, masters=network.dtype != torch.float32))
