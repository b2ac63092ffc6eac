"""Our network beside transformers' (`reference.Reference`, on rank 0): states, logits, routing and tokens. Float32.

Shapes: B rows, S prompt tokens, C canvas positions, H hidden, N tokens, E experts, K of them chosen.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_diffgemma.diffusion.noise import KeyedNoise
from nemo_diffgemma.model.row_products import multiple_of_tokens
from nemo_diffgemma.parallel.agreement import all_ranks, on_rank_zero
from nemo_diffgemma.parallel.groups import device


def random_ids(network: Any, rows: int, length: int, seed: int) -> Tensor:
    """Uniform ids [rows, length], the same on every rank."""
    return torch.randint(network.model_config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def compare_passes(
    network: Any, reference: Any, prompts: Tensor, canvas: Tensor, differences: dict[str, float], routes: list[float]
) -> None:
    """One encoder pass and two denoising passes, the second with self-conditioning."""

    def note(name: str, ours: Tensor, theirs: Tensor) -> None:
        if not all_ranks(bool(ours.isfinite().all()), device()):
            network.raise_non_finite(lambda: network.denoise(canvas, network.encode(prompts)))
        gaps = (ours.cpu() - theirs).abs().nan_to_num(nan=math.inf)  # NaN is above no tolerance
        differences[name] = max(differences.get(name, 0.0), float(gaps.max()))

    plain_logits: Any = None  # logits without self-conditioning
    their_cache: Any = None
    with chosen_experts(network) as ours:
        tokens = prompts.to(device()).flatten()
        hidden = network.encode_clean(tokens, [prompts.shape[1]] * len(prompts)).context_hidden.view(*prompts.shape, -1)
    cache = network.encode(prompts)

    def encode() -> Any:
        nonlocal their_cache
        with reference.routes(encoder=True) as chosen:
            their_cache, states = reference.encode(prompts)
        return states, chosen

    states, chosen = on_rank_zero(encode)
    note("encoder_states", hidden, states)
    routes += [same_experts(network, a, b) for a, b in zip(ours, chosen, strict=True)]
    for name, temperature in (("logits", None), ("self_conditioned_logits", 0.6)):
        signal = None if temperature is None else plain_logits / temperature
        with chosen_experts(network) as ours:
            logits = network.denoise(canvas, cache, signal)

        def denoise(signal: Tensor | None = signal) -> Any:
            with reference.routes(encoder=False) as chosen:
                their_logits = reference.denoise(canvas, their_cache, signal)
            return their_logits, chosen

        plain_logits, chosen = on_rank_zero(denoise)
        note(name, logits, plain_logits)
        routes += [same_experts(network, a, b) for a, b in zip(ours, chosen, strict=True)]


def compare_tokens(
    network: Any, reference: Any, prompts: Tensor, *, canvases: int, max_denoising_steps: int, probe: float, seed: int
) -> list[bool]:
    """Whether each robust row has the tokens of transformers.

    A row is robust where transformers itself keeps its tokens when its logits are disturbed by `probe` and by `-probe`.
    """
    sampler = dataclasses.replace(network.sampler_defaults, max_denoising_steps=max_denoising_steps)
    new_tokens = canvases * network.model_config.canvas_length
    noise = KeyedNoise.for_rows(seed, len(prompts), network.model_config.canvas_length, network.model_config.vocab_size)
    ours = network.generate(prompts, max_new_tokens=new_tokens, sampler=sampler, noise=noise).sequences.cpu()

    def theirs() -> list[Tensor]:
        return [reference.generate(prompts, new_tokens, sampler, noise, size) for size in (0.0, probe, -probe)]

    sequences = [*on_rank_zero(theirs), ours]
    width = max(tokens.shape[1] for tokens in sequences)
    pad = -1 if sampler.pad_token_id is None else sampler.pad_token_id
    plain, up, down, ours = (torch.nn.functional.pad(x, (0, width - x.shape[1]), value=pad) for x in sequences)
    robust = (plain == up).all(-1) & (plain == down).all(-1)
    return (plain == ours).all(-1)[robust].tolist()


class chosen_experts:
    """Experts that each of our layers chooses meanwhile, [T, K] ascending ids a layer.

    T are the tokens that the layer's router reads: those of this rank, or all (`MixtureOfExperts.needs_whole_stream`),
    and what the stream has as padding behind them.
    """

    def __init__(self, network: Any) -> None:
        self._routers = [layer.moe.router for layer in network.layers]

    def __enter__(self) -> list[Tensor]:
        chosen: list[Tensor] = []
        self._handles = [
            router.register_forward_hook(lambda module, args, output: chosen.append(output[1].sort(-1).values))
            for router in self._routers
        ]
        return chosen

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


@torch.no_grad()
def same_experts(network: Any, ours: Tensor, theirs_NK: Tensor) -> float:
    """Share of tokens that go to the same experts."""
    group, tokens = network.groups.tp, len(theirs_NK)
    ranks = group.size()
    if len(ours) < tokens + -tokens % multiple_of_tokens(device(), ranks):  # this rank's
        parts = [torch.empty_like(ours) for _ in range(group.size())]
        dist.all_gather(parts, ours.contiguous(), group=group)
        ours = torch.cat(parts)
    return float((ours[:tokens].cpu() == theirs_NK.sort(-1).values).all(-1).float().mean())
