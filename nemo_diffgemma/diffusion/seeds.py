"""Seeds of requests and of rows, without torch."""

from __future__ import annotations

import hashlib

from nemo_diffgemma.errors import UserError


def check_seed(seed: int) -> None:
    """Raise `UserError` unless the seed is a signed integer of 64 bits."""
    if not -(1 << 63) <= seed < 1 << 63:
        raise UserError(f"seed={seed}; expected an integer from -2^63 to 2^63 - 1")


def seed_of(name: str) -> int:
    """A seed that is a function of a name: 56 bits of its hash."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
