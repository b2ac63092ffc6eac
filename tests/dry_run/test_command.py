"""`launch/dry_run.py` as a user starts it."""

from __future__ import annotations

import json

import pytest

from tests.commands import run


def test_the_last_line_is_json_and_a_violation_is_exit_code_1() -> None:
    done = run("launch/dry_run.py", "model=tiny", "model.dtype=bfloat16", "verb=generate", "parallel=tp2", "rank=1")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert list(result) == ["verb", "world", "rank", "peak_gb", "phases", "violations"]
    assert (result["verb"], result["world"], result["rank"], result["violations"]) == ("generate", 2, 1, [])
    assert set(result["phases"]) == {"encode", "denoise", "generate"}
    for figures in result["phases"].values():
        assert list(figures) == ["peak_gb", "launches", "waits", "tflop", "wire_gb"]
    assert result["phases"]["denoise"]["waits"] == 0
    assert result["phases"]["generate"]["launches"] > 40 * result["phases"]["denoise"]["launches"] > 0
    for title in ("waits of the host", "collectives", "attention", "What this cannot see"):
        assert title in done.stdout


@pytest.mark.parametrize(
    ("arguments", "environment", "told"),
    [
        (["verb=serve"], {}, "verb='serve'; use one of train, generate"),
        (["rank=8", "parallel=tp4_ep8"], {}, "rank=8 of world=8; expected 0 to 7"),
        (["world=12", "parallel=tp4_ep8"], {}, "needs 8 processes or a multiple of it"),
        (["world=-8", "parallel=tp4_ep8"], {}, "needs 8 processes or a multiple of it, but there are -8"),
        (["world=0"], {}, "needs 1 processes or a multiple of it, but there are 0"),
        (["rows=0"], {}, "rows=0; expected at least 1"),
        (["~gpu"], {}, "gpu is not given; use gpu=<file of conf/gpu>"),
        (["model.architecture.canvas_length=0"], {}, "canvas_length"),
        (["gpu=null"], {}, "gpu=null: gpu is a group of files; use one of b200,"),
        (["parallel.tensor=3"], {}, "cannot divide 16 attention heads"),
        (["prompts=[1,2]", "responses=[3,4,5]"], {}, "expected one, or one for each of 3 rows"),
        (["model.dtype=float16"], {}, "use one of float32, bfloat16"),
        (["model.checkpoint=x"], {}, "a dry run reads no weights"),
        (["verb=generate", "sampler.max_denoising_steps=2"], {}, "from at least 3"),
        ([], {"CC": "no_such_compiler"}, "there is no compiler (no_such_compiler) on this machine"),
    ],
)
def test_what_cannot_be_played_is_one_paragraph_and_exit_code_2(arguments, environment, told) -> None:
    done = run("launch/dry_run.py", *arguments, **environment)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("error: ")
    assert told in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
