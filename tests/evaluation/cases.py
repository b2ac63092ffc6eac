"""Jobs for the pool of ranks: held-out measures of a small network."""

from __future__ import annotations

import math
from typing import Any


def network_and_rows(layout: dict[str, int], puzzles: int = 5) -> tuple[Any, Any]:
    """A network with the initial weights of a seed, and held-out puzzles."""
    from nemo_diffgemma.data.sudoku_task import Sudoku, SudokuData
    from nemo_diffgemma.evaluation.measures import held_out_rows
    from nemo_diffgemma.parallel import ParallelLayout, initialize
    from nemo_diffgemma.training.nemo_model import build_network
    from tests.training.cases import config

    initialize(ParallelLayout(**layout))
    network = build_network(config().model, seed=0).eval()
    return network, held_out_rows(Sudoku(SudokuData(test_puzzles=puzzles)), network.model_config)


def bits(layout: dict[str, int]) -> tuple[float, float]:
    """`bits_per_token` of a network, and the same from dense logits by the definition."""
    import torch

    from nemo_diffgemma.diffusion.objective import choose_canvases, corrupt
    from nemo_diffgemma.evaluation.likelihood import FLOOR, bits_per_token
    from tests.evaluation.test_likelihood import by_definition

    network, rows = network_and_rows(layout)
    ours = bits_per_token(network, rows, seed=3, draws=1)
    canvases = choose_canvases(rows, 16, 0, 3)
    corrupted = corrupt(rows, canvases, 16, 64, 3, noise_floor=FLOOR, spread_over=len(rows))
    prompts = rows.tokens_T.view(len(rows), -1)[:, :18]
    logits = network.denoise(corrupted.noised_MC, network.encode(prompts)).double()
    nats = 0.0
    for row, level in enumerate(corrupted.levels_M.tolist()):
        for place in range(16):
            noised, clean = int(corrupted.noised_MC[row, place]), int(corrupted.clean_MC[row, place])
            z_V = logits[row, place].clone()
            z_V[noised] -= math.log1p(64 * (1 - level) / level)
            nats += by_definition(torch.softmax(z_V, 0), noised, clean, level)
    return ours, nats / (16 * len(rows)) / math.log(2)
