"""`adapter_config.json`, PEFT's LoraConfig: what of it is understood, and what is written."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nemo_diffgemma.checkpoint.tensor_files import CheckpointError
from nemo_diffgemma.config import ModelConfig
from nemo_diffgemma.json_files import brief, is_number, is_whole, read_object
from nemo_diffgemma.lora.targets import EXPERTS, expert_matrices, is_tied, linears
from nemo_diffgemma.model.adapter_size import AdapterSize

# How an adapter was found, trained or named: its tensors say the rest.
_NO_MATTER = set(
    """task_type auto_mapping peft_version revision inference_mode target_modules target_parameters exclude_modules
    layers_to_transform layers_pattern lora_dropout megatron_core qalora_group_size ensure_weight_tying loftq_config
    eva_config base_model_name_or_path runtime_config""".split()
)
_READ = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"}
_PLAIN: tuple[Any, ...] = (None, False, "none", [], {})  # values of a feature that is not used
_INITIAL = (True, False, "gaussian", "eva", "orthogonal")  # that leave the weights of the base as they are


def read(file: Path) -> dict[str, Any]:
    """Raises `CheckpointError` naming the file and the key for anything but plain LoRA."""
    config = read_object(file, CheckpointError)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{file}: peft_type={brief(config.get('peft_type'))}; only LORA adapters can be read")
    for key, value in config.items():
        if key not in _NO_MATTER | _READ and value not in _PLAIN:
            raise CheckpointError(
                f"{file}: {key}={brief(value)} is no plain LoRA, which is all that can be read; train without {key}, "
                "or merge the adapter with PEFT (merge_and_unload) and give the merged checkpoint"
            )
    if config.get("init_lora_weights", True) not in _INITIAL:
        raise CheckpointError(
            f"{file}: init_lora_weights={brief(config['init_lora_weights'])} changes the weights of the base; save the "
            "adapter with PEFT's path_initial_model_for_weight_conversion, or merge it"
        )
    _check_numbers(file, config)
    return config


def _check_numbers(file: Path, config: Mapping[str, Any]) -> None:
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict) or not all(is_number(value) and value > 0 for value in patterns.values()):
            raise CheckpointError(f"{file}: {key}={brief(patterns)}; expected positive numbers by pattern")
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise CheckpointError(f"{file}: {key} has {brief(pattern)}, no regular expression ({error})") from None
    if not is_whole(config.get("r"), 1):
        raise CheckpointError(f"{file}: r={brief(config.get('r'))}; expected a rank, 1 or more")
    if not is_number(config.get("lora_alpha", 8)) or config.get("lora_alpha", 8) <= 0:
        raise CheckpointError(f"{file}: lora_alpha={brief(config.get('lora_alpha'))}; expected a positive number")


def size_of(config: Mapping[str, Any], path: str, rank: int) -> AdapterSize:
    """Size of the adapter of the module or matrix at `path` of transformers' model, whose tensors have that rank."""
    alpha = config.get("lora_alpha", 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):  # the first that matches, as in PEFT
            alpha = value
            break
    return AdapterSize(rank, float(alpha), bool(config.get("use_rslora")))


# -- writing ---------------------------------------------------------------------------------------------------------


def written(model: ModelConfig, sizes: Mapping[str, AdapterSize], base: str) -> dict[str, Any]:
    """What to write for adapters of these sizes, so that PEFT wraps these modules of encoder and decoder and no others.

    Dropout is none of an adapter that is done, and PEFT refuses it on experts.
    """
    most = Counter((size.rank, size.alpha) for size in sizes.values()).most_common(1)[0][0]
    others = {name: size for name, size in sizes.items() if (size.rank, size.alpha) != most}
    modules = [name for name in sizes if not name.endswith(EXPERTS)]
    return {
        "base_model_name_or_path": base,
        "peft_type": "LORA",
        "task_type": None,
        "r": most[0],
        "lora_alpha": _number(most[1]),
        "lora_dropout": 0.0,
        "use_rslora": next(iter(sizes.values())).rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": _expression(linears(model), modules) if modules else [],
        "target_parameters": _parameters(model, [name for name in sizes if name.endswith(EXPERTS)]),
        "rank_pattern": {_pattern(name): size.rank for name, size in others.items() if size.rank != most[0]},
        "alpha_pattern": {
            _pattern(name): _number(size.alpha) for name, size in others.items() if size.alpha != most[1]
        },
    }


def _number(alpha: float) -> int | float:
    return int(alpha) if alpha == int(alpha) else alpha


def _pattern(module: str) -> str:
    """A pattern that is of this module alone, of encoder and decoder."""
    return rf"(decoder|encoder\.language_model)\.{re.escape(module)}"


def _expression(known: Iterable[str], chosen: list[str]) -> str:
    """A regular expression of the paths of the chosen modules: PEFT wants a full match."""
    of_all, of_chosen = _layers(known), _layers(chosen)
    parts = []
    for name, layers in of_chosen.items():
        if not layers:
            parts.append(re.escape(f"decoder.{name}"))
            continue
        which = r"\d+" if layers == of_all[name] else f"({'|'.join(layers)})"
        parts.append(rf"(decoder|encoder\.language_model)\.layers\.{which}\.{re.escape(name)}")
    return rf"model\.({'|'.join(parts)})"


def _layers(modules: Iterable[str]) -> dict[str, list[str]]:
    """Layers by the rest of the name; none for a module of no layer."""
    layers: dict[str, list[str]] = {}
    for module in modules:
        if is_tied(module):
            _, layer, name = module.split(".", 2)
            layers.setdefault(name, []).append(layer)
        else:
            layers[module] = []
    return layers


def _parameters(model: ModelConfig, matrices: list[str]) -> list[str] | None:
    """PEFT's names of matrices of experts: ends of paths, of encoder and decoder."""
    of_all, of_chosen = _layers(expert_matrices(model)), _layers(matrices)
    names = []
    for name, layers in of_chosen.items():
        names += [name] if layers == of_all[name] else [f"layers.{layer}.{name}" for layer in layers]
    return names or None
