"""Where the repository is: what is not code (conf/, the scripts of slurm/) lies beside the package.

An installed wheel has the library only; the verbs and their configuration are used from a checkout.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
