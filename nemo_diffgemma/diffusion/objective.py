"""The training objective: corrupt canvases of clean rows, denoise them in one pass, score every position.

Google's published fine-tuning recipe (which NeMo AutoModel and TRL follow): an answer is cut into canvases counted
from its start; a canvas at noise level t has each token replaced, with probability t, by one uniform over the
vocabulary; the loss is the plain cross-entropy of all its positions, whatever t is, plus an autoregressive loss of
the encoder. A canvas sees the clean context strictly before it. Self-conditioning: a gradient-free pass without
signal, whose prediction is shown to the scored pass for half of the examples.

Ours: a row may have many answers; any set of its canvases is scored at once, each at a noise level of its own;
everything random is keyed by (seed, sample, canvas), so neither batch nor layout changes it.

Shapes: T tokens of all rows, one row behind the other, M canvases of C tokens over all rows, N positions, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from nemo_diffgemma.diffusion.noise import (
    CHOICE,
    COIN,
    CORRUPTED,
    CORRUPTION,
    LEVEL,
    keyed_bits,
    to_ids,
    to_uniforms,
)
from nemo_diffgemma.diffusion.rows import Rows, check_answers
from nemo_diffgemma.errors import UserError


@dataclass
class ObjectiveConfig:
    """What is minimised. Raises `UserError` for values that mean nothing."""

    canvases_per_example: int = 1  # scored at once, chosen uniformly without replacement; 0: all of them
    autoregressive_weight: float = 1.0
    self_conditioning_probability: float = 0.5  # of an example; 0 leaves the first pass out
    noise_floor: float = 1e-3  # noise levels are uniform in [noise_floor, 1)
    reduction: str = "example"  # mean over examples of means over tokens; "token": mean over all tokens

    def __post_init__(self) -> None:
        if self.reduction not in ("example", "token"):
            raise UserError(f"objective.reduction={self.reduction!r}; use 'example' or 'token'")
        if not 0.0 <= self.self_conditioning_probability <= 1.0:
            raise UserError(
                f"objective.self_conditioning_probability={self.self_conditioning_probability}; expected 0 to 1"
            )
        if not 0.0 <= self.noise_floor < 1.0:
            raise UserError(f"objective.noise_floor={self.noise_floor}; expected at least 0 and below 1")
        if self.canvases_per_example < 0:
            raise UserError(f"objective.canvases_per_example={self.canvases_per_example}; expected 0 (all) or more")
        if not 0.0 <= self.autoregressive_weight < math.inf:
            raise UserError(f"objective.autoregressive_weight={self.autoregressive_weight}; expected 0 or more")


class Encoded(Protocol):
    """Result of encoding clean rows: states [T, H] of all tokens, and what canvases need of them."""

    @property
    def context_hidden(self) -> Tensor | None: ...

    @property
    def cache(self) -> Any: ...


class TrainableNetwork(Protocol):
    """What the objective needs of a network."""

    def encode_clean(self, tokens_T: Tensor, lengths: Sequence[int]) -> Encoded:
        """Causal pass with gradient over rows of these lengths."""

    def canvas_hidden(
        self, canvas_MC: Tensor, canvases: Sequence[tuple[int, int]], cache: Any, soft_MCH: Tensor | None
    ) -> Tensor:
        """Final hidden states [M*C, H] of canvases (row, start)."""

    def soft_embedding(self, hidden_NH: Tensor) -> Tensor:
        """Self-conditioning signal, differentiable in the token table only."""

    def cross_entropy(self, hidden_NH: Tensor, labels_N: Tensor, weights_N: Tensor) -> tuple[Tensor, Tensor]:
        """Weighted sum of cross-entropies, and the cross-entropies."""


@dataclass(frozen=True)
class Canvas:
    """A canvas of a row and the position where it starts; `index` counts the canvases of the row."""

    row: int
    start: int
    index: int
    size: int  # tokens of its answer in it; the rest is fill


class Corrupted(NamedTuple):
    """Canvases as the decoder sees them."""

    noised_MC: Tensor
    clean_MC: Tensor
    levels_M: Tensor


@dataclass(frozen=True)
class Counts:
    """What the loss is a mean over: examples, scored canvas tokens, next-token pairs."""

    examples: int
    canvas_tokens: int
    next_tokens: int

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.examples + other.examples,
            self.canvas_tokens + other.canvas_tokens,
            self.next_tokens + other.next_tokens,
        )


class Loss(NamedTuple):
    """Shares of the global loss: their sums over micro-batches and replicas. Only `total` has gradient."""

    total: Tensor
    diffusion: Tensor
    autoregressive: Tensor


def choose_canvases(rows: Rows, canvas_length: int, wanted: int, seed: int) -> list[Canvas]:
    """`wanted` canvases of each row (0: all), uniformly without replacement, keyed by (seed, sample)."""
    canvases: list[Canvas] = []
    for row, (answers, length, sample) in enumerate(zip(rows.answers, rows.lengths, rows.samples, strict=True)):
        check_answers(answers, length)
        starts = [(start, end) for first, end in answers for start in range(first, end, canvas_length)]
        chosen: Sequence[int] = range(len(starts))
        if wanted and wanted < len(starts):
            ranks = keyed_bits(seed, sample, CHOICE, torch.arange(len(starts))).argsort()
            chosen = sorted(ranks[:wanted].tolist())
        for index in chosen:
            start, end = starts[index]
            canvases.append(Canvas(row, start, index, min(canvas_length, end - start)))
    return canvases


def corrupt(
    rows: Rows,
    canvases: Sequence[Canvas],
    canvas_length: int,
    vocab_size: int,
    seed: int,
    *,
    noise_floor: float = 1e-3,
    level: float | None = None,
) -> Corrupted:
    """Uniform corruption: each token of a canvas is replaced with probability t by an id uniform over the vocabulary.

    t is uniform in [noise_floor, 1) for each canvas, or `level` for all. The new id may be the old one.
    """
    device, offsets = rows.tokens_T.device, rows.offsets
    inside = torch.arange(canvas_length, device=device)
    numbers = [(rows.samples[c.row], c.index, offsets[c.row] + c.start, c.size) for c in canvases]
    samples_M1, index_M1, starts_M1, sizes_M1 = torch.tensor(numbers).to(device)[:, :, None].unbind(1)
    last_M1 = starts_M1 + sizes_M1 - 1
    clean_MC = rows.tokens_T[torch.minimum(starts_M1 + inside, last_M1)]
    clean_MC = clean_MC.masked_fill(inside >= sizes_M1, rows.fill_id)

    def bits(purpose: int, position: Tensor | int) -> Tensor:
        return keyed_bits(seed, samples_M1, purpose, index_M1, position)

    if level is None:
        levels_M1 = noise_floor + (1.0 - noise_floor) * to_uniforms(bits(LEVEL, 0))
    else:
        levels_M1 = torch.full(samples_M1.shape, level, device=device)
    replaced_MC = to_uniforms(bits(CORRUPTED, inside)) < levels_M1
    noised_MC = torch.where(replaced_MC, to_ids(bits(CORRUPTION, inside), vocab_size), clean_MC)
    return Corrupted(noised_MC, clean_MC, levels_M1[:, 0])


def count(rows: Rows, canvases: Sequence[Canvas], canvas_length: int) -> Counts:
    """Counts of one batch, to be added over micro-batches and replicas."""
    return Counts(len(rows), len(canvases) * canvas_length, sum(length - 1 for length in rows.lengths))


def objective(
    network: TrainableNetwork,
    rows: Rows,
    canvases: Sequence[Canvas],
    corrupted: Corrupted,
    config: ObjectiveConfig,
    seed: int,
    totals: Counts,
) -> Loss:
    """Loss of one micro-batch as its share of a global batch of `totals`.

    The context is encoded once, with gradient; both canvas passes attend to it. (A joint pass over context and canvases
    gives the same numbers; encoding once costs 3P + 7N token passes a step against 4P + 8N, for P prompt tokens and N
    response tokens all of whose canvases are scored.)
    """
    lengths = _lengths_read(rows, canvases, config)
    encoded = network.encode_clean(rows.prefixes(lengths), lengths)
    places = [(canvas.row, canvas.start) for canvas in canvases]
    soft_MCH = None
    if config.self_conditioning_probability > 0:  # on every rank, whatever its coins: experts are shared
        with torch.no_grad():
            hidden = network.canvas_hidden(corrupted.noised_MC, places, encoded.cache, None)
        shown_M = self_conditioned(rows, canvases, config.self_conditioning_probability, seed)
        soft_MCH = network.soft_embedding(hidden).view(*corrupted.noised_MC.shape, -1)
        soft_MCH = soft_MCH * shown_M[:, None, None].to(hidden.dtype)
    hidden = network.canvas_hidden(corrupted.noised_MC, places, encoded.cache, soft_MCH)
    diffusion, _ = network.cross_entropy(
        hidden, corrupted.clean_MC.flatten(), _canvas_weights(rows, canvases, corrupted.noised_MC, config, totals)
    )
    total, autoregressive = diffusion, diffusion.new_zeros(())
    if config.autoregressive_weight > 0:
        assert encoded.context_hidden is not None
        autoregressive = _autoregressive(network, rows, encoded.context_hidden, config, totals)
        total = total + config.autoregressive_weight * autoregressive
    return Loss(total, diffusion.detach(), autoregressive.detach())


def _lengths_read(rows: Rows, canvases: Sequence[Canvas], config: ObjectiveConfig) -> list[int]:
    """How much of each row is encoded: without the encoder's loss nobody reads what comes after its last canvas."""
    if config.autoregressive_weight > 0:
        return list(rows.lengths)
    lengths = [0] * len(rows)
    for canvas in canvases:
        lengths[canvas.row] = max(lengths[canvas.row], canvas.start)
    return lengths


def self_conditioned(rows: Rows, canvases: Sequence[Canvas], probability: float, seed: int) -> Tensor:
    """Which canvases are shown the first pass's prediction: one coin an example, [M] bool."""
    samples_M = torch.tensor([rows.samples[canvas.row] for canvas in canvases])
    return (to_uniforms(keyed_bits(seed, samples_M, COIN)) < probability).to(rows.tokens_T.device)


def _canvas_weights(
    rows: Rows, canvases: Sequence[Canvas], noised_MC: Tensor, config: ObjectiveConfig, totals: Counts
) -> Tensor:
    """Weight of each canvas position, [M*C]."""
    canvas_length = noised_MC.shape[1]
    if config.reduction == "token":
        return torch.full((noised_MC.numel(),), 1.0 / totals.canvas_tokens, device=noised_MC.device)
    scored = [0] * len(rows)
    for canvas in canvases:
        scored[canvas.row] += canvas_length
    weights_M = torch.tensor([1.0 / (scored[canvas.row] * totals.examples) for canvas in canvases])
    return weights_M.to(noised_MC.device).repeat_interleave(canvas_length)


def _autoregressive(
    network: TrainableNetwork, rows: Rows, hidden_TH: Tensor, config: ObjectiveConfig, totals: Counts
) -> Tensor:
    """Next-token loss of the encoder over every pair of tokens inside a row."""
    lengths_B = torch.tensor(rows.lengths)
    last_B = lengths_B.cumsum(0) - 1
    has_next_T = torch.ones(int(lengths_B.sum()), dtype=torch.bool).index_fill(0, last_B, False)
    if config.reduction == "token":
        weights_N = torch.full((len(has_next_T) - len(rows),), 1.0 / totals.next_tokens)
    else:
        pairs_B = lengths_B - 1
        weights_N = (1.0 / (pairs_B.clamp_min(1) * totals.examples)).repeat_interleave(pairs_B)
    device = hidden_TH.device
    tokens_N = has_next_T.nonzero()[:, 0].to(device)
    loss, _ = network.cross_entropy(
        hidden_TH.index_select(0, tokens_N), rows.tokens_T.index_select(0, tokens_N + 1), weights_N.to(device)
    )
    return loss
