"""The page "Fine-tune on your data" is right: its commands are run as they stand there, with smaller numbers."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from nemo_diffgemma.repository import ROOT
from tests import commands
from tests.data import runs

PAGE = ROOT / "docs" / "fine_tune.md"
# For a network of 100,000 weights and two processes
SMALLER = {
    "experiment=lora_1xh100": ["model.lora.rank=2", "trainer.validate_every=2", "trainer.checkpoint_every=1"],
    "experiment=sft_8xh100": ["parallel.expert=2", "trainer.checkpoint_every=2", "data.max_length=500"],
}
FEW = ["model.dtype=float32", "trainer.max_steps=2", "data.global_batch_size=4"]  # bfloat16 is slow on a CPU


def typed() -> list[str]:
    """Every command of the page, in its order."""
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def is_of_all_weights(line: str) -> bool:
    return "sft_8xh100" in line


@pytest.fixture
def desk(tmp_path) -> Path:
    """What a newcomer has after `hf download` and writing down conversations."""
    from tests.reference import randomised_model, save_released_layout, tiny_config

    runs.files(tmp_path, count=24)
    (tmp_path / "train.jsonl").rename(tmp_path / "chat.jsonl")
    network = randomised_model(tiny_config({"vocab_size": 360}), seed=3, damp_self_conditioning=0.1)
    save_released_layout(network, tmp_path / "CKPT")
    for file in (tmp_path / "tokenizer").iterdir():
        shutil.copy(file, tmp_path / "CKPT")
    return tmp_path


def run(line: str, desk: Path) -> str:
    program, script, *arguments = shlex.split(line.replace("step-800", "step-2"))
    assert program == "python"
    for experiment, smaller in SMALLER.items():
        arguments += [*smaller, *FEW] if experiment in arguments else []
    done = commands.run(script, *arguments, cwd=desk, HF_DATASETS_CACHE=str(desk / "cache"))
    assert done.returncode == 0, f"{line}\n{done.stderr}"
    return done.stdout


def test_the_page_begins_with_the_download_and_names_what_it_uses():
    download, *others = typed()
    assert download == "hf download google/diffusiongemma-26B-A4B-it --local-dir CKPT"
    assert len(others) >= 6 and all(line.startswith("python launch/") for line in others)
    assert [line for line in others if is_of_all_weights(line)]


def check(desk: Path, lines: list[str]) -> None:
    """Run them; the last answers with the merged model and with the adapter are the same text."""
    texts = []
    for line in lines:
        shown = run(line, desk)
        last = json.loads(shown.splitlines()[-1])
        if "data.py" in line:
            assert last["examples"] == {"train": 24, "validation": 24} and "Generating" not in shown
        if "generate.py" in line:
            texts.append(last["text"])
    assert len(texts) == 2 and texts[0] == texts[1]
    assert list((desk / "merged").glob("*.safetensors"))


def test_from_the_download_to_a_merged_model(desk):
    check(desk, [line for line in typed()[1:] if not is_of_all_weights(line) and "evaluate.py" not in line])


@pytest.mark.slow
def test_every_command_of_the_page(desk):
    check(desk, typed()[1:])
