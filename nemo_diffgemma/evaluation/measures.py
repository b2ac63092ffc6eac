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
from nemo_diffgemma.diffusion.objective import choose_canvases, corrupt
from nemo_diffgemma.diffusion.rows import Rows
from nemo_diffgemma.diffusion_gemma import DiffusionGemma
from nemo_diffgemma.parallel.agreement import all_ranks
from nemo_diffgemma.parallel.groups import device
from nemo_diffgemma.schema import LEVELS as LEVELS


def held_out_rows(task: Task, model: ModelConfig, wanted: int | None = None) -> Rows:
    """The first `wanted` held-out examples (None: all), filled with EOS to whole canvases.

    Raises `ConfigurationError` where the network cannot read this data.
    """
    task.check(model)
    return collate(task.held_out_examples(wanted), model.canvas_length, fill_id(model)).to(device())


@torch.no_grad()
def canvas_losses(network: DiffusionGemma, rows: Rows, levels: Sequence[float], seed: int) -> dict[float, float]:
    """Mean cross-entropy (nats) of all canvas tokens, all replaced with the same probability; by that probability.

    Without self-conditioning: what the first denoising step of a canvas with that much noise has to go by.
    """
    losses = _canvas_losses(network, rows, levels, seed)
    if not all_ranks(all(map(math.isfinite, losses.values())), device()):
        network.raise_non_finite(lambda: _canvas_losses(network, rows, levels, seed))
    return losses


def _canvas_losses(network: DiffusionGemma, rows: Rows, levels: Sequence[float], seed: int) -> dict[float, float]:
    canvases = choose_canvases(rows, network.model_config.canvas_length, 0, seed)
    cache = network.encode_clean(rows.tokens_T, rows.lengths).cache
    places = [(canvas.row, canvas.start) for canvas in canvases]
    losses = {}
    for level in levels:
        corrupted = corrupt(
            rows,
            canvases,
            network.model_config.canvas_length,
            network.model_config.vocab_size,
            seed,
            level=float(level),
        )
        hidden = network.canvas_hidden(corrupted.noised_MC, places, cache, None)
        labels = corrupted.clean_MC.flatten()
        weights = torch.full(labels.shape, 1.0 / labels.numel(), device=labels.device)
        losses[float(level)] = float(network.cross_entropy(hidden, labels, weights)[0])
    return losses
