"""Random numbers that are a function of (seed, sample, canvas, step, position) alone.

No generator state: whatever the batch, the layout or the order of evaluation, the same key gives the same numbers, on
every device. SplitMix64 (Steele, Lea, Flood 2014) as a hash in wrapping int64 arithmetic, which torch has everywhere.

Shapes: B rows, C canvas positions, N denoising steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nemo_diffgemma.diffusion.seeds import check_seed
from nemo_diffgemma.errors import UserError
from nemo_diffgemma.transfer import to_device

_GOLDEN, _MIX1, _MIX2 = (
    0x9E3779B97F4A7C15 - (1 << 64),
    0xBF58476D1CE4E5B9 - (1 << 64),
    0x94D049BB133111EB - (1 << 64),
)
# What a number is for; part of the key, so that no two uses share numbers.
INITIAL, UNIFORM, REPLACEMENT, LEVEL, CORRUPTED, CORRUPTION, COIN, CHOICE, ROTATION = range(9)
DROPOUT = 64  # of adapters


class Noise(Protocol):
    """What generation draws. `canvas` counts from 0; `step` is the number of steps remaining, N down to 1."""

    def initial(self, canvas: int) -> Tensor:
        """First ids of a canvas, [B, C]."""

    def uniforms(self, canvas: int, step: int) -> Tensor:
        """Where the inverse CDF is read, [B, C] in [0, 1)."""

    def replacements(self, canvas: int, step: int) -> Tensor:
        """Ids for the positions that were not accepted, [B, C]."""


class CanvasNoise(NamedTuple):
    """What the steps of one canvas draw: first ids [B, C]; uniforms and replacements [N, B, C], first step first."""

    initial: Tensor
    uniforms: Tensor
    replacements: Tensor

    @staticmethod
    def of(noise: Noise, canvas: int, steps: int, device: torch.device) -> CanvasNoise:
        """The numbers of a canvas on `device`, drawn at once where the noise can, in one transfer each."""
        if isinstance(noise, KeyedNoise):
            drawn = noise.of_canvas(canvas, steps)
        else:
            remaining = range(steps, 0, -1)
            uniforms, replacements = (
                torch.stack([draw(canvas, step) for step in remaining]) for draw in (noise.uniforms, noise.replacements)
            )
            drawn = CanvasNoise(noise.initial(canvas), uniforms, replacements)
        return CanvasNoise(*(to_device(tensor, device) for tensor in drawn))


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = x + _GOLDEN
    x = (x ^ _shift(x, 30)) * _MIX1
    x = (x ^ _shift(x, 27)) * _MIX2
    return x ^ _shift(x, 31)


def keyed_bits(seed: Tensor | int, *key: Tensor | int) -> Tensor:
    """64 random bits as int64 for every broadcast combination of the key's parts. Raises `UserError` for the seed."""
    if isinstance(seed, int):
        check_seed(seed)
    state: Tensor | int = 0  # an int as long as no part is a tensor: nothing is copied to a device
    for part in (seed, *key):
        mixed = _mix(part) if isinstance(part, Tensor) else _mix_int(part)
        state = state ^ mixed
        state = _mix(state) if isinstance(state, Tensor) else _mix_int(state)
    return state if isinstance(state, Tensor) else torch.tensor(state)


def _mix_int(value: int) -> int:
    return int(_mix(torch.tensor(value, dtype=torch.int64)))


def to_uniforms(bits: Tensor) -> Tensor:
    """float32 in [0, 1) from the upper 24 bits."""
    return _shift(bits, 40).to(torch.float32) * 2.0**-24


def crossed_uniforms(rows_N: Tensor, columns_M: Tensor) -> Tensor:
    """[N, M] float32 in [0, 1) of every pair of 64 random bits, [N] and [M] int64 that `keyed_bits` has made."""
    return to_uniforms(_mix(rows_N[:, None] ^ columns_M))


def to_ids(bits: Tensor, vocab_size: int) -> Tensor:
    """Ids uniform over the vocabulary: the upper 32 bits scaled (bias below V / 2^32)."""
    return _shift(_shift(bits, 32) * vocab_size, 32)


class KeyedNoise:
    """Noise of B rows; row r is keyed by (seeds[r], samples[r]) and knows nothing of the other rows."""

    def __init__(
        self,
        seeds: Sequence[int],
        samples: Sequence[int],
        canvas_length: int,
        vocab_size: int,
        device: torch.device | None = None,
    ) -> None:
        for seed in seeds:
            check_seed(seed)
        keys = torch.tensor([list(seeds), list(samples)], dtype=torch.int64)[..., None]
        self._seeds, self._samples = (keys if device is None else to_device(keys, device)).unbind()
        self._positions = torch.arange(canvas_length, device=device)
        self._vocab_size = vocab_size

    @staticmethod
    def for_rows(
        seed: int | Sequence[int], rows: int, canvas_length: int, vocab_size: int, device: torch.device | None = None
    ) -> KeyedNoise:
        """An int keys row r by (seed, r); one int a row keys each as if it were alone, by (seed[r], 0).

        Raises `UserError` for another number of seeds, or one that has more than 64 bits.
        """
        if isinstance(seed, int):
            return KeyedNoise([seed] * rows, range(rows), canvas_length, vocab_size, device)
        if len(seed) != rows:
            raise UserError(f"{len(seed)} seeds for {rows} rows; give one int, or one int for each row")
        return KeyedNoise(list(seed), [0] * rows, canvas_length, vocab_size, device)

    def of_canvas(self, canvas: int, steps: int) -> CanvasNoise:
        """What `steps` denoising steps of a canvas draw, on the device of this noise."""
        remaining = torch.arange(steps, 0, -1, device=self._positions.device)[:, None, None]
        return CanvasNoise(
            self.initial(canvas),
            to_uniforms(self._bits(UNIFORM, canvas, remaining)),
            to_ids(self._bits(REPLACEMENT, canvas, remaining), self._vocab_size),
        )

    def _bits(self, purpose: int, canvas: int, step: int | Tensor) -> Tensor:
        return keyed_bits(self._seeds, self._samples, purpose, canvas, step, self._positions)

    def initial(self, canvas: int) -> Tensor:
        return to_ids(self._bits(INITIAL, canvas, 0), self._vocab_size)

    def uniforms(self, canvas: int, step: int) -> Tensor:
        return to_uniforms(self._bits(UNIFORM, canvas, step))

    def replacements(self, canvas: int, step: int) -> Tensor:
        return to_ids(self._bits(REPLACEMENT, canvas, step), self._vocab_size)
