"""Training steps whose loss and gradients are compared: here, in every layout, at every recompute level and on GPUs."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemo_diffgemma.diffusion import objective as method
from nemo_diffgemma.diffusion.rows import Rows
from tests.reference import SIZES
from tests.reference import objective as reference_objective

SEED = 5
WEIGHTS = {size: dict(damp=0.1, sublayers=0.2 if size == "deep" else 0.5) for size in SIZES}
"""Damped, so that float32 rounding stays below the tolerances: undamped, one process differs from itself by 4.7e-6 on
"base" and 3.3e-4 on "deep" when it only takes the rows two at a time."""

PROMPTS, CANVASES = (3, 11, 5, 9), (3, 1, 2, 3)  # of four rows: below and above the window, and around it at some start
OBJECTIVES: dict[str, tuple[dict[str, Any], tuple[bool, ...]]] = {
    # name: (ObjectiveConfig, coin of each row: is it shown the first pass's prediction?)
    "two_canvases": (dict(canvases_per_example=2, autoregressive_weight=0.7), (False, False, True, True)),
    "all_canvases_by_token": (dict(canvases_per_example=0, reduction="token"), (True, False, True, False)),
    "diffusion_alone": (dict(canvases_per_example=1, autoregressive_weight=0.0), (True, False, False, True)),
    "no_coin": (dict(canvases_per_example=1), (False, False, False, False)),
}


class Step(NamedTuple):
    """Loss and whole gradients by released name."""

    loss: float
    gradients: dict[str, Tensor]


def asked(size: str, name: str) -> dict[str, Any]:
    """Arguments of `cases.gradients`. The rows' samples are such that keyed coins come out as `OBJECTIVES` wants."""
    objective, coins = OBJECTIVES[name]
    length = SIZES[size]["canvas_length"]
    lengths = [prompt + canvases * length for prompt, canvases in zip(PROMPTS, CANVASES, strict=True)]
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(SIZES[size]["vocab_size"], (sum(lengths),), generator=generator)
    fallen = _coins(range(64), method.ObjectiveConfig(**objective).self_conditioning_probability)
    samples: list[int] = []
    for wanted in coins:
        samples.append(next(s for s in range(64) if s not in samples and fallen[s] == wanted))
    answers = [((prompt, length),) for prompt, length in zip(PROMPTS, lengths, strict=True)]
    return dict(rows=Rows(tokens, answers, lengths, samples, fill_id=1), objective=objective, seed=SEED)


def _coins(samples: Any, probability: float) -> list[bool]:
    rows = Rows(torch.zeros(len(samples), dtype=torch.long), [()] * len(samples), [1] * len(samples), samples, 1)
    canvases = [method.Canvas(row, 0, 0, 1) for row in range(len(samples))]
    return method.self_conditioned(rows, canvases, probability, SEED).tolist()


@functools.cache
def by_transformers(reference: Any, size: str, name: str) -> Step:
    """One canvas of one row at a time, each after its own prefix; the noised canvases are ours."""
    objective, coins = OBJECTIVES[name]
    config = method.ObjectiveConfig(**objective)
    rows = asked(size, name)["rows"]
    length, vocabulary = SIZES[size]["canvas_length"], SIZES[size]["vocab_size"]
    canvases = method.choose_canvases(rows, length, config.canvases_per_example, SEED)
    noised_MC = method.corrupt(rows, canvases, length, vocabulary, SEED).noised_MC
    noised = [
        [(canvas.index, noised_MC[i]) for i, canvas in enumerate(canvases) if canvas.row == row]
        for row in range(len(PROMPTS))
    ]
    reference.zero_grad()
    loss, _ = reference_objective(
        reference,
        rows.tokens_T.split(rows.lengths),
        PROMPTS,
        rows.lengths,
        noised,
        coins,
        autoregressive_weight=config.autoregressive_weight,
        reduction=config.reduction,
        vocabulary=vocabulary,
    )
    loss.backward()
    stack = (
        "model.encoder.language_model.",
        "model.decoder.",
    )  # one set of weights; torch lists it where it saw it first
    gradients = {name.replace(*stack): p.grad.clone() for name, p in reference.named_parameters() if p.grad is not None}
    reference.zero_grad()
    return Step(loss.item(), gradients)


def assert_same_step(ours: Step, truth: Step, tolerance: float) -> None:
    """Equal losses; gradients, all scaled to a common norm of 1, equal to `tolerance` in every element."""
    assert abs(ours.loss - truth.loss) < tolerance * 10
    assert set(ours.gradients) == set(truth.gradients)
    norm = torch.stack([gradient.norm() for gradient in truth.gradients.values()]).norm()
    off = {name: float((ours.gradients[name] - truth.gradients[name]).abs().max() / norm) for name in truth.gradients}
    worst = max(off, key=off.__getitem__)
    assert off[worst] < tolerance, f"{worst} is off by {off[worst]:.1e}"
