"""Large tensors that come and go cost the kernel nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

from nemo_diffgemma.repository import ROOT

PAGES = """
import resource, sys
import numpy as np
from nemo_diffgemma.serving.freed_memory import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()

def round():
    large = np.ones(10_000_000)
    return large + np.ones(5_000_000).sum()

for _ in range(3):
    round()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    round()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def pages(how: str) -> int:
    """That the kernel cleared in ten rounds of three arrays."""
    done = subprocess.run([sys.executable, "-c", PAGES, how], cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's")
def test_freed_memory_is_used_again():
    assert pages("kept") < 20 < pages("as it is")
