"""Paths of the repository: conf/ and the scripts of slurm/ lie beside the package.

An installed wheel has the library only; the verbs and their configuration are used from a checkout.
"""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"


def user_path(text: str | Path) -> Path:
    """A path as a user types it: `~` is home, and `~name` where nobody is called so is a name like any other."""
    return Path(os.path.expanduser(text))
