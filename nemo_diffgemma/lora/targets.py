"""What can be adapted or frozen, by transformers' names, and patterns over them.

A module name is that of the decoder without `model.decoder.`: layers.0.self_attn.q_proj, layers.0.experts.gate_up_proj,
self_conditioning.up_proj. The encoder's modules have the same weights, so a pattern that names one of them names both.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from nemo_diffgemma.checkpoint.names import released_tensors
from nemo_diffgemma.config import ModelConfig
from nemo_diffgemma.errors import ConfigurationError

DECODER, ENCODER = "model.decoder.", "model.encoder.language_model."
EXPERTS = (".experts.gate_up_proj", ".experts.down_proj")
GROUPS = {  # short names -> patterns
    "attention": ("*.self_attn.?_proj",),
    "mlp": ("*.mlp.*_proj",),
    "router": ("*.router.*",),
    "self_conditioning": ("*self_conditioning.*",),
    "experts": ("*.experts.*",),
    "embeddings": ("*embed_tokens*",),
}
_TARGETS = ("attention", "mlp", "router", "self_conditioning")


def linears(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """Module name and shape [out, in] of every linear that can have an adapter."""
    return {
        name.removeprefix(DECODER).removesuffix(".weight"): (shape[0], shape[1])
        for name, shape in released_tensors(model).items()
        if len(shape) == 2 and "embed_tokens" not in name
    }


def expert_matrices(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """Module name and shape [out, in] of one expert, of every fused matrix of experts."""
    return {
        name.removeprefix(DECODER): (shape[1], shape[2])
        for name, shape in released_tensors(model).items()
        if name.endswith(EXPERTS)
    }


def is_tied(module: str) -> bool:
    """Whether the encoder has a module of that name, too."""
    return module.startswith("layers.")


def paths(module: str) -> list[str]:
    """The modules of transformers' model whose weight it is, the decoder's first."""
    return [DECODER + module, *([ENCODER + module] if is_tied(module) else [])]


def chosen_linears(model: ModelConfig, targets: Sequence[str]) -> list[str]:
    """The linears that `targets` name. Raises `ConfigurationError` where one names nothing."""
    known, chosen = linears(model), set[str]()
    for target in targets:
        named = {name for name in known if _names(target, paths(name))}
        if not named:
            of_experts = target in ("experts", "gate_up_proj") or "experts" in target
            hint = "; for experts use model.lora.experts=each or shared" if of_experts else ""
            raise ConfigurationError(
                f"model.lora.targets: {target!r} names no linear of this model{_near(target, known)}; use "
                f"{', '.join(_TARGETS)}, or names and patterns of {', '.join(_kinds(known))}{hint}"
            )
        chosen |= named
    return [name for name in known if name in chosen]


def frozen_tensors(model: ModelConfig, patterns: Sequence[str]) -> set[str]:
    """The released names of the weights that `patterns` freeze; tied ones have one. Raises `ConfigurationError`."""
    trained = {name for name in released_tensors(model) if not name.endswith("layer_scalar")}
    frozen = set[str]()
    for pattern in patterns:
        named = {name for name in trained if _names(pattern, _aliases(name))}
        if not named:
            raise ConfigurationError(
                f"model.freeze: {pattern!r} names no weight of this model{_near(pattern, trained)}; use "
                f"{', '.join(GROUPS)}, or patterns over names like {', '.join(_kinds(trained))}"
            )
        frozen |= named
    if frozen == trained:
        raise ConfigurationError(f"model.freeze={list(patterns)} freezes every weight; leave something to train")
    return frozen


def _aliases(tensor: str) -> list[str]:
    """Every name by which transformers knows a weight."""
    module = tensor.removeprefix(DECODER)
    if module == "embed_tokens.weight":
        return [tensor, ENCODER + module, "lm_head.weight"]
    return paths(module) if is_tied(module) or module == "norm.weight" else [tensor]


def _names(pattern: str, names: Iterable[str]) -> bool:
    """Whether a short name or pattern names one of `names`, from its start or from a dot on."""
    patterns = GROUPS.get(pattern, (pattern, f"*.{pattern}"))
    return any(fnmatchcase(name, one) for name in names for one in patterns)


def _near(given: str, known: Iterable[str]) -> str:
    leaves = sorted({*GROUPS, *(part for name in known for part in name.split(".") if not part.isdecimal())})
    near = difflib.get_close_matches(given, leaves, n=1, cutoff=0.7)
    return f" (did you mean {near[0]}?)" if near else ""


def _kinds(names: Iterable[str]) -> list[str]:
    """Names with `*` for the layer, each once."""
    return list(dict.fromkeys(re.sub(r"layers\.\d+", "layers.*", name) for name in names))
