"""The scripts of launch/ as modules, without that folder or a package of its name on the path."""

import sys
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType

from nemo_diffgemma.repository import ROOT


@cache
def load(verb: str) -> ModuleType:
    """`launch/<verb>.py`."""
    spec = spec_from_file_location(f"launch_{verb}", ROOT / "launch" / f"{verb}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
