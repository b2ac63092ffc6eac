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

from nemo_diffgemma.diffusion.constraint import Allowed
from nemo_diffgemma.diffusion.noise import INITIAL, REPLACEMENT, UNIFORM, keyed_bits, to_ids, to_uniforms
from nemo_diffgemma.diffusion.sampler import accept
from nemo_diffgemma.diffusion.sampler_config import SamplerConfig
from nemo_diffgemma.model.vocabulary import Statistics
from nemo_diffgemma.transfer import to_device


@dataclass(frozen=True)
class Turn:
    """One step of the canvas in a slot: `step` counts from 0, as `canvas` does. `locked` are ids that stand in it."""

    slot: int
    length: int
    canvas: int
    step: int
    seed: int
    sampler: SamplerConfig
    locked: Sequence[int] | None = None  # one a cell, -1 where none stands

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
        self.locked_N: Tensor | None = None  # -1 where none stands; None: nowhere
        if any(turn.locked for turn in turns):
            ids = [turn.locked or [-1] * turn.length for turn in turns]
            self.locked_N = to_device(torch.tensor([id for turn in ids for id in turn]), device)

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
        self.watched = make(count * width, dtype=torch.long)  # what must not change for it to be done
        self.unchanged = make(count, dtype=torch.long)  # steps before the last that had the same
        self.done = make(count, dtype=torch.bool)
        self.guided = make(count, dtype=torch.bool)  # by its constraint
        self.live = make(count, dtype=torch.long)  # steps until it was done

    def cells(self, turns: Sequence[Turn]) -> Cells:
        return Cells(turns, self.width, self.device)

    def inputs(self, cells: Cells, vocab_size: int) -> tuple[Tensor, Tensor]:
        """Ids [N] and signals [N, H] of a step; a canvas that begins is noise, and has no signal."""
        first_N = cells.is_first_N
        tokens_N = torch.where(first_N, cells.initial(vocab_size), self.canvas.index_select(0, cells.index_N))
        if cells.locked_N is not None:
            tokens_N = torch.where(cells.locked_N < 0, tokens_N, cells.locked_N)
        soft_NH = self.soft.index_select(0, cells.index_N).masked_fill_(first_N[:, None], 0.0)
        return tokens_N, soft_NH

    def settled(self, slot: int, length: int) -> Tensor:
        """Tokens of a canvas after its last step, [length]."""
        return self.best[slot * self.width : slot * self.width + length]

    def advance(self, cells: Cells, found: Statistics, allowed: Allowed | None, vocab_size: int) -> list[Outcome]:
        """Keep the result of a step; the rules are those of `diffusion.sampler` and `diffusion.progress`.

        `allowed` is what constraints of some of the turns allow, [N], and of each turn whether that is its arg-max.
        """
        assert found.sample_N is not None and found.soft_embedding_NH is not None
        replacements_N = cells.replacements(vocab_size)
        self.soft.index_copy_(0, cells.index_N, found.soft_embedding_NH)
        allowed_N = found.argmax_N if allowed is None else allowed.tokens
        outcomes = []
        for length, turns, offsets in cells.by_length():
            chosen = to_device(torch.tensor(offsets), self.device)[:, None] + torch.arange(length, device=self.device)
            argmax, best, entropy, sample, other = (
                x[chosen] for x in (found.argmax_N, allowed_N, found.entropy_N, found.sample_N, replacements_N)
            )
            accepted = accept(entropy, cells.bound_N1[chosen[:, 0]])
            group = _Group(cells, turns, cells.index_N[chosen], self.device)
            outcome, guided = self._progress(group, argmax, best, entropy, accepted, allowed)
            canvas = torch.where(accepted, torch.where(guided[:, None], best, sample), other)
            self.canvas.index_copy_(0, group.index.flatten(), canvas.flatten())
            outcomes.append(outcome)
        return outcomes

    def _progress(
        self,
        group: _Group,
        argmax: Tensor,
        best: Tensor,
        entropy: Tensor,
        accepted: Tensor,
        allowed: Allowed | None,
    ) -> tuple[Outcome, Tensor]:
        """Whether the canvases of one length are done, what they are so far, and which their constraint guides."""
        slot, is_first, index = group.slot, group.is_first, group.index
        done, guided = self.done[slot] & ~is_first, self.guided[slot] & ~is_first
        before, watched_before = self.best[index], self.watched[index]
        watched = torch.where(done[:, None], before, torch.where(guided[:, None], best, argmax))
        best = torch.where(done[:, None], before, best)
        same = (watched == watched_before).all(-1) & ~is_first
        unchanged = torch.where(same, self.unchanged[slot] + 1, 0)
        live = torch.where(is_first, 0, self.live[slot]) + ~done
        finite = entropy.isfinite().all(-1) | done
        stable = (unchanged >= group.wanted) & (entropy.mean(-1) < group.threshold)
        if allowed is None:
            done = done | stable
        else:
            done = done | (stable & (guided | allowed.is_argmax[group.turn]))
            guided = guided | (stable & ~done)
        states = ((self.done, done), (self.guided, guided), (self.unchanged, unchanged), (self.live, live))
        for state, value in states:
            state.index_copy_(0, slot, value)
        self.best.index_copy_(0, index.flatten(), best.flatten())
        self.watched.index_copy_(0, index.flatten(), watched.flatten())
        return Outcome(group.turns, done, finite, live, best, accepted, entropy), guided


class _Group:
    """The turns of one canvas length, and the numbers of each on the device, [m]; their cells in the slots [m, L]."""

    def __init__(self, cells: Cells, turns: list[int], index: Tensor, device: torch.device) -> None:
        of = [cells.turns[turn] for turn in turns]
        numbers = [
            (turn, one.slot, one.step == 0, one.sampler.stability_threshold)
            for turn, one in zip(turns, of, strict=True)
        ]
        self.turn, self.slot, first, self.wanted = to_device(torch.tensor(numbers), device).unbind(1)
        self.is_first, self.turns, self.index = first.bool(), turns, index
        self.threshold = to_device(torch.tensor([one.sampler.confidence_threshold for one in of]), device)
