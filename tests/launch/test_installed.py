"""The library is what a wheel holds, and the verbs import it from nowhere else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from nemo_diffgemma.repository import ROOT

FOLDERS = ("nemo_diffgemma", "launch", "export", "slurm", "benchmarks", "scripts", "tests")
PAGE = sorted((ROOT / "nemo_diffgemma/serving/page").iterdir())
IMPORT_ALL = """
import importlib, pkgutil, sys
sys.path.insert(0, sys.argv[1])
import nemo_diffgemma
assert nemo_diffgemma.__file__.startswith(sys.argv[1]), nemo_diffgemma.__file__
for module in pkgutil.walk_packages(nemo_diffgemma.__path__, "nemo_diffgemma."):
    importlib.import_module(module.name)
    print(module.name)
"""


def sources(*folders: str) -> list[Path]:
    return [file for folder in folders for file in (ROOT / folder).rglob("*.py")]


def test_no_module_of_ours_is_imported_from_launch():
    importing = re.compile(r"^\s*(from|import)\s+launch\b", re.MULTILINE)
    assert [str(file) for file in sources(*FOLDERS) if importing.search(file.read_text())] == []


@pytest.mark.parametrize("verb", ["launch/generate.py", "export/show.py"])
def test_a_package_called_launch_changes_nothing(verb, tmp_path):
    """ROS 2 has one, and puts it on PYTHONPATH."""
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "__init__.py").write_text("raise ImportError('another project')\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, ROOT / verb, "--help"], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr


def test_the_whole_library_can_be_imported_from_a_wheel(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
        "-w",
        str(tmp_path),
    ]
    subprocess.run([*command, str(copy_of_sources(tmp_path / "source"))], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    assert all((tmp_path / "installed" / file.relative_to(ROOT)).is_file() for file in PAGE)
    done = subprocess.run(
        [sys.executable, "-I", "-c", IMPORT_ALL, str(tmp_path / "installed")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(sources("nemo_diffgemma")) - 1  # all but the package itself


def copy_of_sources(target: Path) -> Path:
    """Building leaves `build/` and `*.egg-info` where it works."""
    for file in [*sources("nemo_diffgemma", "export"), *PAGE, ROOT / "pyproject.toml", ROOT / "LICENSE"]:
        copy = target / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    return target
