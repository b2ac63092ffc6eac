"""How good a network is on any data: canvas loss at fixed noise levels. No gradient, no NeMo.

    losses = canvas_losses(network, held_out_rows(task, network.model_config), LEVELS, seed=0)    # {0.1: 0.02, ...}

Each task defines its further measures: data/tasks.py.

`canvas_losses` is collective, and gives the same on every rank. Shapes: M canvases of C tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from nemo_diffgemma.config import ModelConfig
from nemo_diffgemma.data import collate
from nemo_diffgemma.data.tasks import Task, fill_id
from nemo_diffgemma.diffusion.objective import choose_canvases, corrupt, prediction_shift
from nemo_diffgemma.diffusion.rows import Rows
from nemo_diffgemma.diffusion_gemma import DiffusionGemma
from nemo_diffgemma.parallel.agreement import all_ranks
from nemo_diffgemma.parallel.groups import device
from nemo_diffgemma.schema import LEVELS as LEVELS

_TOKENS = 1 << 15  # of one pass


def held_out_rows(task: Task, model: ModelConfig, wanted: int | None = None) -> Rows:
    """The first `wanted` held-out examples (None: all).

    Raises `ConfigurationError` where the network cannot read this data.
    """
    task.prepare(model)
    examples = task.held_out_examples(wanted)
    return collate(examples, model.canvas_length, fill_id(model), task.fills_rows).to(device())


@torch.no_grad()
def canvas_losses(
    network: DiffusionGemma, rows: Rows, levels: Sequence[float], seed: int, prediction: str = "denoiser"
) -> dict[float, float]:
    """Mean cross-entropy (nats) of all canvas tokens, all replaced with the same probability; by that probability.

    Without self-conditioning: what the first denoising step of a canvas with that much noise has to go by.
    `prediction` is what logits stand for (`ObjectiveConfig`).
    """
    losses = _canvas_losses(network, rows, levels, seed, prediction)
    if not all_ranks(all(map(math.isfinite, losses.values())), device()):
        network.raise_non_finite(lambda: _canvas_losses(network, rows, levels, seed, prediction))
    return losses


def _canvas_losses(
    network: DiffusionGemma, rows: Rows, levels: Sequence[float], seed: int, prediction: str
) -> dict[float, float]:
    length, vocabulary = network.model_config.canvas_length, network.model_config.vocab_size
    parts = [(part, choose_canvases(part, length, 0, seed)) for part in rows.split(passes_of(rows, length))]
    total = length * sum(len(canvases) for _, canvases in parts)
    losses = {float(level): 0.0 for level in levels}
    for part, canvases in parts:
        cache = network.encode_clean(part.tokens_T, part.lengths).cache
        places = [(canvas.row, canvas.start) for canvas in canvases]
        for level in losses:
            corrupted = corrupt(part, canvases, length, vocabulary, seed, level=level)
            hidden = network.canvas_hidden(corrupted.noised_MC, places, cache, None)
            labels = corrupted.clean_MC.flatten()
            weights = torch.full(labels.shape, 1.0 / total, device=labels.device)
            shift = prediction_shift(corrupted, prediction)
            losses[level] += float(network.cross_entropy(hidden, labels, weights, shift)[0])
    return losses


def passes_of(rows: Rows, canvas_length: int) -> list[int]:
    """Rows of each pass: as many as have no more than `_TOKENS` tokens with their canvases, at least one."""
    counts, tokens = [0], 0
    for length, answers in zip(rows.lengths, rows.answers, strict=True):
        size = length + sum(-(-(end - start) // canvas_length) * canvas_length for start, end in answers)
        if counts[-1] and tokens + size > _TOKENS:
            counts.append(0)
            tokens = 0
        counts[-1] += 1
        tokens += size
    return counts
