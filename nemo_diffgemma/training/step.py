"""The passes of an optimizer step over a replica's share of the global batch, and what they tell of it.

    sums = accumulate(network, rows, config, seed, global_batch_size=64, backward=then)
    sums.read()             # waits for the losses, on a GPU not for the last backward pass

What is told goes through one sum over all ranks, on the device, and one copy to the host: losses, losses and accuracy
by noise level, loads of the experts, FLOPs. Losses are means over the rows of all replicas, also where these hold the
same ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_diffgemma.diffusion.levels import BINS
from nemo_diffgemma.diffusion.objective import (
    Canvas,
    Counts,
    ObjectiveConfig,
    Scored,
    choose_canvases,
    context_lengths,
    corrupt,
    count,
    objective,
)
from nemo_diffgemma.diffusion.rows import Rows
from nemo_diffgemma.errors import ConfigurationError
from nemo_diffgemma.model.adapters import DropoutNoise
from nemo_diffgemma.parallel.groups import device, process_groups
from nemo_diffgemma.training import flops
from nemo_diffgemma.transfer import HostCopy, to_device


@dataclass(frozen=True)
class StepNumbers:
    """What the passes of a step tell, of all replicas. Levels are named by the middles of their intervals."""

    loss: float
    diffusion: float
    autoregressive: float
    tokens: float  # of rows
    canvas_tokens: float  # scored
    flops: float
    loss_by_level: dict[str, float]  # levels that no canvas of the step had are left out
    accuracy_by_level: dict[str, float]
    canvas_accuracy: float
    loads: list[list[float]]  # tokens of each expert, by layer


class StepSums(HostCopy):
    """The same, on its way to the host."""

    def __init__(self, values: Tensor, layers: int, experts: int) -> None:
        super().__init__(values)
        self._layers, self._experts = layers, experts

    def read(self) -> StepNumbers:
        """Waits until the passes have them."""
        values: Iterator[float] = iter(self.numbers())
        loss, diffusion, autoregressive, tokens, canvas_tokens, flops = itertools.islice(values, 6)
        of_level = [list(itertools.islice(values, len(BINS))) for _ in range(3)]
        measured = [
            (str(level), summed / count, correct / count)
            for level, summed, correct, count in zip(BINS, *of_level, strict=True)
            if count
        ]
        return StepNumbers(
            loss,
            diffusion,
            autoregressive,
            tokens,
            canvas_tokens,
            flops,
            {level: mean for level, mean, _ in measured},
            {level: accuracy for level, _, accuracy in measured},
            sum(of_level[1]) / max(1.0, sum(of_level[2])),
            [list(itertools.islice(values, self._experts)) for _ in range(self._layers)],
        )


def accumulate(
    network: Any,
    batch: Rows,
    config: ObjectiveConfig,
    seed: int,
    *,
    global_batch_size: int,
    micro_batch_size: int = 0,
    weight_gradients: float = 1.0,
    backward: Callable[[Scored, bool], None] | None = None,
) -> StepSums:
    """Run the micro-batches of `batch`; with `backward` each is handed on, with whether it is the last. Collective."""
    model = network.model_config
    length = model.canvas_length
    parts = [
        (rows, choose_canvases(rows, length, config.canvases_per_example, seed))
        for rows in micro_batches(batch, micro_batch_size)
    ]
    counts = sum((count(rows, canvases, length) for rows, canvases in parts), Counts(0, 0, 0))
    work = sum(_flops(model, rows, canvases, config, weight_gradients) for rows, canvases in parts)
    of_all = to_device(torch.tensor([*astuple(counts), work], dtype=torch.double), device())
    dist.all_reduce(of_all, group=process_groups().dp_cp)
    totals = Counts(*of_all[:3].unbind())
    losses = torch.zeros(3, dtype=torch.float64, device=device())
    by_level = torch.zeros(3, len(BINS), dtype=torch.float64, device=device())
    with _counting_loads(network) as loads:
        for index, (rows, canvases) in enumerate(parts):
            corrupted = corrupt(
                rows,
                canvases,
                length,
                model.vocab_size,
                seed,
                noise_floor=config.noise_floor,
                spread_over=global_batch_size if config.spread_levels else 0,
            )
            network.dropout_of = DropoutNoise(seed, tuple(rows.samples))
            terms = (network, rows, canvases, corrupted, config, seed, totals)
            scored = Scored(*terms) if backward else None
            losses += torch.stack([part.double() for part in (scored.loss if scored else objective(*terms))])
            if scored:
                by_level += scored.by_level
            last = index + 1 == len(parts)
            if last:  # ahead of the last backward, so that nobody waits for that one
                sums = _sums(losses, of_all, by_level, loads)
            if scored and backward:
                backward(scored, last)
    return sums


@contextmanager
def _counting_loads(network: Any) -> Iterator[Tensor]:
    """Tokens that passes with gradient send to each expert meanwhile, [layers, experts], of this rank's tokens."""
    model = network.model_config
    shape = (model.num_hidden_layers, model.num_experts)
    network.expert_loads = torch.zeros(shape, dtype=torch.long, device=device())
    try:
        yield network.expert_loads
    finally:
        network.expert_loads = None


def _sums(losses: Tensor, of_all: Tensor, by_level: Tensor, loads: Tensor) -> StepSums:
    """Sums over all ranks. Ranks of a replica have equal losses, which one of them adds, and tokens of their own."""
    shares = torch.cat([losses, by_level.flatten()])
    if process_groups().tp.rank() > 0:
        shares = torch.zeros_like(shares)
    values = torch.cat([shares, loads.flatten().double()])
    dist.all_reduce(values)
    examples, canvas_tokens, next_tokens, work = of_all
    totals = torch.stack([next_tokens + examples, canvas_tokens, work])
    return StepSums(torch.cat([values[:3], totals, values[3:]]), *loads.shape)


def _flops(
    model: Any, rows: Rows, canvases: Sequence[Canvas], config: ObjectiveConfig, weight_gradients: float
) -> float:
    return flops.of_pass(
        model,
        context_lengths(rows, canvases, config),
        [canvas.start for canvas in canvases],
        sum(length - 1 for length in rows.lengths) if config.autoregressive_weight > 0 else 0,
        config.self_conditioning_probability,
        weight_gradients,
    )


def micro_batches(batch: Rows, size: int) -> list[Rows]:
    """The rows of a batch as they were packed, else `size` at a time (0: all)."""
    if batch.passes:
        return batch.split(batch.passes)
    size = size or len(batch)
    if len(batch) % size:
        raise ConfigurationError(
            f"data.micro_batch_size={size} does not divide the {len(batch)} examples that each replica has of a batch; "
            "use a divisor, or 0 for all at once"
        )
    return batch.split(size)
