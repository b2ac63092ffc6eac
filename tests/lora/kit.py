"""Adapters of tiny networks whose A and B are both random: an initial one adds nothing."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

RANK, ALPHA = 4, 12.0
TARGETS = ["attention", "mlp", "router", "self_conditioning"]


def group(**keys: Any) -> Any:
    """`model.lora` on everything, one adapter an expert."""
    from nemo_diffgemma.lora.config import LoraGroup

    return LoraGroup(**(dict(rank=RANK, alpha=ALPHA, targets=TARGETS, experts="each") | keys))


def adapted(path: str | Path, lora: Any, seed: int = 7) -> Any:
    """The checkpoint at `path` in the current layout with random adapters."""
    from nemo_diffgemma import DiffusionGemma
    from nemo_diffgemma.lora import attach, opening
    from nemo_diffgemma.schema import ModelGroup

    network = DiffusionGemma.from_checkpoint(path)
    opening.prepare(network, ModelGroup(checkpoint=str(path), lora=lora), seed)
    with torch.no_grad():
        for module, adapter, _ in attach.adapters(network):
            _randomise(adapter.B, f"{seed}/{module}/lora_B")
    return network


def _randomise(tensor: Any, key: str) -> None:
    """As A is drawn: the same in every layout."""
    from nemo_diffgemma.lora.attach import draw_uniform

    draw_uniform(tensor, key, bound=0.1)


def save(network: Any, directory: Path) -> Path:
    """The adapter alone."""
    from nemo_diffgemma.lora.peft_files import collected

    directory.mkdir(parents=True, exist_ok=True)
    files = collected(network)
    if files is not None:
        files.write(directory)
    return directory


def by_peft(reference: Any, directory: Path) -> Any:
    """transformers' model with the adapter that lies in `directory`, by the installed peft."""
    import copy

    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # keys that are missing or left over are warnings
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        return PeftModel.from_pretrained(copy.deepcopy(reference), str(directory)).eval()


def with_base(adapter: Path, copy: Path, base: str | Path) -> Path:
    """A copy of an adapter that names another base."""
    import json
    import shutil

    shutil.copytree(adapter, copy)
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    return copy
