"""Adapters in PEFT's files, on transformers' module names.

    adapter_config.json          rank, alpha, targets, and base_model_name_or_path: the checkpoint they belong to
    adapter_model.safetensors    A and B of every module; its header has the fingerprint of the base

transformers has modules of its own for encoder and decoder, which share their weights; PEFT wraps each, so every
adapter stands there twice, equal where we have trained it. Experts are PEFT's `target_parameters`: A [E*r, in] with the
rows of one expert behind those of the other, B [out, r*E] with the experts side by side for each rank (peft's
ParamWrapper).
Two matrices of one module are nested: down_proj is the outer adapter, gate_up_proj stands under `base_layer`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nemo_diffgemma.checkpoint.huggingface import gathered
from nemo_diffgemma.checkpoint.tensor_files import CheckpointError
from nemo_diffgemma.config import ModelConfig
from nemo_diffgemma.lora import peft_config
from nemo_diffgemma.lora.attach import NAME, adapters, adapters_at
from nemo_diffgemma.lora.targets import DECODER, ENCODER, EXPERTS, expert_matrices, is_tied, linears, paths
from nemo_diffgemma.model.adapter_size import AdapterSize
from nemo_diffgemma.model.adapter_size import is_adapter as is_of_adapter
from nemo_diffgemma.model.network import Network
from nemo_diffgemma.non_finite import DAMAGED, first_non_finite
from nemo_diffgemma.parallel.agreement import all_or_none, is_rank_zero
from nemo_diffgemma.parallel.sharding import shard_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX, _FINGERPRINT = "base_model.model.", "base_fingerprint"


def is_adapter(path: Path) -> bool:
    """Whether `path` is a directory that holds an adapter."""
    return (path / CONFIG).is_file()


class Pair(NamedTuple):
    """A and B of one module as PEFT has them, of a linear [r, in] and [out, r]."""

    A: Tensor
    B: Tensor


# -- names -----------------------------------------------------------------------------------------------------------


def _keys(path: str, sizes: Mapping[str, AdapterSize]) -> tuple[str, str]:
    """Names in the file of A and B of the module or matrix at `path`, whose module adapters are named in `sizes`."""
    module, nested = path, ""
    if path.endswith(EXPERTS):
        module, _, matrix = path.rpartition(".")
        outer = f"{module.removeprefix(ENCODER).removeprefix(DECODER)}.down_proj"
        nested = "base_layer." if matrix == "gate_up_proj" and outer in sizes else ""
    return f"{_PREFIX}{module}.{nested}lora_A.weight", f"{_PREFIX}{module}.{nested}lora_B.weight"


# -- writing ---------------------------------------------------------------------------------------------------------


@dataclass
class AdapterFiles:
    """An adapter to be written: rank 0 has its tensors, whole and on the host."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    fingerprint: str

    def write(self, directory: Path) -> None:
        """Write both files. Raises OSError."""
        (directory / CONFIG).write_text(json.dumps(self.config, indent=2) + "\n")
        save_file(self.tensors, directory / WEIGHTS, metadata={"format": "pt", _FINGERPRINT: self.fingerprint})


@torch.no_grad()
def collected(network: Network) -> AdapterFiles | None:
    """The adapter of a network as it is now. Collective; None on all ranks but the first."""
    assert network.lora is not None
    sizes, tensors = network.lora.sizes, dict[str, Tensor]()
    for module, adapter, _ in adapters(network):
        a, b = (gathered(parameter.detach(), shard_of(parameter)).cpu() for parameter in (adapter.A, adapter.B))
        if not is_rank_zero():
            continue
        if module.endswith(EXPERTS):
            a, b = _flat(a, b, network.model_config.num_experts, adapter.size.shared)
        for path in paths(module):  # each with memory of its own, as safetensors wants
            for key, tensor in zip(_keys(path, sizes), (a, b), strict=True):
                tensors[key] = tensor.clone(memory_format=torch.contiguous_format)
    if not is_rank_zero():
        return None
    config = peft_config.written(network.model_config, sizes, network.lora.base)
    return AdapterFiles(config, tensors, network.lora.fingerprint)


def _flat(a: Tensor, b: Tensor, experts: int, shared: bool) -> tuple[Tensor, Tensor]:
    """A [E, r, in] and B [E, *out, r], or one of a layer, as [E*r, in] and [out, r*E]."""
    if shared:
        a, b = (x.expand(experts, *x.shape) for x in (a, b))
    rank = a.shape[1]
    return a.reshape(experts * rank, -1), b.reshape(experts, -1, rank).permute(1, 2, 0).reshape(-1, rank * experts)


def _by_expert(pair: Pair, experts: int) -> Pair:
    """The inverse: A [E, r, in] and B [E, out, r]."""
    a = pair.A.reshape(experts, -1, pair.A.shape[1])
    return Pair(a, pair.B.reshape(pair.B.shape[0], -1, experts).permute(2, 0, 1))


# -- reading ---------------------------------------------------------------------------------------------------------


class AdapterDirectory:
    """An adapter on the disk. Raises `CheckpointError` for files that hold none, or one that is not LoRA."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = peft_config.read(directory / CONFIG)
        file = directory / WEIGHTS
        if not file.is_file():
            raise CheckpointError(
                f"{directory} has {CONFIG} but no {WEIGHTS}; is the copy complete? (an adapter_model.bin is to be "
                "saved again with safe_serialization=True)"
            )
        try:
            with safe_open(file, "pt") as opened:
                self.fingerprint = (opened.metadata() or {}).get(_FINGERPRINT, "")
                self._shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read ({error}); copy it again") from None

    @property
    def base(self) -> str:
        """The path of the checkpoint that it belongs to. Raises `CheckpointError` where none is given."""
        base = self.config.get("base_model_name_or_path")
        if not isinstance(base, str) or not base:
            raise CheckpointError(
                f"{self.directory / CONFIG} does not say which checkpoint the adapter belongs to; write its path into "
                "base_model_name_or_path"
            )
        return base

    def sizes(self, model: ModelConfig) -> dict[str, AdapterSize]:
        """Size of every adapter by module name. Raises `CheckpointError` for what this model does not have."""
        found, sizes = self._found(model), dict[str, AdapterSize]()
        for module in (*linears(model), *expert_matrices(model)):
            parts = [found.pop(path, None) for path in paths(module)]
            if any(parts):
                sizes[module] = self._size(module, parts)
        if found:
            raise CheckpointError(
                f"{self.directory / WEIGHTS} has adapters of {len(found)} modules that cannot have any here, first "
                f"{next(iter(found))}; make them of the linears of attention, mlp, router and self_conditioning, and "
                "of experts.gate_up_proj and experts.down_proj"
            )
        return sizes

    def _found(self, model: ModelConfig) -> dict[str, int]:
        """Rank of the adapter of every module or matrix of transformers' model, by its path."""
        shapes = {**linears(model), **expert_matrices(model)}
        found: dict[str, int] = {}
        for key, shape in self._shapes.items():
            named = re.fullmatch(rf"{re.escape(_PREFIX)}(.+)\.lora_([AB])\.weight", key)
            if named is None:
                raise CheckpointError(
                    f"{self.directory / WEIGHTS} holds {key}, which is no A or B of a linear; only LoRA on linears and "
                    "on experts can be read"
                )
            path = self._path(named[1])
            out, features = shapes.get(path.removeprefix(ENCODER).removeprefix(DECODER), (0, 0))
            copies = model.num_experts if path.endswith(EXPERTS) else 1
            (ranks, size), expected = (shape, features) if named[2] == "A" else (shape[::-1], out)
            if out == 0:
                found[path] = 0
            elif size != expected or ranks % copies or found.get(path, ranks // copies) != ranks // copies:
                raise CheckpointError(
                    f"{key} has shape {list(shape)} in {self.directory / WEIGHTS}, but the base makes it of "
                    f"{expected} {'columns' if named[2] == 'A' else 'rows'}; the adapter is of another model"
                )
            else:
                found[path] = ranks // copies
            partner = key.replace(f"lora_{named[2]}", f"lora_{'B' if named[2] == 'A' else 'A'}")
            if partner not in self._shapes:
                raise CheckpointError(f"{self.directory / WEIGHTS} holds {key}, but no {partner}; copy it again")
        return found

    def _path(self, module: str) -> str:
        """The path of a linear or matrix from the path of its wrapper in the file."""
        if module.endswith(".experts.base_layer"):
            return f"{module.removesuffix('.base_layer')}.gate_up_proj"
        if not module.endswith(".experts"):
            return module
        nested = f"{_PREFIX}{module}.base_layer.lora_A.weight" in self._shapes
        parameters = self.config.get("target_parameters") or []
        alone = "gate_up_proj" if any(name.endswith("gate_up_proj") for name in parameters) else "down_proj"
        return f"{module}.{'down_proj' if nested else alone}"

    def _size(self, module: str, ranks: list[int | None]) -> AdapterSize:
        """One adapter where encoder and decoder have equal ones, else both in one."""
        of_paths = [
            None if rank is None else peft_config.size_of(self.config, path, rank)
            for path, rank in zip(paths(module), ranks, strict=True)
        ]
        first = of_paths[0]
        if first is not None and (not is_tied(module) or (first == of_paths[1] and self._alike(module))):
            return first
        parts = tuple((one.rank, one.scale) if one else (0, 0.0) for one in reversed(of_paths))
        assert len(parts) == 2
        rank = parts[0][0] + parts[1][0]
        return AdapterSize(rank, float(rank), parts=(parts[0], parts[1]))

    def _alike(self, module: str) -> bool:
        decoder, encoder = (self._pair(path) for path in paths(module))
        return all(torch.equal(one, other) for one, other in zip(decoder, encoder, strict=True))

    def _pair(self, path: str) -> Pair:
        module, nested = path, ""
        if path.endswith(EXPERTS):
            module, _, matrix = path.rpartition(".")
            inner = f"{_PREFIX}{module}.base_layer.lora_A.weight"
            nested = "base_layer." if matrix == "gate_up_proj" and inner in self._shapes else ""
        with safe_open(self.directory / WEIGHTS, "pt") as file:
            return Pair(*(file.get_tensor(f"{_PREFIX}{module}.{nested}lora_{letter}.weight") for letter in "AB"))

    def pair(self, module: str, size: AdapterSize, experts: int) -> Pair:
        """A [r, in] and B [out, r] of a linear, or with the experts in front, of `size`."""

        def of(path: str) -> Pair:
            pair = self._pair(path)
            return _by_expert(pair, experts) if module.endswith(EXPERTS) else pair

        if size.parts is None:
            return of(paths(module)[0])
        decoder, encoder = (
            of(path) if rank else None for path, (rank, _) in zip(paths(module), reversed(size.parts), strict=True)
        )
        there = [pair for pair in (encoder, decoder) if pair is not None]
        return Pair(torch.cat([pair.A for pair in there], dim=-2), torch.cat([pair.B for pair in there], dim=-1))


@torch.no_grad()
def fill(network: Network, directory: AdapterDirectory, key: str = NAME) -> None:
    """Fill the adapters of a network from files of the same sizes. Collective; raises `CheckpointError`.

    `key` is that of adapters which stand beside others.
    """
    experts = network.model_config.num_experts
    with all_or_none():
        filled = adapters(network)
        if key != NAME:
            filled = adapters_at(network, directory.sizes(network.model_config), key)
        for module, adapter, _ in filled:
            pair = directory.pair(module, adapter.size, experts)
            for parameter, whole in _with_our_shapes(module, adapter, pair, directory):
                parameter.copy_(whole[shard_of(parameter).slices(tuple(parameter.shape))])
        weight = first_non_finite((name, tensor) for name, tensor in network.named_parameters() if is_of_adapter(name))
        if weight is not None:
            raise CheckpointError(f"{weight}, in {directory.directory}: {DAMAGED}")


def _with_our_shapes(
    module: str, adapter: Any, pair: Pair, directory: AdapterDirectory
) -> Iterator[tuple[Tensor, Tensor]]:
    for name, parameter, whole in (("A", adapter.A, pair.A), ("B", adapter.B, pair.B)):
        if adapter.size.shared:
            if not torch.equal(whole, whole[:1].expand_as(whole)):
                raise CheckpointError(
                    f"{directory.directory / WEIGHTS} has another {name} of {module} for each expert, but "
                    "model.lora.experts=shared; use model.lora.experts=each"
                )
            whole = whole[0]
        full = shard_of(parameter).full_shape(tuple(parameter.shape))
        if torch.Size(full).numel() != whole.numel():
            raise CheckpointError(
                f"{module} has an adapter of rank {pair.A.shape[-2]} in {directory.directory / WEIGHTS}, expected rank "
                f"{adapter.size.rank}; give model.lora.rank={pair.A.shape[-2]}"
            )
        yield parameter, whole.reshape(full)
