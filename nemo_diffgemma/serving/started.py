"""A server of a checkpoint for as long as somebody needs it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from nemo_diffgemma.errors import UserError
from nemo_diffgemma.repository import ROOT


@contextmanager
def serving(checkpoint: str, *options: str) -> Iterator[str]:
    """`launch/serve.py` with the checkpoint and `options` -> its address. Raises `UserError` where it does not start.

    It says what it has to say on standard error, and is drained at the end. Ctrl-C in a terminal does not reach it
    beside us: a second signal would end it in the middle.
    """
    command = [sys.executable, str(ROOT / "launch" / "serve.py"), f"checkpoint={checkpoint}", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, process_group=0)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise UserError(f"the server did not start (exit code {process.wait()}); see above")
        yield json.loads(line)["url"]
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate()
