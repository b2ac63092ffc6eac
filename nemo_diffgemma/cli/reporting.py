"""The one error policy of every command.

A `UserError` is one paragraph on standard error and exit code 2, which tells a scheduler not to try again. A fault of
the machine (`OSError`: a full disk; a child or another rank that died) is one paragraph and exit code 1. Everything
else is a defect: its traceback and exit code 1. If several ranks report the same error, one prints it.
"""

from __future__ import annotations

import json
import os
import sys
import textwrap
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

from nemo_diffgemma.cli.child_process import ChildCrash
from nemo_diffgemma.errors import UserError
from nemo_diffgemma.parallel import launcher

USER_ERROR = 2
HANDOVER = "NEMO_DIFFGEMMA_HANDOVER"  # folder in which a parent looks for error-<rank>.json
_PATIENCE = 10.0  # seconds in which rank 0, which mostly has the same to say, says it and its launcher ends us


def is_user_error(error: BaseException) -> bool:
    """Whether the user can mend it, and so whether a restart would meet it again."""
    return isinstance(error, UserError)


def exit_code_of(error: BaseException) -> int:
    """2 for a user's error, else 1."""
    return USER_ERROR if is_user_error(error) else 1


def exit_after(error: Exception) -> NoReturn:
    """Report `error`, and leave with its exit code."""
    report(error)
    raise SystemExit(exit_code_of(error))


def print_error(text: str) -> None:
    """One paragraph on standard error."""
    print(textwrap.fill(f"error: {text}", 120, break_long_words=False, break_on_hyphens=False), file=sys.stderr)


def report(error: Exception) -> None:
    """Print an error on standard error, or hand it to the parent, which prints one for all ranks."""
    explained = _is_explained(error)
    rank = launcher.rank()
    report = {
        "rank": rank,
        "time": time.time(),
        "exit_code": exit_code_of(error),
        "message": str(error) if explained else None,
        "traceback": "".join(traceback.format_exception(error)),
    }
    if HANDOVER in os.environ:
        (Path(os.environ[HANDOVER]) / f"error-{rank}.json").write_text(json.dumps(report))
        return
    if rank and explained:
        from nemo_diffgemma.parallel.agreement import is_known_to_all

        if is_known_to_all(error):
            return
        time.sleep(_PATIENCE)
    print_report(report)


def _is_explained(error: Exception) -> bool:
    """Whether its message is enough; a defect needs its traceback."""
    from nemo_diffgemma.parallel.agreement import OtherRankFailure

    return isinstance(error, UserError | OSError | ChildCrash | OtherRankFailure)


def print_report(report: dict[str, Any]) -> None:
    """Print a report on standard error: its message, or the traceback of a defect."""
    if report["message"] is None or "HYDRA_FULL_ERROR" in os.environ:
        print(report["traceback"], end="", file=sys.stderr)
    if report["message"] is not None:
        print_error(report["message"])


def reports(folder: Path) -> list[dict[str, Any]]:
    """Reports that the ranks have handed over: users' errors first, each kind by time."""
    handed = [json.loads(file.read_text()) for file in folder.glob("error-*.json")]
    return sorted(handed, key=lambda one: (one["exit_code"] != USER_ERROR, one["time"]))
