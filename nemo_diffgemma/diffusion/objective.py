"""The training objective: corrupt canvases of clean rows, denoise them in one pass, score every position.

Google's published fine-tuning recipe (which NeMo AutoModel and TRL follow): an answer is cut into canvases counted
from its start; a canvas at noise level t has each token replaced, with probability t, by one uniform over the
vocabulary; the loss is the plain cross-entropy of all its positions, whatever t is, plus an autoregressive loss of
the encoder. A canvas sees the clean context strictly before it. Self-conditioning: a gradient-free pass without
signal, whose prediction is shown to the scored pass for half of the examples.

Ours: a row may have many answers; any set of its canvases is scored at once, each at a noise level of its own;
everything random is keyed by (seed, sample, canvas), so neither batch nor layout changes it.

`objective` is one graph for autograd. Training runs `Scored` instead, whose backward goes through the canvases first
and then, with what they ask of the context's keys and values, through the context: gradients of the weights, which both
passes use, never wait for one another.

Nothing here waits for a device. What is drawn or counted is made on the host and sent once.

Shapes: T tokens of all rows, one row behind the other, M canvases of C tokens over all rows, N positions, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemo_diffgemma.diffusion.levels import Shift, leave_one_out_shift, reciprocal_weights, spread, sums_by_level
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
from nemo_diffgemma.diffusion.trainable import Encoded, TrainableNetwork
from nemo_diffgemma.errors import UserError
from nemo_diffgemma.transfer import to_device

PREDICTIONS = ("denoiser", "leave_one_out")
LEVEL_WEIGHTINGS = ("none", "reciprocal")


@dataclass
class ObjectiveConfig:
    """What is minimised. Raises `UserError` for values that mean nothing."""

    canvases_per_example: int = 1  # scored at once, chosen uniformly without replacement; 0: all of them
    autoregressive_weight: float = 1.0
    self_conditioning_probability: float = 0.5  # of an example; 0 leaves the first pass out
    noise_floor: float = 1e-3  # noise levels are uniform in [noise_floor, 1)
    spread_levels: bool = False  # evenly over the batch of a step; else each canvas draws its own
    prediction: str = "denoiser"  # what logits stand for; leave_one_out: a token's posterior without its own noise
    level_weighting: str = "none"  # reciprocal: 1 / (1 - noise level), ...
    largest_level_weight: float = 10.0  # ... at most this
    reduction: str = "example"  # mean over examples of means over tokens; "token": mean over all tokens

    def __post_init__(self) -> None:
        for name, choices in (("prediction", PREDICTIONS), ("level_weighting", LEVEL_WEIGHTINGS)):
            if getattr(self, name) not in choices:
                raise UserError(f"objective.{name}={getattr(self, name)!r}; use one of {', '.join(choices)}")
        if not 1.0 <= self.largest_level_weight < math.inf:
            raise UserError(f"objective.largest_level_weight={self.largest_level_weight}; expected 1 or more")
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
    levels_M: Tensor  # on the host
    vocab_size: int


@dataclass(frozen=True)
class Counts:
    """What the loss is a mean over: examples, scored canvas tokens, next-token pairs.

    Sums over replicas may be tensors of one number, which the host need not know.
    """

    examples: int | Tensor
    canvas_tokens: int | Tensor
    next_tokens: int | Tensor

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
    spread_over: int = 0,
    level: float | None = None,
) -> Corrupted:
    """Uniform corruption: each token of a canvas is replaced with probability t by an id uniform over the vocabulary.

    t is uniform in [noise_floor, 1) for each canvas, or `level` for all. The new id may be the old one. With
    `spread_over`, the examples of a step, levels are spread evenly over these.
    """
    offsets, inside = rows.offsets, torch.arange(canvas_length)
    numbers = [(rows.samples[c.row], c.index, offsets[c.row] + c.start, c.size) for c in canvases]
    samples_M1, index_M1, starts_M1, sizes_M1 = torch.tensor(numbers)[:, :, None].unbind(1)

    def bits(purpose: int, position: Tensor | int) -> Tensor:
        return keyed_bits(seed, samples_M1, purpose, index_M1, position)

    if level is None:
        uniforms_M1 = to_uniforms(bits(LEVEL, 0))
        if spread_over:
            uniforms_M1 = spread(uniforms_M1, samples_M1, _ranks(canvases)[:, None], spread_over, seed)
        levels_M1 = noise_floor + (1.0 - noise_floor) * uniforms_M1
    else:
        levels_M1 = torch.full(samples_M1.shape, level)
    replaced_MC = to_uniforms(bits(CORRUPTED, inside)) < levels_M1
    new_MC = torch.where(replaced_MC, to_ids(bits(CORRUPTION, inside), vocab_size), -1)
    places_MC = torch.where(inside < sizes_M1, starts_M1 + inside, -1)  # -1: fill
    places_MC, new_MC = to_device(torch.stack([places_MC, new_MC]), rows.tokens_T.device)
    clean_MC = rows.tokens_T[places_MC]
    if any(canvas.size < canvas_length for canvas in canvases):
        clean_MC = clean_MC.masked_fill(places_MC < 0, rows.fill_id)
    return Corrupted(torch.where(new_MC < 0, clean_MC, new_MC), clean_MC, levels_M1[:, 0], vocab_size)


def _ranks(canvases: Sequence[Canvas]) -> Tensor:
    """Which of its row's chosen canvases each is, [M], counted from 0; those of a row stand together."""
    firsts: dict[int, int] = {}
    return torch.tensor([place - firsts.setdefault(canvas.row, place) for place, canvas in enumerate(canvases)])


def count(rows: Rows, canvases: Sequence[Canvas], canvas_length: int) -> Counts:
    """Counts of one batch, to be added over micro-batches and replicas."""
    return Counts(len(rows), len(canvases) * canvas_length, sum(length - 1 for length in rows.lengths))


# -- the loss ----------------------------------------------------------------------------------------------------------


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
    encoded = _encoded(network, rows, canvases, config)
    hidden = _denoised(network, rows, canvases, corrupted, config, seed, encoded.cache)
    weights = _canvas_weights(rows, canvases, corrupted, config, totals)
    shift = prediction_shift(corrupted, config.prediction)
    diffusion, _ = network.cross_entropy(hidden, corrupted.clean_MC.flatten(), weights, shift)
    total, autoregressive = diffusion, diffusion.new_zeros(())
    if config.autoregressive_weight > 0:
        assert encoded.context_hidden is not None
        tokens_N, labels_N, weights = _next_tokens(rows, config, totals)
        autoregressive, _ = network.cross_entropy(encoded.context_hidden.index_select(0, tokens_N), labels_N, weights)
        total = total + config.autoregressive_weight * autoregressive
    return Loss(total, diffusion.detach(), autoregressive.detach())


class Scored:
    """A micro-batch after its forward passes: `loss`, none of which has a graph, and backward in two passes.

    `by_level` has the sums of `sums_by_level` over its canvas tokens, each of weight one.

    `backward_canvases`, then `backward_context`: the second completes the gradient of every weight that the context
    uses. Gradients of the token table by the losses are added in the forward pass already.
    """

    def __init__(
        self,
        network: TrainableNetwork,
        rows: Rows,
        canvases: Sequence[Canvas],
        corrupted: Corrupted,
        config: ObjectiveConfig,
        seed: int,
        totals: Counts,
    ) -> None:
        encoded = _encoded(network, rows, canvases, config)
        autoregressive = None
        self._context: tuple[list[Tensor], list[Tensor]] = ([], [])  # what has gradient, and its gradient
        if config.autoregressive_weight > 0:
            assert encoded.context_hidden is not None
            tokens_N, labels_N, weights_N = _next_tokens(rows, config, totals)
            scored_NH = encoded.context_hidden.index_select(0, tokens_N)
            autoregressive, gradient_NH, _, _ = network.cross_entropy_gradient(
                scored_NH.detach(), labels_N, weights_N * config.autoregressive_weight
            )
            self._context = ([scored_NH], [gradient_NH])
        self._cache, self._leaves = encoded.cache, encoded.cache.cut_off()
        hidden = _denoised(network, rows, canvases, corrupted, config, seed, self._leaves)
        weights_N = _canvas_weights(rows, canvases, corrupted, config, totals)
        shift = prediction_shift(corrupted, config.prediction)
        diffusion, gradient, losses_N, correct_N = network.cross_entropy_gradient(
            hidden.detach(), corrupted.clean_MC.flatten(), weights_N, shift
        )
        self._canvases = (hidden, gradient)
        self.by_level = sums_by_level(corrupted.levels_M, losses_N, correct_N)
        if autoregressive is None:
            self.loss = Loss(diffusion, diffusion, torch.zeros_like(diffusion))
        else:
            self.loss = Loss(diffusion + autoregressive, diffusion, autoregressive / config.autoregressive_weight)

    def backward_canvases(self) -> None:
        """Gradients by the pass over the canvases; what it asks of the context's keys and values is kept."""
        hidden, gradient = self._canvases
        if hidden.requires_grad:
            torch.autograd.backward([hidden], [gradient])
        del self._canvases

    def backward_context(self) -> None:
        """Gradients by the pass over the context."""
        states, gradients = self._context
        pairs = zip(states + self._cache.tensors, gradients + [leaf.grad for leaf in self._leaves.tensors], strict=True)
        asked = [(tensor, gradient) for tensor, gradient in pairs if gradient is not None and tensor.requires_grad]
        if asked:  # with some weights frozen, nothing before may have a gradient
            torch.autograd.backward([tensor for tensor, _ in asked], [gradient for _, gradient in asked])
        del self._context, self._cache, self._leaves


def _encoded(network: TrainableNetwork, rows: Rows, canvases: Sequence[Canvas], config: ObjectiveConfig) -> Encoded:
    lengths = context_lengths(rows, canvases, config)
    return network.encode_clean(rows.prefixes(lengths), lengths)


def context_lengths(rows: Rows, canvases: Sequence[Canvas], config: ObjectiveConfig) -> list[int]:
    """How much of each row is encoded: without the encoder's loss nobody reads what comes after its last canvas."""
    if config.autoregressive_weight > 0:
        return list(rows.lengths)
    lengths = [0] * len(rows)
    for canvas in canvases:
        lengths[canvas.row] = max(lengths[canvas.row], canvas.start)
    return lengths


def _denoised(
    network: TrainableNetwork,
    rows: Rows,
    canvases: Sequence[Canvas],
    corrupted: Corrupted,
    config: ObjectiveConfig,
    seed: int,
    cache: Any,
) -> Tensor:
    """Final hidden states of the canvases, [M*C, H], by the scored pass."""
    places = [(canvas.row, canvas.start) for canvas in canvases]
    soft_MCH = None
    if config.self_conditioning_probability > 0:  # on every rank, whatever its coins: experts are shared
        with torch.no_grad():
            hidden = network.canvas_hidden(corrupted.noised_MC, places, cache, None)
        shown_M = self_conditioned(rows, canvases, config.self_conditioning_probability, seed)
        soft_MCH = network.soft_embedding(hidden).view(*corrupted.noised_MC.shape, -1)
        soft_MCH = soft_MCH * shown_M[:, None, None].to(hidden.dtype)
    return network.canvas_hidden(corrupted.noised_MC, places, cache, soft_MCH)


def self_conditioned(rows: Rows, canvases: Sequence[Canvas], probability: float, seed: int) -> Tensor:
    """Which canvases are shown the first pass's prediction: one coin an example, [M] bool."""
    samples_M = torch.tensor([rows.samples[canvas.row] for canvas in canvases])
    return to_device(to_uniforms(keyed_bits(seed, samples_M, COIN)) < probability, rows.tokens_T.device)


# -- what is scored, and how much it weighs ----------------------------------------------------------------------------


def prediction_shift(corrupted: Corrupted, prediction: str) -> Shift | None:
    """What turns logits into those of the denoiser, which the cross-entropy is of."""
    if prediction == "denoiser":
        return None
    return leave_one_out_shift(corrupted.noised_MC, corrupted.levels_M, corrupted.vocab_size)


def _canvas_weights(
    rows: Rows, canvases: Sequence[Canvas], corrupted: Corrupted, config: ObjectiveConfig, totals: Counts
) -> Tensor:
    """Weight of each canvas position, [M*C]."""
    noised_MC = corrupted.noised_MC
    if config.reduction == "token":
        parts_M, total = torch.ones(len(canvases)), totals.canvas_tokens
    else:
        scored = [0] * len(rows)
        for canvas in canvases:
            scored[canvas.row] += noised_MC.shape[1]
        parts_M, total = torch.tensor([scored[canvas.row] for canvas in canvases]), totals.examples
    if config.level_weighting == "reciprocal":
        parts_M = parts_M / reciprocal_weights(corrupted.levels_M, config.largest_level_weight)
    weights_M = _one_over(parts_M, total, noised_MC.device)
    return weights_M[:, None].expand(noised_MC.shape).flatten()


def _next_tokens(rows: Rows, config: ObjectiveConfig, totals: Counts) -> tuple[Tensor, Tensor, Tensor]:
    """Every pair of tokens inside a row: position of the first, id of the second, weight, [N]."""
    lengths_B = torch.tensor(rows.lengths)
    has_next_T = torch.ones(int(lengths_B.sum()), dtype=torch.bool).index_fill(0, lengths_B.cumsum(0) - 1, False)
    device = rows.tokens_T.device
    tokens_N = to_device(has_next_T.nonzero()[:, 0], device)
    if config.reduction == "token":
        weights_N = _one_over(torch.ones(1), totals.next_tokens, device).expand(len(tokens_N))
    else:
        pairs_B = lengths_B - 1
        weights_N = _one_over(pairs_B.repeat_interleave(pairs_B), totals.examples, device)
    return tokens_N, rows.tokens_T.index_select(0, tokens_N + 1), weights_N


def _one_over(numbers: Tensor, total: int | Tensor, device: torch.device) -> Tensor:
    """1 / (number * total) of numbers of the host, float32 on the device."""
    return (to_device(numbers.double(), device) * total).reciprocal().float()
