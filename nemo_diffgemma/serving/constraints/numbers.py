"""Numbers of JSON between two bounds, as regular expressions.

Digits are bounded, so that every number is one that a double holds: 16 of a free number, 9 before and 6 behind the
point of a number with bounds.
"""

from __future__ import annotations

import json

from nemo_diffgemma.serving.constraints import characters

DIGITS = 16
BOUND = 10**9  # a bound of a number, and what stands for no bound
INTEGER = f"-?(?:0|[1-9][0-9]{{0,{DIGITS - 1}}})"
NUMBER = rf"-?(?:0|[1-9][0-9]{{0,{DIGITS - 1}}})(?:\.[0-9]{{1,{DIGITS}}})?(?:[eE][+-]?[0-9]{{1,2}})?"
_FRACTION = r"(?:\.[0-9]{1,6})?"
_NON_ZERO_FRACTION = r"\.(?:0{0,5}[1-9]|[0-9]{0,5}[1-9])"
_ZERO_FRACTION = r"(?:\.0{1,6})?"


def literal(value: float | bool | None) -> str:
    """One number, true, false or null, as Python's json writes it."""
    return characters.literal(json.dumps(value))


def integers(low: int | None, high: int | None) -> str | None:
    """Whole numbers from `low` to `high`, both included; None of either is no bound. None: there are none."""
    widest = 10 ** max(DIGITS, *(len(str(abs(bound))) for bound in (low, high) if bound is not None), 0) - 1
    low, high = -widest if low is None else low, widest if high is None else high
    parts = []
    if low < 0 and low <= high:
        parts.append(f"-(?:{_digits(max(1, -high), -low)})")
    if high >= 0 and low <= high:
        parts.append(_digits(max(0, low), high))
    return "|".join(parts) or None


def numbers(low: int | None, high: int | None, above: bool, below: bool) -> str | None:
    """Decimal numbers between whole bounds; `above` and `below` say that a bound itself is outside. None: none."""
    bottom, top = -BOUND if low is None else low, BOUND if high is None else high
    parts = []
    if bottom < 0:  # the mirror image, from 0 upwards
        negative = _decimals(max(0, -top), -bottom, below and top <= 0, above)
        parts += [f"-(?:{negative})"] if negative else []
    if top > 0 or (top == 0 and bottom <= 0):
        positive = _decimals(max(0, bottom), top, above and bottom >= 0, below)
        parts += [positive] if positive else []
    return "|".join(parts) or None


def _decimals(low: int, high: int, above: bool, below: bool) -> str | None:
    """As `numbers`, from 0 upwards."""
    if low > high or (low == high and (above or below)):
        return None
    if low == high:
        return f"{low}{_ZERO_FRACTION}"
    parts = [f"{low}{_NON_ZERO_FRACTION if above else _FRACTION}"]
    if low + 1 <= high - 1:
        parts.append(f"(?:{_digits(low + 1, high - 1)}){_FRACTION}")
    if not below:
        parts.append(f"{high}{_ZERO_FRACTION}")
    return "|".join(parts)


def _digits(low: int, high: int) -> str:
    """Whole numbers from 0 upwards, `low <= high`, by their number of digits."""
    parts = []
    for length in range(len(str(low)), len(str(high)) + 1):
        first, last = max(low, 10 ** (length - 1) if length > 1 else 0), min(high, 10**length - 1)
        parts.append(_equally_long(str(first), str(last)))
    return "|".join(parts)


def _equally_long(low: str, high: str) -> str:
    rest = len(low) - 1
    if not low or (set(low[1:]) <= {"0"} and set(high[1:]) <= {"9"}):
        return "" if not low else _digit(low[0], high[0]) + (f"[0-9]{{{rest}}}" if rest else "")
    if low[0] == high[0]:
        return low[0] + f"(?:{_equally_long(low[1:], high[1:])})"
    parts = [low[0] + f"(?:{_equally_long(low[1:], '9' * rest)})"]
    if int(low[0]) + 1 <= int(high[0]) - 1:
        parts.append(_digit(str(int(low[0]) + 1), str(int(high[0]) - 1)) + f"[0-9]{{{rest}}}")
    parts.append(high[0] + f"(?:{_equally_long('0' * rest, high[1:])})")
    return "|".join(parts)


def _digit(low: str, high: str) -> str:
    return low if low == high else f"[{low}-{high}]"
