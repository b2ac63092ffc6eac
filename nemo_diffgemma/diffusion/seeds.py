"""Seeds of requests and of rows, without torch."""

from __future__ import annotations

from nemo_diffgemma.errors import UserError


def check_seed(seed: int) -> None:
    """Raise `UserError` unless the seed is a signed integer of 64 bits."""
    if not -(1 << 63) <= seed < 1 << 63:
        raise UserError(f"seed={seed}; expected an integer from -2^63 to 2^63 - 1")
