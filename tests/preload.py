"""What commands and ranks import before anything else, once for all of them: see `tests/commands.py`."""

import sys

import nemo_diffgemma.training.run  # noqa: F401

sys.stdout.flush()  # what is in the buffers now, every fork would print
sys.stderr.flush()
