"""Compare a bundle with the PyTorch model it was built from.

Two comparisons. In lockstep, both get the PyTorch model's canvas and signal at every denoising step, so that a
difference is one step's own; free-running, both generate under the same noise and their tokens are compared. Routing is
compared where the functions that were traced run in PyTorch, in the bundle's dtype and with its quantised experts.

The two never share a GPU: what the PyTorch model does is kept on the CPU as a `Trajectory`, with which an engine that
is opened later is compared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from export.bundle.format import Bundle, BundleError
from export.engine.engine import Context, Engine
from export.engine.torch_session import TorchSession
from export.graph.model import Model, Weights
from export.graph.tracing import past_names
from export.graph.weights import key_value_heads
from export.quantization.calibration import SimulatedWeights
from nemo_diffgemma.diffusion.generate import Settled, StepInputs
from nemo_diffgemma.diffusion.noise import KeyedNoise
from nemo_diffgemma.diffusion.sampler_config import SamplerConfig
from nemo_diffgemma.diffusion_gemma import DiffusionGemma
from nemo_diffgemma.non_finite import NonFiniteError
from nemo_diffgemma.parallel import device
from nemo_diffgemma.parallel.team import tensors_of_rank_zero

_COMPARED = ("canvas", "argmax", "entropy", "accepted", "soft")  # of a `Settled`


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
        """Record the largest difference; it is infinite if either side holds NaN or infinity."""
        gaps = (ours.cpu().float() - theirs.cpu().float()).abs().nan_to_num(nan=math.inf, posinf=math.inf)
        setattr(self, name, max(getattr(self, name), float(gaps.max())))


@dataclass(frozen=True)
class Trajectory:
    """What the PyTorch model does after [B, S] prompts, on the CPU: the context of each layer, and every step.

    The inputs of a step are what the step before gave, and noise keyed by `seed`. `experts` are the ids of those that
    each layer chose, ascending, [B * C, K]; one entry a step.
    """

    input_ids: Tensor
    seed: int
    sampler: SamplerConfig
    keys_values: tuple[tuple[Tensor, Tensor], ...]
    steps: tuple[Settled, ...]
    experts: tuple[tuple[Tensor, ...], ...]


def torch_engine(bundle: Bundle) -> tuple[Engine, Model]:
    """An `Engine` of the functions that were traced, and the `Model` whose `routed` tells the chosen experts."""
    check_one_rank(bundle)
    settings = bundle.settings
    model = Model(bundle.config, settings.layout, settings.torch_dtype, settings.experts)
    tensors = dict(bundle.stored_weights(0))  # inline ones too
    weights = Weights(tensors)
    if settings.quantization is not None:
        weights = SimulatedWeights(tensors, settings.quantization)
    sessions = {graph: TorchSession(graph, model, weights) for graph in ("encode", "step")}
    engine = Engine(bundle.config, settings.layout, settings.torch_dtype, sessions, settings.limits, bundle.assets, [0])
    return engine, model


def check_one_rank(bundle: Bundle) -> None:
    """Raise `BundleError` where the traced functions would have to run as several ranks."""
    settings, world = bundle.settings, bundle.settings.layout.world_size
    if world > 1:
        experts = settings.quantization or settings.dtype
        raise BundleError(
            f"{bundle.path} has {world} ranks in {settings.dtype}, experts in {experts}: ONNX Runtime does "
            "not compute bfloat16 and NVFP4, and PyTorch stands in for one rank only. Check it on GPUs, torchrun "
            f"--nproc-per-node {world} export/check.py provider=tensorrt ..., or build a float32 bundle of this layout"
        )


@torch.no_grad()
def trajectory(network: DiffusionGemma, input_ids: Tensor, sampler: SamplerConfig, seed: int) -> Trajectory:
    """All steps of the PyTorch model for one canvas. Replicas in several processes all follow rank 0."""
    from nemo_diffgemma.evaluation.comparison import chosen_experts

    rows, config = input_ids.shape[0], network.model_config
    noise = KeyedNoise.for_rows(seed, rows, config.canvas_length, config.vocab_size, device())
    cache = network.encode(input_ids)
    canvas, soft = noise.initial(0), None
    settled: list[Settled] = []
    experts: list[tuple[Tensor, ...]] = []
    for remaining in range(sampler.max_denoising_steps, 0, -1):
        with chosen_experts(network) as chosen:
            exact = network.sampling_step(_step(sampler, noise, remaining, canvas, soft), cache)
        if dist.get_world_size() > 1:  # a last bit that differs would send the others elsewhere
            decided: dict[str, Any] = tensors_of_rank_zero({name: getattr(exact, name) for name in _COMPARED})
            exact = exact._replace(cache=None, **decided)
        canvas, soft = exact.canvas, exact.soft
        settled.append(exact._replace(cache=None, **{name: getattr(exact, name).cpu() for name in _COMPARED}))
        experts.append(tuple(chosen_TK.cpu() for chosen_TK in chosen))
    past = tuple((_by_row(layer.keys, rows), _by_row(layer.values, rows)) for layer in cache.layers)
    return Trajectory(input_ids.cpu(), seed, sampler, past, tuple(settled), tuple(experts))


def _by_row(x_KGD: Tensor, rows: int) -> Tensor:
    """Keys or values of rows of equal length, as the graphs have them: [B, G, P, D]."""
    return x_KGD.view(rows, -1, *x_KGD.shape[1:]).transpose(1, 2).cpu()


@torch.no_grad()
def in_lockstep(engine: Engine, exact: Trajectory, model: Model | None = None) -> Differences:
    """Differences of `encode` and of every step of a trajectory; with `model` also of the routing."""
    rows, config = exact.input_ids.shape[0], engine.model_config
    noise = KeyedNoise.for_rows(exact.seed, rows, config.canvas_length, config.vocab_size, engine.device)
    context = engine.encode(exact.input_ids.to(engine.device), engine.start([0] * rows))
    differences = Differences()
    buffers = _buffers(context, config.num_hidden_layers)
    for layer, (whole, past) in enumerate(zip(exact.keys_values, buffers, strict=True)):
        heads = slice(*key_value_heads(config.heads(layer).key_value_heads, engine.layout, engine.ranks[0]))
        for kept, given in zip(whole, past, strict=True):
            differences.add("keys_values", kept[:, heads], given)
    canvas, signal = noise.initial(0), None
    shares: list[list[float]] = []
    for index, (ours, chosen) in enumerate(zip(exact.steps, exact.experts, strict=True)):
        step = _step(exact.sampler, noise, exact.sampler.max_denoising_steps - index, canvas, signal)
        theirs = engine.sampling_step(step, context)
        differences.add("entropy", ours.entropy, theirs.entropy)
        differences.add("soft", ours.soft, theirs.soft)
        differences.argmax.append(_share(ours.argmax, theirs.argmax))
        differences.canvas.append(_share(ours.canvas, theirs.canvas))
        if model is not None:
            shares.append([_same_experts(a, b) for a, b in zip(chosen, model.routed, strict=True)])
        canvas = ours.canvas.to(engine.device)
        signal = ours.soft.to(engine.device, engine.dtype)
    if shares:
        differences.routing = torch.tensor(shares).mean(0).tolist()
    return differences


def tokens_agree(
    engine: Engine, sequences: Tensor, input_ids: Tensor, new_tokens: int, sampler: SamplerConfig, seed: int
) -> list[bool]:
    """Whether the engine gives each row the tokens of `sequences`, the PyTorch model's under the same noise."""
    try:
        theirs = engine.generate(input_ids, max_new_tokens=new_tokens, sampler=sampler, seed=seed).sequences
    except NonFiniteError:  # what a comparison is for
        return [False] * len(sequences)
    return (sequences.cpu() == theirs.cpu()).all(-1).tolist()


def _step(sampler: SamplerConfig, noise: KeyedNoise, remaining: int, canvas: Tensor, soft: Tensor | None) -> StepInputs:
    """A step as both are given it; neither leaves out the signal of the last."""
    return StepInputs(
        canvas,
        noise.uniforms(0, remaining),
        noise.replacements(0, remaining),
        sampler.temperature(remaining),
        sampler.entropy_bound,
        soft,
    )


def _buffers(context: Context, layers: int) -> list[tuple[Tensor, ...]]:
    return [tuple(context.past[0][name] for name in past_names(layer)) for layer in range(layers)]


def _share(a: Tensor, b: Tensor) -> float:
    return float((a.cpu() == b.cpu()).float().mean())


def _same_experts(chosen_TK: Tensor, other_TK: Tensor) -> float:
    return float((chosen_TK[: len(other_TK)] == other_TK.cpu().sort(-1).values).all(-1).float().mean())
