"""The commands in processes of their own, and their work in this process where starting proves nothing more."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_diffgemma.data import build_tokenizer
from nemo_diffgemma.data.sudoku_task import Sudoku, SudokuData
from nemo_diffgemma.repository import ROOT
from nemo_diffgemma.schema import SamplerGroup
from tests import commands
from tests.launch import verbs

PROMPT = [2, 10, 11, 12, 13]


class Shown:
    """Stands in for `Results`."""

    def __init__(self) -> None:
        self.exit_code, self.is_rank_zero, self.colours, self.lines = 0, True, False, []

    def show(self, text: str) -> None:
        self.lines.append(text)


def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return commands.run(f"launch/{script}", *arguments, **environment)


def last_line(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def model(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint("base", damp=0.1)


@pytest.fixture(scope="module")
def model_that_reads_text(checkpoint: Callable[..., Path]) -> Path:
    directory = checkpoint("bigger_canvas", damp=0.1)
    build_tokenizer().save_pretrained(directory)
    return directory


# -- in processes of their own -----------------------------------------------------------------------------------------


def test_two_processes_generate_what_the_interface_does_and_print_one_json_line(model, single):
    from nemo_diffgemma import DiffusionGemma

    network = DiffusionGemma.from_huggingface(model)
    expected = network.generate(torch.tensor([PROMPT]), max_new_tokens=8, seed=3)
    done = run(
        "generate.py", f"checkpoint={model}", f"prompt_ids={PROMPT}", "max_new_tokens=8", "seed=3", "parallel=tp2_ep2"
    )
    found = last_line(done)
    assert found["sequences"] == expected.sequences.tolist()
    assert found["forwards"] == expected.forwards.tolist()
    assert found["text"] is None
    assert done.stdout.count("{") == 1


def test_training_writes_a_checkpoint_that_its_json_names(tmp_path):
    command = [
        sys.executable, ROOT / "launch" / "train.py", "model=tiny", "trainer.max_steps=2", "optim.warmup_steps=1",
        "data.global_batch_size=4", "seed=5", f"exp_manager.exp_dir={tmp_path}", "exp_manager.name=run",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)  # with its imports
    found = last_line(done)
    metrics = (Path(found["run_dir"]) / "metrics.jsonl").read_text().splitlines()
    assert done.stdout.count("\n") == 1, "progress and logs go to standard error"
    assert found["step"] == len(metrics) == 2
    assert found["loss"] == json.loads(metrics[-1])["loss"]
    assert Path(found["checkpoint"]).is_dir()
    assert Path(found["run_dir"]).parent == tmp_path / "run"


@pytest.mark.slow
def test_the_demo_trains_evaluates_and_shows_a_puzzle(tmp_path):
    done = run("demo.py", "trainer.max_steps=4", "optim.warmup_steps=2", f"exp_manager.exp_dir={tmp_path}")
    found = last_line(done)
    assert list(found["solve_rate"]) == ["1", "2", "4", "8", "16", "48"]
    assert all(0 <= rate <= 1 for rate in found["solve_rate"].values())
    assert {"run_dir", "checkpoint", "step", "loss", "tokens_per_forward", "seconds"} <= set(found)
    assert (Path(found["run_dir"]) / "demo.png").is_file()
    assert "step 1: " in done.stdout
    assert f"checkpoint={found['checkpoint']} prompt=" in done.stdout


def test_an_error_in_every_process_is_told_once_without_a_traceback(model):
    done = run("generate.py", f"checkpoint={model}", "prompt_ids=[1,99]", "parallel=ep2")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("error: token ids range from 1 to 99") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("script", "arguments", "told"),
    [
        ("train.py", ["data.global_batchsize=4"], "did you mean data.global_batch_size?"),
        ("train.py", ["model=huge"], "Available options in 'model': diffusiongemma_26b_a4b sudoku tiny"),
        ("verify.py", ["checkpoint=x", "parallel.pipeline=2"], "layout pipeline=2 is not supported yet"),
    ],
)  # fmt: skip
def test_what_cannot_be_composed_is_one_paragraph_and_exit_code_2(script, arguments, told):
    done = run(script, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert told in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_a_world_that_does_not_fit_the_layout_is_told_by_rank_0_only(model):
    arguments = [f"checkpoint={model}", "prompt_ids=[1,2]", "parallel=tp2"]
    first, other = (run("generate.py", *arguments, RANK=rank, WORLD_SIZE="3") for rank in "01")
    assert (first.returncode, other.returncode) == (2, 2)
    assert "needs 2 processes or a multiple of it, but there are 3" in " ".join(first.stderr.split())
    assert "error:" not in other.stderr


def test_help_shows_examples_groups_and_keys():
    done = run("train.py", "--help")
    assert done.returncode == 0
    for part in ("experiment=sudoku_cpu", "parallel: ep2, single, tp2", "global_batch_size: 64"):
        assert part in done.stdout


# -- their work --------------------------------------------------------------------------------------------------------


def test_a_prompt_becomes_text_and_the_canvas_is_shown_at_every_step(model_that_reads_text, single):
    generate, GenerateConfig = (getattr(verbs.load("generate"), name) for name in ("generate", "GenerateConfig"))

    results = Shown()
    config = GenerateConfig(
        str(model_that_reads_text), prompt="1..4 ..3. 2... ...1", show=True,
        sampler=SamplerGroup(max_denoising_steps=3, confidence_threshold=0.0),
    )  # fmt: skip
    found = generate(config, results)
    assert found["sequences"][0][:18] == build_tokenizer()("1..4..3.2......1").input_ids
    assert [line.split(":")[0] for line in results.lines[:-1]] == [f"canvas 0 step {n:2}" for n in (3, 2, 1)]
    assert results.lines[-1] == found["text"]
    assert found["forwards"] == [3]


def test_what_the_tokenizer_does_not_know_is_refused(model_that_reads_text, model):
    from nemo_diffgemma.tokenizer import Text, TokenizerError

    with pytest.raises(TokenizerError, match="cannot read prompt='é'"):
        Text(model_that_reads_text).encode("é", chat=True)
    with pytest.raises(TokenizerError, match="no tokenizer.json.*prompt_ids="):
        Text(model).encode("1", chat=True)


def test_evaluation_measures_losses_and_solve_rates(model_that_reads_text, single, tmp_path):
    evaluate, EvaluateConfig = (getattr(verbs.load("evaluate"), name) for name in ("evaluate", "EvaluateConfig"))

    config = EvaluateConfig(
        str(model_that_reads_text),
        data=SudokuData(test_puzzles=6),
        steps=[1, 2],
        levels=[0.0, 1.0],
        samples=3,
        out=str(tmp_path),
    )
    found = evaluate(config, Shown())
    assert found["solve_rate"] == {"1": 0.0, "2": 0.0}
    assert found["tokens_per_forward"] >= 8
    assert set(found["canvas_loss"]) == {"0.0", "1.0"}
    assert found["bits_per_token"] > 0
    assert found["samples"] == {"file": str(tmp_path / "samples.jsonl"), "count": 3, "exact_match": 0.0}
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert all(line["prompt"].startswith("<bos>") and len(line["reference"]) == 16 for line in lines)
    assert evaluate(config, Shown()) == found


def test_canvas_loss_is_the_mean_cross_entropy_of_what_denoise_predicts(model_that_reads_text, single):
    from nemo_diffgemma import DiffusionGemma
    from nemo_diffgemma.diffusion.objective import choose_canvases, corrupt
    from nemo_diffgemma.evaluation.measures import canvas_losses, held_out_rows

    network = DiffusionGemma.from_huggingface(model_that_reads_text)
    rows = held_out_rows(Sudoku(SudokuData(test_puzzles=5)), network.model_config)
    corrupted = corrupt(rows, choose_canvases(rows, 16, 0, 7), 16, 64, 7, level=0.5)
    prompts = rows.tokens_T.view(len(rows), -1)[:, :18]
    logits = network.denoise(corrupted.noised_MC, network.encode(prompts))
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), corrupted.clean_MC.flatten())
    assert canvas_losses(network, rows, [0.5], seed=7)[0.5] == pytest.approx(float(expected), abs=1e-5)


def test_solve_rate_does_not_depend_on_the_batch(model_that_reads_text, single, monkeypatch):
    from nemo_diffgemma import DiffusionGemma
    from nemo_diffgemma.data import sudoku_task

    network = DiffusionGemma.from_huggingface(model_that_reads_text)
    puzzles = Sudoku(SudokuData(test_puzzles=5)).puzzles()
    answers: list[Any] = []
    monkeypatch.setattr(sudoku_task, "solve_rate", lambda puzzles, found: answers.append(found) or 0.0)
    for batch in (5, 2):
        sudoku_task.sudoku_solve_rate(network, puzzles, 3, seed=1, batch=batch)
    assert torch.equal(*answers)


def test_conversion_through_every_format_gives_the_same_bytes_back(model, tmp_path, single):
    convert, ConvertConfig = (getattr(verbs.load("convert"), name) for name in ("convert", "ConvertConfig"))

    places = [str(model), *(str(tmp_path / name) for name in ("sharded", "archive.nemo", "back"))]
    for source, target, format in zip(places, places[1:], ("sharded", "nemo", "huggingface"), strict=False):
        told = convert(ConvertConfig(source, target, format, dry_run=True), Shown())
        assert not Path(target).exists()
        done = convert(ConvertConfig(source, target, format), Shown())
        assert (told["tensors"], told["bytes"]) == (done["tensors"], done["bytes"])
        assert done["peak_memory"] > done["bytes"]
    assert _tensors(Path(places[-1])) == _tensors(model)


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_conversion_onto_something_is_refused_before_anything_is_read(model, tmp_path, single, monkeypatch, dry_run):
    from nemo_diffgemma.checkpoint import contents as checkpoints
    from nemo_diffgemma.errors import UserError

    convert, ConvertConfig = (getattr(verbs.load("convert"), name) for name in ("convert", "ConvertConfig"))

    (tmp_path / "mine.nemo").write_text("mine")
    monkeypatch.setattr(checkpoints, "contents", lambda _: pytest.fail("the source was read"))
    for target, format in (
        (model, "huggingface"),  # its own source
        (model, "sharded"),
        (model, "nemo"),
        (tmp_path / "mine.nemo", "nemo"),
        (tmp_path / "mine.nemo", "huggingface"),
        (tmp_path / "mine.nemo" / "below", "sharded"),
        (tmp_path, "nemo"),
    ):
        with pytest.raises(UserError, match=str(target)):
            convert(ConvertConfig(str(model), str(target), format, dry_run=dry_run), Shown())
    assert (tmp_path / "mine.nemo").read_text() == "mine"


def _tensors(directory: Path) -> dict[str, bytes]:
    from safetensors.torch import load_file

    return {
        name: tensor.contiguous().view(torch.uint8).numpy().tobytes()
        for file in directory.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def test_verification_finds_us_equal_and_a_moved_weight_different(model, single, monkeypatch):
    verify = verbs.load("verify")

    config = verify.VerifyConfig(str(model), rows=2, canvases=1, max_denoising_steps=3)
    results = Shown()
    found = verify.verify(config, results)
    assert (found["verdict"], results.exit_code) == ("equal", 0)
    assert found["agreement"]["router"] == 1.0
    assert max(found["differences"].values()) < 1e-4

    from nemo_diffgemma import DiffusionGemma

    opened = DiffusionGemma.from_checkpoint

    def moved(path: str) -> Any:
        network = opened(path)
        with torch.no_grad():
            network.norm.weight[0] *= 1.01
        return network

    monkeypatch.setattr(DiffusionGemma, "from_checkpoint", moved)
    results = Shown()
    assert verify.verify(config, results)["verdict"] == "different"
    assert results.exit_code == 1


def test_tokens_that_were_not_compared_are_not_called_equal(model, single, monkeypatch):
    from nemo_diffgemma.evaluation import comparison

    verify = verbs.load("verify")
    config = verify.VerifyConfig(str(model), prompt_lengths=[5], rows=2, canvases=1, max_denoising_steps=3)
    tried = []

    def robust_at_the_third(network, reference, prompts, *, seed, **_):
        tried.append((seed, prompts.tolist()))
        return [True] * (len(tried) == 3)

    monkeypatch.setattr(comparison, "compare_tokens", robust_at_the_third)
    assert verify.verify(config, Shown())["verdict"] == "equal"
    assert [seed for seed, _ in tried] == [0, 1, 2] and tried[0][1] != tried[1][1]
    monkeypatch.setattr(comparison, "compare_tokens", lambda *_, **__: [])
    assert verify.verify(config, Shown())["verdict"] == "equal, tokens not compared"


def test_a_directory_with_whole_numbers_is_counted_from_its_headers(tmp_path):
    from safetensors.torch import save_file

    from nemo_diffgemma.checkpoint.contents import contents

    tensors = {"a": torch.zeros(3, dtype=torch.int64), "b": torch.zeros(5, dtype=torch.bool), "c": torch.zeros(2)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    found = contents(str(tmp_path))
    assert (found.tensors, found.bytes) == (3, 24 + 5 + 8)
