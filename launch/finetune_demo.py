"""Teach the model of `make demo` another task with LoRA: from a file of conversations to a merged model.

    make finetune-demo
    make finetune-demo ARGS="checkpoint=runs/sudoku_cpu/mine/checkpoints/step-1300 steps=300"

The task is Sudoku whose answers call the digits 1 2 3 4 by the names 2 3 4 1: rules that it knows in new words. It
stands in a file of conversations, as anyone's own data would. Without a checkpoint the demo takes the newest one under
runs/sudoku_cpu, and trains a shorter one where there is none. Every command is shown as you would type it. The last
line is JSON: solved_before, solved_after, base_unchanged, the largest difference of logits (merged and peft's), paths.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nemo_diffgemma.cli.demo_checkpoint import demo_checkpoint
from nemo_diffgemma.cli.output import Results, table
from nemo_diffgemma.cli.start import start
from nemo_diffgemma.repository import ROOT, user_path
from nemo_diffgemma.schema import ConfigurationError

NAMES = "2341"
BATCH = 64
DENOISING_STEPS = 16
SHORT = 800  # steps of the demo, where it has not run


@dataclass
class FinetuneDemoConfig:
    """Configuration of `launch/finetune_demo.py`."""

    checkpoint: str | None = None  # of the demo
    out: str = "runs/finetune_demo"  # a folder of its own for each start
    steps: int = 400
    held_out: int = 400  # puzzles that are solved before and after

    def __post_init__(self) -> None:
        if self.steps < 1 or self.held_out < 1:
            raise ConfigurationError(f"steps={self.steps}, held_out={self.held_out}; expected at least 1 of each")


def finetune_demo(config: FinetuneDemoConfig, results: Results) -> dict[str, Any]:
    """Write the data, look at them, train an adapter, compare, merge, compare with peft."""
    from nemo_diffgemma.data import sudoku_files
    from nemo_diffgemma.parallel import ParallelLayout, initialize, shutdown

    began = time.time()
    base = demo_checkpoint(config.checkpoint, results, SHORT)
    out = user_path(config.out) / time.strftime("%Y-%m-%d_%H-%M-%S")
    digest = digest_of(user_path(base))

    results.show(f"== The data: conversations in {out}/train.jsonl and held_out.jsonl\n")
    sudoku_files.write(out, config.steps * BATCH, config.held_out, NAMES)
    results.show((out / "held_out.jsonl").read_text().partition("\n")[0] + "\n")
    held_out = f"data.validation=[{out}/held_out.jsonl]"
    data = ("data=chat", f"data.train=[{out}/train.jsonl]", held_out, f"data.tokenizer={out}/tokenizer")
    command(results, "data.py", *data, f"checkpoint={base}", f"out={out}/look", "examples=1000")

    results.show("== An adapter of rank 8 is trained; all weights of the checkpoint are frozen\n")
    adapter = trained(results, base, data, config.steps, out)

    results.show("== Base and adapter as one checkpoint in the released format, and the base alone for peft\n")
    command(results, "convert.py", f"source={adapter}", f"target={out}/merged")
    command(results, "convert.py", f"source={base}", f"target={out}/base")

    results.show("== Before and after\n")
    initialize(ParallelLayout())  # networks in this process
    rates = {name: solved(place, out / "held_out.jsonl") for name, place in (("before", base), ("after", adapter))}
    rates["merged"] = solved(f"{out}/merged", out / "held_out.jsonl")
    rows = [[name, f"{rate:.4f}"] for name, rate in rates.items()]
    results.show(table(["model", f"solved of {config.held_out}"], rows) + "\n")
    differences = logit_differences(out, adapter)
    results.show(table(["logits against the adapter here", "largest difference"], list(map(list, differences.items()))))
    shutdown()
    unchanged = digest_of(user_path(base)) == digest
    results.show(f"\nthe files of the base are {'as they were' if unchanged else 'CHANGED'}: {base}")
    results.show(f"adapter, in PEFT's format: {adapter}\nmerged: {out}/merged\n")
    if not unchanged or max(differences.values()) > 1e-4:
        results.exit_code = 1
    return {
        **{f"solved_{name}": rate for name, rate in rates.items()},
        "base_unchanged": unchanged,
        "logit_differences": differences,
        "base": str(base),
        "adapter": adapter,
        "merged": f"{out}/merged",
        "seconds": round(time.time() - began, 1),
    }


def trained(results: Results, base: str, data: tuple[str, ...], steps: int, out: Path) -> str:
    """Train an adapter of rank 8 on two replicas -> its checkpoint."""
    made = command(
        results,
        "train.py",
        f"model.checkpoint={base}",
        "model.lora.rank=8",
        *data,
        f"data.global_batch_size={BATCH}",
        *("optim.lr=1e-2", "optim.warmup_steps=20", "optim.decay=linear", "optim.decay_start=0.5"),
        f"trainer.max_steps={steps}",
        "parallel.replicas=2",
        *(f"exp_manager.exp_dir={out}", "exp_manager.name=runs", "exp_manager.version=lora"),
    )
    return made["checkpoint"]


def command(results: Results, script: str, *arguments: str) -> dict[str, Any]:
    """Run a command of ours and show it -> its last line."""
    results.show(f"$ python launch/{script} {shlex.join(arguments)}")
    line = [sys.executable, str(ROOT / "launch" / script), *arguments]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True)  # progress goes to standard error
    if done.returncode:
        raise SystemExit(done.returncode)  # it has said why
    *shown, last = done.stdout.splitlines()
    results.show("\n".join([*shown, last]) + "\n")
    return json.loads(last)


def digest_of(directory: Path) -> str:
    """Of all files, names and contents."""
    digest = hashlib.sha256()
    for file in sorted(file for file in directory.rglob("*") if file.is_file()):
        digest.update(f"{file.relative_to(directory)}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def solved(checkpoint: str, conversations: Path) -> float:
    """Share of the conversations whose answer is generated exactly: a puzzle has one solution."""
    import torch

    from nemo_diffgemma import DiffusionGemma, SamplerConfig
    from nemo_diffgemma.data.sudoku_tokenizer import build_tokenizer

    network, tokenizer = DiffusionGemma.from_checkpoint(checkpoint), build_tokenizer()
    rows = [json.loads(line)["messages"] for line in conversations.read_text().splitlines()]
    prompts = torch.tensor([tokenizer(puzzle["content"]).input_ids for puzzle, _ in rows])
    sampler = SamplerConfig(max_denoising_steps=DENOISING_STEPS, eos_token_id=None, pad_token_id=None)
    answers = network.generate(prompts, max_new_tokens=16, sampler=sampler, seed=0).sequences[:, prompts.shape[1] :]
    texts = tokenizer.batch_decode(answers)
    return sum(text == answer["content"] for text, (_, answer) in zip(texts, rows, strict=True)) / len(rows)


def logit_differences(out: Path, adapter: str) -> dict[str, float]:
    """Logits of a noised canvas behind a puzzle: by the adapter here, merged, and by peft on transformers' model."""
    import torch
    from peft import PeftModel

    from nemo_diffgemma import DiffusionGemma
    from nemo_diffgemma.data.sudoku_tokenizer import build_tokenizer
    from nemo_diffgemma.evaluation.reference import Reference

    prompt = torch.tensor([build_tokenizer()("..4.2..1.2..1...").input_ids])
    canvas = torch.randint(64, (1, 16), generator=torch.Generator().manual_seed(0))
    ours, merged = DiffusionGemma.from_checkpoint(adapter), DiffusionGemma.from_checkpoint(f"{out}/merged")
    base, converted = Reference(out / "base"), Reference(out / "merged")
    base.model = PeftModel.from_pretrained(base.model, adapter).eval().get_base_model()
    with torch.no_grad():
        truth = ours.denoise(canvas, ours.encode(prompt))
        others = {
            "merged": merged.denoise(canvas, merged.encode(prompt)),
            "merged, by transformers": converted.denoise(canvas, converted.encode(prompt)[0], None),
            "adapter by peft, on transformers": base.denoise(canvas, base.encode(prompt)[0], None),
        }
    return {name: float((logits - truth).abs().max()) for name, logits in others.items()}


if __name__ == "__main__":
    start(finetune_demo, FinetuneDemoConfig, "finetune_demo")
