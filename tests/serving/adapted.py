"""Adapters of the tiny network of cases.py, and requests that name them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import msgspec
import torch

from nemo_diffgemma import DiffusionGemma, ParallelLayout
from nemo_diffgemma.lora import attach, opening
from nemo_diffgemma.lora.config import LoraGroup
from nemo_diffgemma.model.adapters import Adapted
from nemo_diffgemma.parallel import initialize
from nemo_diffgemma.parallel.groups import current_layout
from nemo_diffgemma.serving.engine import Engine
from nemo_diffgemma.serving.engine_config import EngineConfig
from nemo_diffgemma.serving.request import Request
from tests.lora import kit
from tests.serving import cases

KINDS: dict[str, dict[str, Any]] = {
    "everything": dict(rank=4, alpha=24.0, targets=kit.TARGETS, experts="each"),
    "v1.2/shared": dict(rank=3, alpha=30.0, targets=["router", "attention"], experts="shared"),
    "thin": dict(rank=1, alpha=8.0, targets=["attention", "mlp"]),
}


def write(network: DiffusionGemma, directory: Path) -> dict[str, str]:
    """An adapter of each kind for a network, which stays as it is."""
    paths = {}
    for index, (name, keys) in enumerate(KINDS.items()):
        sizes = LoraGroup(**keys).sizes(network.model_config)
        own = cases.network(network.dtype)
        attach.attach(own, Adapted(sizes, base="somewhere"))
        attach.initialise(own, index)
        with torch.no_grad():
            for module, adapter, _ in attach.adapters(own):
                attach.draw_uniform(adapter.B, f"{index}/{module}", bound=0.2)
        paths[name] = str(kit.save(own, directory / f"adapter{index}"))
    return paths


def with_one(dtype: torch.dtype, path: str) -> DiffusionGemma:
    """The network with one adapter of its own, in the current layout."""
    from nemo_diffgemma.lora.peft_files import AdapterDirectory

    network, directory = cases.network(dtype, current_layout()), AdapterDirectory(Path(path))
    opening._load_onto(network, directory, Path("somewhere"))
    return network.eval()


def requests(count: int, seed: int) -> list[Request]:
    """As those of cases.py, with and without adapters; some prompts are another's with another adapter."""
    draw, names = random.Random(seed), [None, *KINDS]
    asked = [
        msgspec.structs.replace(request, adapter=names[index % len(names)])
        for index, request in enumerate(cases.requests(count, seed))
    ]
    again = [
        msgspec.structs.replace(request, id=f"{request.id}'", adapter=draw.choice(names))
        for request in asked
        if len(request.prompt) > 300
    ]
    return [*asked, *again]


def differences(
    layout: dict[str, int], dtype: torch.dtype, paths: dict[str, str], count: int, seed: int, config: dict[str, Any]
) -> list[str]:
    """Requests that get something else in an engine of a layout than from the network with their adapter alone."""
    initialize(ParallelLayout(**layout))
    network, plain = (cases.network(dtype, ParallelLayout(**layout)) for _ in range(2))
    opening.load_beside(network, paths)
    engine, asked = Engine(network, EngineConfig(**config)), requests(count, seed)
    heard, wrong = cases.serve(engine, asked, seed), []
    of = {name: with_one(dtype, path) for name, path in paths.items()}
    for request in asked:
        tokens, steps = cases.alone(plain if request.adapter is None else of[request.adapter], request)
        if heard.tokens[request.id] != tokens or sum(heard.steps[request.id]) != steps:
            wrong.append(f"{request}: {heard.tokens[request.id]}, not {tokens}")
    return wrong
