"""Compare a bundle with the PyTorch model it was built from.

Two comparisons. In lockstep, both get the PyTorch model's canvas and signal at every denoising step, so that a
difference is one step's own; free-running, both generate under the same noise and their tokens are compared. Routing is
compared where the functions that were traced run in PyTorch, in the bundle's dtype and with its quantised experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from export.bundle import Bundle
from export.calibrate import SimulatedWeights
from export.graph import Model, Weights
from export.runner import Context, Engine
from export.sessions import Tensors
from export.tracing import STEP_OUTPUTS, past_names, present_names
from export.weights import key_value_heads
from nemo_diffgemma.diffusion.noise import KeyedNoise
from nemo_diffgemma.diffusion.sampler import SamplerConfig
from nemo_diffgemma.diffusion_gemma import DiffusionGemma
from nemo_diffgemma.parallel import device


@dataclass
class Differences:
    """Largest absolute differences and shares of agreement over everything that was compared in lockstep."""

    keys_values: float = 0.0
    entropy: float = 0.0
    soft: float = 0.0
    argmax: list[float] = field(default_factory=list)  # share of positions, one entry a step
    canvas: list[float] = field(default_factory=list)
    routing: list[float] = field(default_factory=list)  # share of tokens with the same experts, one entry a layer

    def add(self, name: str, ours: Tensor, theirs: Tensor) -> None:
        setattr(self, name, max(getattr(self, name), float((ours.cpu().float() - theirs.cpu().float()).abs().max())))


class TorchSession:
    """The functions that were traced, run by PyTorch: what an engine of any dtype is to compute. One rank."""

    def __init__(self, graph: str, model: Model, weights: Weights) -> None:
        self._graph, self._model, self._weights = graph, model, weights

    @torch.no_grad()
    def run(self, shared: Tensors, ranked: Sequence[Tensors]) -> list[dict[str, Tensor]]:
        given = {**shared, **ranked[0]}
        layers = range(self._model.config.num_hidden_layers)
        past = [tuple(given.pop(name) for name in past_names(layer)) for layer in layers]
        if self._graph == "step":
            found = self._model.step(self._weights, past=past, **given)  # type: ignore[arg-type]
            return [dict(zip(STEP_OUTPUTS, found, strict=True))]
        fresh = self._model.encode(self._weights, past=past, **given)  # type: ignore[arg-type]
        return [
            {name: tensor for layer in layers for name, tensor in zip(present_names(layer), fresh[layer], strict=True)}
        ]


def torch_engine(bundle: Bundle) -> tuple[Engine, Model]:
    """An `Engine` of the functions that were traced, and the `Model` whose `routed` tells the chosen experts."""
    settings = bundle.settings
    if settings.layout.world_size > 1:
        raise ValueError("routing is compared for bundles of one rank")
    model = Model(bundle.config, settings.layout, settings.torch_dtype)
    tensors = dict(bundle.stored_weights(0))  # inline ones too
    weights = Weights(tensors)
    if settings.quantization is not None:
        weights = SimulatedWeights(tensors, settings.quantization)
    sessions = {graph: TorchSession(graph, model, weights) for graph in ("encode", "step")}
    engine = Engine(bundle.config, settings.layout, settings.torch_dtype, sessions, settings.limits, bundle.assets, [0])
    return engine, model


@torch.no_grad()
def in_lockstep(
    engine: Engine, network: DiffusionGemma, input_ids: Tensor, steps: int, seed: int, model: Model | None = None
) -> Differences:
    """Differences of `encode` and of every step of a run of `steps`; with `model` also of the routing."""
    from launch.verify import chosen_experts

    rows, config = input_ids.shape[0], network.model
    noise = KeyedNoise.for_rows(seed, rows, config.canvas_length, config.vocab_size, device())
    sampler = SamplerConfig(max_denoising_steps=steps)
    cache = network.encode(input_ids)
    context = engine.encode(input_ids.to(engine.device), engine.empty(cache.first))
    found = Differences()
    for layer, (ours, past) in enumerate(zip(cache.layers, _buffers(context, config.num_hidden_layers), strict=True)):
        heads = slice(*key_value_heads(config.heads(layer).key_value_heads, engine.layout, engine.ranks[0]))
        for mine, theirs in zip((ours.keys, ours.values), past, strict=True):
            found.add("keys_values", mine[:, heads], theirs)
    canvas, soft, signal = noise.initial(0), None, None
    shares: list[list[float]] = []
    for remaining in range(steps, 0, -1):
        drawn: dict[str, Any] = {
            "uniforms": noise.uniforms(0, remaining),
            "replacements": noise.replacements(0, remaining),
        }
        asked: dict[str, Any] = {
            "context": None,
            "first": cache.first,
            "temperature": sampler.temperature(remaining),
            "entropy_bound": sampler.entropy_bound,
            "last": False,
        }
        with chosen_experts(network) as chosen:
            exact = network.sampling_step(canvas, cache, soft=soft, **asked, **drawn)
        there: dict[str, Any] = {name: tensor.to(engine.device) for name, tensor in drawn.items()}
        settled = engine.sampling_step(canvas.to(engine.device), context, soft=signal, **asked, **there)
        found.add("entropy", exact.entropy, settled.entropy)
        found.add("soft", exact.soft, settled.soft.flatten(0, 1))
        found.argmax.append(_share(exact.argmax, settled.argmax))
        found.canvas.append(_share(exact.canvas, settled.canvas))
        if model is not None:
            shares.append([_same_experts(a, b) for a, b in zip(chosen, model.routed, strict=True)])
        canvas, soft = exact.canvas, exact.soft
        signal = soft.view(rows, config.canvas_length, -1).to(engine.device, engine.dtype)
    if shares:
        found.routing = torch.tensor(shares).mean(0).tolist()
    return found


@torch.no_grad()
def tokens_agree(
    engine: Engine, network: DiffusionGemma, input_ids: Tensor, new_tokens: int, sampler: SamplerConfig, seed: int
) -> list[bool]:
    """Whether each row gets the same tokens from both under the same noise."""
    ours = network.generate(input_ids, max_new_tokens=new_tokens, sampler=sampler, seed=seed).sequences
    theirs = engine.generate(input_ids, max_new_tokens=new_tokens, sampler=sampler, seed=seed).sequences
    return (ours.cpu() == theirs.cpu()).all(-1).tolist()


def _buffers(context: Context, layers: int) -> list[tuple[Tensor, Tensor]]:
    past = context.past[0]
    return [tuple(past[name] for name in past_names(layer)) for layer in range(layers)]  # type: ignore[misc]


def _share(a: Tensor, b: Tensor) -> float:
    return float((a.cpu() == b.cpu()).float().mean())


def _same_experts(map_TE: Tensor, chosen_TK: Tensor) -> float:
    map_TE = map_TE.cpu()
    other_TE = torch.zeros_like(map_TE).scatter(-1, chosen_TK.cpu(), True)
    return float((map_TE == other_TE).all(-1).float().mean())
