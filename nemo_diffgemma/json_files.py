"""JSON files that others wrote: read as objects, with errors that name the file and what was expected."""

from __future__ import annotations

import json
import reprlib
from pathlib import Path
from typing import Any

from nemo_diffgemma.errors import UserError

_BRIEF = reprlib.Repr(maxstring=80, maxother=80, maxlong=40, maxlevel=3)


def read_object(file: Path, error: type[UserError] = UserError) -> dict[str, Any]:
    """The JSON object in `file`. Raises `error` for anything else, and OSError where the file cannot be read."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as fault:
        raise error(
            f"{file} is not UTF-8 text (byte {fault.start} is {fault.object[fault.start]:#04x}); copy it again from "
            "the checkpoint, or save it as UTF-8"
        ) from None
    except (ValueError, RecursionError) as fault:  # a number of 5000 digits is a plain ValueError
        raise error(f"{file} is not valid JSON ({fault}); copy it again from the checkpoint") from None
    if not isinstance(value, dict):
        raise error(
            f"{file} is damaged: it holds {brief(value)}, expected a JSON object {{...}}; copy it again from the "
            "checkpoint"
        )
    return value


def brief(value: Any) -> str:
    """`repr` in one short line, whatever a file holds."""
    return " ".join(_BRIEF.repr(value).split())


def is_whole(value: Any, least: int = 0, most: int = 2**31 - 1) -> bool:
    """Whether `value` is an integer (no bool) within these bounds."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_number(value: Any) -> bool:
    """Whether `value` is an integer or float (no bool) that float32 can hold: finite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 3.4e38
