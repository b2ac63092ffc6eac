"""How good a network is: canvas loss at fixed noise levels, and the puzzles that it solves. No gradient, no NeMo.

    losses = canvas_losses(network, held_out_rows(data, network.model), LEVELS, seed=0)    # {0.1: 0.02, ...}
    rate, tokens_per_forward = sudoku_solve_rate(network, puzzles, steps=16, seed=0)

All functions are collective, and give the same on every rank. Shapes: M canvases of C tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from nemo_diffgemma.config import ModelConfig
from nemo_diffgemma.data import collate, encode_puzzle, solve_rate, tasks
from nemo_diffgemma.diffusion.noise import KeyedNoise
from nemo_diffgemma.diffusion.objective import choose_canvases, corrupt
from nemo_diffgemma.diffusion.rows import Rows
from nemo_diffgemma.diffusion.sampler import SamplerConfig
from nemo_diffgemma.diffusion_gemma import DiffusionGemma
from nemo_diffgemma.parallel.groups import device
from nemo_diffgemma.schema import LEVELS as LEVELS
from nemo_diffgemma.schema import DataGroup


class SolveRate(NamedTuple):
    """Share of puzzles solved, and canvas tokens per denoising step over all of them."""

    rate: float
    tokens_per_forward: float


def held_out_rows(data: DataGroup, model: ModelConfig, wanted: int | None = None) -> Rows:
    """The first `wanted` held-out examples (None: all), filled with EOS to whole canvases.

    Raises `ConfigurationError` where the network cannot read this data.
    """
    tasks.check(data, model)
    examples = tasks.held_out_examples(data, data.test_puzzles if wanted is None else wanted)
    return collate(examples, model.canvas_length, tasks.fill_id(model)).to(device())


@torch.no_grad()
def canvas_losses(network: DiffusionGemma, rows: Rows, levels: Sequence[float], seed: int) -> dict[float, float]:
    """Mean cross-entropy (nats) of all canvas tokens, all replaced with the same probability; by that probability.

    Without self-conditioning: what the first denoising step of a canvas with that much noise has to go by.
    """
    canvases = choose_canvases(rows, network.model.canvas_length, 0, seed)
    cache = network.encode_clean(rows.tokens_T, rows.lengths).cache
    places = [(canvas.row, canvas.start) for canvas in canvases]
    losses = {}
    for level in levels:
        corrupted = corrupt(
            rows, canvases, network.model.canvas_length, network.model.vocab_size, seed, level=float(level)
        )
        hidden = network.canvas_hidden(corrupted.noised_MC, places, cache, None)
        labels = corrupted.clean_MC.flatten()
        weights = torch.full(labels.shape, 1.0 / labels.numel(), device=labels.device)
        losses[float(level)] = float(network.cross_entropy(hidden, labels, weights)[0])
    if not network.agree(all(map(math.isfinite, losses.values()))):
        network.raise_non_finite(lambda: canvas_losses(network, rows, levels, seed))
    return losses


@torch.no_grad()
def sudoku_solve_rate(
    network: DiffusionGemma,
    puzzles: Sequence[Sequence[int]],
    steps: int,
    seed: int,
    batch: int = 400,
) -> SolveRate:
    """Share of `puzzles` solved exactly with at most `steps` denoising steps, `batch` puzzles at a time.

    Puzzle i draws its noise by (seed, i), whatever the batch.
    """
    sampler = SamplerConfig(max_denoising_steps=steps, eos_token_id=None, pad_token_id=None)
    model, cells = network.model, len(puzzles[0])
    responses, forwards = [], 0
    for start in range(0, len(puzzles), batch):
        part = puzzles[start : start + batch]
        keys = range(start, start + len(part))
        noise = KeyedNoise([seed] * len(part), keys, model.canvas_length, model.vocab_size, device())
        prompts = torch.tensor([encode_puzzle(puzzle) for puzzle in part])
        found = network.generate(prompts, max_new_tokens=cells, sampler=sampler, noise=noise)
        responses.append(found.sequences[:, prompts.shape[1] :].cpu())
        forwards += int(found.forwards.sum())
    answers = torch.cat(responses)
    return SolveRate(solve_rate(puzzles, answers), answers.numel() / forwards)
