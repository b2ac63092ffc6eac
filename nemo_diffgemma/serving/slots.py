"""What a denoising step keeps of each running sequence on the device, in slots at fixed addresses.

A pass takes any slots, of any canvas lengths: their cells (positions of canvases) are gathered into one flat list, and
its results go back. What is decided for each sequence is decided from its own cells alone.

Shapes: S slots of C cells, N cells of a pass in the order of its canvases, m slots of equal canvas length L, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_diffgemma.diffusion.noise import INITIAL, REPLACEMENT, UNIFORM, keyed_bits, to_ids, to_uniforms
from nemo_diffgemma.diffusion.sampler import accept
from nemo_diffgemma.diffusion.sampler_config import SamplerConfig
from nemo_diffgemma.transfer import to_device


@dataclass(frozen=True)
class Turn:
    """One step of the canvas in a slot: `step` counts from 0, as `canvas` does."""

    slot: int
    length: int
    canvas: int
    step: int
    seed: int
    sampler: SamplerConfig

    @property
    def remaining(self) -> int:
        """Steps that remain, this one included: what noise is keyed by."""
        return self.sampler.max_denoising_steps - self.step


class Cells:
    """The cells of a pass, and the numbers of its turns, on the device."""

    def __init__(self, turns: Sequence[Turn], width: int, device: torch.device) -> None:
        self.turns = turns
        lengths = torch.tensor([turn.length for turn in turns])
        turn_N = torch.arange(len(turns)).repeat_interleave(lengths)
        offsets = lengths.cumsum(0) - lengths
        position_N = torch.arange(len(turn_N)) - offsets[turn_N]
        whole = torch.tensor(
            [(turn.slot, turn.canvas, turn.remaining, turn.seed, turn.step == 0) for turn in turns], dtype=torch.int64
        )
        slot_N, canvas_N, remaining_N, seed_N, first_N = whole[turn_N].unbind(1)
        numbers = torch.stack([slot_N * width + position_N, position_N, canvas_N, remaining_N, seed_N, first_N])
        self.index_N, self._position_N, self._canvas_N, self._remaining_N, self._seed_N, first_N = to_device(
            numbers, device
        )
        self.is_first_N = first_N.bool()
        # as numbers of the host, rounded where `diffusion.generate` rounds them
        reals = [(turn.sampler.temperature(turn.remaining), turn.sampler.entropy_bound) for turn in turns]
        numbers = to_device(torch.tensor(reals, dtype=torch.float64)[turn_N], device)
        self.temperature_N1, self.bound_N1 = numbers[:, :1], numbers[:, 1:].float()

    def initial(self, vocab_size: int) -> Tensor:
        """First ids of the canvases, [N]."""
        return to_ids(keyed_bits(self._seed_N, 0, INITIAL, self._canvas_N, 0, self._position_N), vocab_size)

    def _bits(self, purpose: int) -> Tensor:
        return keyed_bits(self._seed_N, 0, purpose, self._canvas_N, self._remaining_N, self._position_N)

    def uniforms(self) -> Tensor:
        """Where the inverse CDF is read, [N]."""
        return to_uniforms(self._bits(UNIFORM))

    def replacements(self, vocab_size: int) -> Tensor:
        """Ids for what is not accepted, [N]."""
        return to_ids(self._bits(REPLACEMENT), vocab_size)

    def by_length(self) -> list[tuple[int, list[int], list[int]]]:
        """(length, turns, first cells) of the turns of each canvas length."""
        groups: dict[int, tuple[list[int], list[int]]] = {}
        offset = 0
        for index, turn in enumerate(self.turns):
            turns, offsets = groups.setdefault(turn.length, ([], []))
            turns.append(index)
            offsets.append(offset)
            offset += turn.length
        return [(length, turns, offsets) for length, (turns, offsets) in groups.items()]


@dataclass(frozen=True)
class Outcome:
    """What a step found, for the turns of one canvas length: [m] and [m, L]."""

    turns: list[int]
    done: Tensor
    finite: Tensor
    live: Tensor
    best: Tensor
    accepted: Tensor
    entropy: Tensor


class Slots:
    """State of `count` canvases of up to `width` cells."""

    def __init__(self, count: int, width: int, hidden: int, dtype: torch.dtype, device: torch.device) -> None:
        def make(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.width, self.device = width, device
        self.canvas = make(count * width, dtype=torch.long)  # noised ids
        self.best = make(count * width, dtype=torch.long)  # arg-max of the last step, or of that which settled it
        self.soft = make(count * width, hidden, dtype=dtype)  # self-conditioning signal
        self.unchanged = make(count, dtype=torch.long)  # steps before the last that had its arg-max
        self.done = make(count, dtype=torch.bool)
        self.live = make(count, dtype=torch.long)  # steps until it was done

    def cells(self, turns: Sequence[Turn]) -> Cells:
        return Cells(turns, self.width, self.device)

    def inputs(self, cells: Cells, vocab_size: int) -> tuple[Tensor, Tensor]:
        """Ids [N] and signals [N, H] of a step; a canvas that begins is noise, and has no signal."""
        first_N = cells.is_first_N
        tokens_N = torch.where(first_N, cells.initial(vocab_size), self.canvas.index_select(0, cells.index_N))
        soft_NH = self.soft.index_select(0, cells.index_N).masked_fill_(first_N[:, None], 0.0)
        return tokens_N, soft_NH

    def settled(self, slot: int, length: int) -> Tensor:
        """Tokens of a canvas after its last step, [length]."""
        return self.best[slot * self.width : slot * self.width + length]

    def advance(
        self, cells: Cells, argmax_N: Tensor, sample_N: Tensor, entropy_N: Tensor, soft_NH: Tensor, vocab_size: int
    ) -> list[Outcome]:
        """Keep the result of a step; the rules are those of `diffusion.sampler` and `diffusion.progress`."""
        replacements_N = cells.replacements(vocab_size)
        self.soft.index_copy_(0, cells.index_N, soft_NH)
        outcomes = []
        for length, turns, offsets in cells.by_length():
            chosen = to_device(torch.tensor(offsets), self.device)[:, None] + torch.arange(length, device=self.device)
            entropy, sample, argmax, other = (x[chosen] for x in (entropy_N, sample_N, argmax_N, replacements_N))
            accepted = accept(entropy, cells.bound_N1[chosen[:, 0]])
            index = cells.index_N[chosen]
            self.canvas.index_copy_(0, index.flatten(), torch.where(accepted, sample, other).flatten())
            outcomes.append(self._progress(cells, length, turns, index, argmax, entropy, accepted))
        return outcomes

    def _progress(
        self,
        cells: Cells,
        length: int,
        turns: list[int],
        index: Tensor,
        argmax: Tensor,
        entropy: Tensor,
        accepted: Tensor,
    ) -> Outcome:
        """Whether the canvases of one length are done, and what they are so far."""
        of = [cells.turns[turn] for turn in turns]
        numbers = [(turn.slot, turn.step == 0, turn.sampler.stability_threshold) for turn in of]
        slot, first, wanted = to_device(torch.tensor(numbers), self.device).unbind(1)
        is_first = first.bool()
        threshold = to_device(torch.tensor([turn.sampler.confidence_threshold for turn in of]), self.device)
        done = self.done[slot] & ~is_first
        before = self.best[index]
        best = torch.where(done[:, None], before, argmax)
        same = (best == before).all(-1) & ~is_first
        unchanged = torch.where(same, self.unchanged[slot] + 1, 0)
        live = torch.where(is_first, 0, self.live[slot]) + ~done
        finite = entropy.isfinite().all(-1) | done
        done = done | ((unchanged >= wanted) & (entropy.mean(-1) < threshold))
        for state, value in ((self.done, done), (self.unchanged, unchanged), (self.live, live)):
            state.index_copy_(0, slot, value)
        self.best.index_copy_(0, index.flatten(), best.flatten())
        return Outcome(turns, done, finite, live, best, accepted, entropy)
