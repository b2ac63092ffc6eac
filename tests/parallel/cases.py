"""Jobs for the pool of ranks: one of them fails."""

from __future__ import annotations

from typing import Any

from nemo_diffgemma.errors import ConfigurationError, UserError
from nemo_diffgemma.parallel.agreement import all_or_none, gather, on_rank_zero

ERRORS = {
    "user": lambda: ConfigurationError("give optim.lr=1"),
    "disk": lambda: OSError(28, "No space left on device"),
    "defect": lambda: KeyError("shape"),
    "value": lambda: ValueError("zip() argument 2 is shorter"),  # Python's own: nothing that a user has typed
}


def outcomes(form: str, kinds: dict[int, str]) -> list[tuple[str, bool, str]]:
    """Class, whether it is the user's, and text of what every rank sees when these ranks fail."""
    from torch import distributed as dist

    kind = kinds.get(dist.get_rank())
    try:
        _fail(form, None if kind is None else ERRORS[kind]())
    except Exception as error:
        return gather((type(error).__name__, isinstance(error, UserError), str(error)))
    return gather(("no error", False, ""))


def _fail(form: str, error: Exception | None) -> None:
    def work() -> Any:
        if error is not None:
            raise error

    if form == "on_rank_zero":
        on_rank_zero(work)
    else:
        with all_or_none():
            work()
