"""One error policy: what a command prints and its exit code, by kind of error, alone and as one of several ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_diffgemma.repository import ROOT

COMMAND = '''
"""A command."""
import json, os, sys
from dataclasses import dataclass
from nemo_diffgemma.checkpoint.tensor_files import CheckpointError
from nemo_diffgemma.cli import reporting
from nemo_diffgemma.cli.child_process import ChildCrash
from nemo_diffgemma.cli.start import start
from nemo_diffgemma.errors import UserError
from nemo_diffgemma.parallel.agreement import OtherRankError, OtherRankFailure, known_to_all
from nemo_diffgemma.parallel.layout import LayoutError

reporting._PATIENCE = 0.1

@dataclass
class Config:
    bundle: str = "???"
    number: int = 0

def work(config, results):
    results.show("shown")
    print("a stray print")
    if config.bundle == "fails":
        results.exit_code = 1
    elif config.bundle != "works":
        raise eval(config.bundle)
    return {"number": config.number}

out, *cases = sys.argv[1:]
told = []
for case in cases:
    sys.argv = ["command", *case.split("|")]
    before = [os.dup(1), os.dup(2)]
    files = [os.open(f"{out}.{n}", os.O_CREAT | os.O_RDWR | os.O_TRUNC) for n in (1, 2)]
    os.dup2(files[0], 1); os.dup2(files[1], 2)
    code = 0
    try:
        start(work, Config, "export_show")
    except SystemExit as ended:
        code = ended.code
    sys.stdout.flush(); sys.stderr.flush()
    os.dup2(before[0], 1); os.dup2(before[1], 2)
    told.append([code, *(open(f"{out}.{n}").read() for n in (1, 2))])
json.dump(told, open(out, "w"))
'''


def outcomes(tmp_path: Path, *cases: str, **environment: str) -> list[tuple[int, str, str]]:
    """Exit code, standard output and standard error of `start` by case, all in one process."""
    script = tmp_path / "command.py"
    script.write_text(COMMAND)
    out = tmp_path / "told"
    done = subprocess.run(
        [sys.executable, str(script), str(out), *cases], capture_output=True, text=True, timeout=240,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [tuple(one) for one in json.loads(out.read_text())]


EXPLAINED = [
    ("UserError('type this instead')", 2), ("CheckpointError('type this instead')", 2),
    ("LayoutError('type this instead')", 2), ("OtherRankError('type this instead')", 2),
    ("OSError('type this instead')", 1), ("ChildCrash('type this instead')", 1),
    ("OtherRankFailure('type this instead')", 1), ("PermissionError('type this instead')", 1),
]  # fmt: skip
DEFECTS = [
    "ValueError('max() iterable argument is empty')",
    "RuntimeError('no')",
    "KeyError('x')",
    "ZeroDivisionError()",
]


def test_every_kind_of_error_has_its_exit_code_and_words(tmp_path):
    cases = [f"bundle={error}" for error, _ in EXPLAINED] + [f"bundle={error}" for error in DEFECTS]
    told = outcomes(tmp_path, *cases, "number=1", "bundle=works|number=x", "bundle=works|nubmer=1")
    for (error, expected), (code, out, errors) in zip(EXPLAINED, told, strict=False):
        assert (code, out) == (expected, "shown\n"), error
        assert errors.endswith("error: type this instead\n") and "Traceback" not in errors, error
    for error, (code, _, errors) in zip(DEFECTS, told[len(EXPLAINED) :], strict=False):
        assert code == 1 and "Traceback" in errors and "error: " not in errors.replace("Error: ", ""), error
        assert errors.splitlines()[-1].startswith(error.partition("(")[0])
    for told_of, (code, out, errors) in zip(("bundle", "number", "did you mean number?"), told[-3:], strict=True):
        assert (code, out) == (2, "") and errors.startswith("error: ") and told_of in errors


def test_results_are_on_standard_output_and_nothing_else(tmp_path):
    told = outcomes(tmp_path, "bundle=works|number=3", "--multirun|bundle=works,works|number=4", "bundle=fails")
    assert told[0] == (0, 'shown\n{"number": 3}\n', "a stray print\n")
    assert told[1][:2] == (0, 'shown\n{"number": 4}\n' * 2)
    assert told[2][0] == 1 and '{"number": 0}' in told[2][1]


def test_of_several_ranks_one_tells_what_all_know(tmp_path):
    cases = (
        "bundle=known_to_all(UserError('of all'))", "bundle=UserError('mine')", "bundle=RuntimeError('defect')",
        "bundle=known_to_all(RuntimeError('defect'))", "nubmer=1",
    )  # fmt: skip
    first, other = (outcomes(tmp_path, *cases, RANK=rank, WORLD_SIZE="2") for rank in "01")
    assert [code for code, *_ in first] == [code for code, *_ in other] == [2, 2, 1, 1, 2]
    assert all(out == "" for _, out, _ in other)
    assert all("error" in errors.lower() for *_, errors in first)
    assert ["error: of all" in other[0][2], "error: mine" in other[1][2]] == [False, True]
    assert "Traceback" in other[2][2] and "Traceback" in other[3][2]
    assert other[4][2] == ""


@pytest.mark.parametrize(
    ("content", "told"),
    [("{", "is no JSON"), ("[]", "holds no configuration"), ('{"budnle": 1}', "did you mean bundle?")],
)  # fmt: skip
def test_a_damaged_configuration_of_a_job_is_named(tmp_path, content, told):
    file = tmp_path / "config.json"
    file.write_text(content)
    ((code, _, errors),) = outcomes(tmp_path, "bundle=works", NEMO_DIFFGEMMA_CONFIG=str(file))
    assert code == 2 and told in " ".join(errors.split())
