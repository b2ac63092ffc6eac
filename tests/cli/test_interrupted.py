"""Commands as a user starts and ends them: prompts arrive in every process, a signal leaves nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from nemo_diffgemma import DiffusionGemma
from nemo_diffgemma.checkpoint.open import save_network
from nemo_diffgemma.data import build_tokenizer
from nemo_diffgemma.repository import ROOT

PROMPT = " 1..4 [,'\"${5}\\ ...\n..1=?!\\"  # in the tokenizer's vocabulary but for the last characters


def command(verb: str, *arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / "launch" / f"{verb}.py"), *arguments]


@pytest.fixture(scope="module")
def model(checkpoint: Callable[..., Path], tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("a b") / "step=100,[x] ${y} 'z'"
    place.symlink_to(checkpoint("bigger_canvas", damp=0.1))
    build_tokenizer().save_pretrained(place)
    return place


def test_two_processes_read_the_prompt_that_was_typed_and_a_path_as_it_is(model):
    """The tokenizer names what it cannot read: `$` and backslash are not in its vocabulary."""
    done = subprocess.run(
        command("generate", f"checkpoint={model}", "prompt=-", "parallel=ep2"), input=PROMPT + "\n",
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    told = "".join(done.stderr.split())  # its lines are filled
    assert "".join(f"cannot read prompt={PROMPT!r}".split()) in told
    assert done.stderr.count("error: the tokenizer") == 1 and "Traceback" not in done.stderr


def with_much_to_carry(model: Path, copy: Path) -> Path:
    """A copy of a model with 300 MB of zeros among its vision tensors: time to interrupt what is done with them."""
    shutil.copytree(model, copy)
    header = {"model.encoder.vision_tower.much": {"dtype": "U8", "shape": [300, 10**6], "data_offsets": [0, 3 * 10**8]}}
    text = json.dumps(header).encode()
    (copy / "much.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(copy / "much.safetensors", 8 + len(text) + 3 * 10**8)
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(header, "much.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    return copy


@pytest.mark.parametrize(
    ("case", "sent", "code"),
    [
        ("generate from .nemo", signal.SIGTERM, 143),
        ("generate from .nemo", signal.SIGKILL, -9),
        ("convert by two", signal.SIGINT, 130),
        pytest.param("convert by two", signal.SIGTERM, 143, marks=pytest.mark.slow),
    ],
)
def test_what_a_signal_ends_leaves_nothing_but_what_it_goes_on_from(model, single, tmp_path, case, sent, code):
    temporary, target = tmp_path / "tmp", tmp_path / "out" / "sharded"
    temporary.mkdir()
    target.parent.mkdir()
    if case == "convert by two":
        arguments = command(
            "convert",
            f"source={with_much_to_carry(model, tmp_path / 'model')}",
            f"target={target}",
            "format=sharded",
            "parallel=ep2",
        )
        begun = lambda: any(target.parent.iterdir())
    else:
        save_network(DiffusionGemma.from_checkpoint(model), str(tmp_path / "model.nemo"), "nemo")
        arguments = command(
            "generate", f"checkpoint={tmp_path / 'model.nemo'}", "prompt_ids=[2,10]", "max_new_tokens=9999"
        )
        begun = lambda: any(temporary.glob(".*.partial"))
    process = subprocess.Popen(
        arguments,
        env={**os.environ, "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 240
    while not begun():
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.005)
    process.send_signal(sent)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors
    assert out == "" and "Traceback" not in errors
    if sent == signal.SIGKILL:  # the next start of any command removes what it left
        (left,) = temporary.glob(".*.partial")
        given = {**os.environ, "TMPDIR": str(temporary)}
        assert subprocess.run(command("generate", "checkpoint=nowhere", "prompt=x"), env=given).returncode == 2
        assert not left.exists()  # wandb, imported by NeMo, leaves two empty folders of its own
    elif case == "convert by two":
        assert [path.name for path in target.parent.iterdir()] == [".sharded.converting"]
        assert subprocess.run(arguments, capture_output=True).returncode == 0
        assert [*temporary.iterdir(), *target.parent.iterdir()] == [target]
    else:
        assert list(temporary.iterdir()) == []


def test_ranks_end_with_the_command_that_started_them(model):
    """Each is in a session of its own, so no signal to the command's group reaches them."""
    arguments = command("generate", f"checkpoint={model}", "prompt_ids=[2,10]", "max_new_tokens=9999", "parallel=ep2")
    process = subprocess.Popen([*arguments, "show=true"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline()  # they are at work
    ranks = psutil.Process(process.pid).children()
    process.kill()
    process.communicate()
    assert len(ranks) == 2 and psutil.wait_procs(ranks, timeout=60)[1] == []


def test_inherited_variables_of_a_launcher_are_told(model):
    done = subprocess.run(
        command("generate", f"checkpoint={model}", "prompt_ids=[2]", "parallel=ep2"), capture_output=True, text=True,
        timeout=300, env={**os.environ, "RANK": "0", "WORLD_SIZE": "2"},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert "MASTER_ADDR and MASTER_PORT are not set" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
