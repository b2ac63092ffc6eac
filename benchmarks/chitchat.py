"""Real conversations: train on them, kill the run, go on in another layout, and draw the loss.

    python benchmarks/chitchat.py runs/chitchat         # some 3 minutes on two CPU cores; draws docs/chitchat.png

The texts are those of the package chitchat-dataset (MIT): people who chat, as they typed. They are written out as a
file of `messages`, and a tokenizer is trained on it. A network of 0.86 M parameters reads it in two processes that
share its tensors, is killed (SIGKILL) in the middle of the run, and goes on as two replicas that share its experts.
The last line is JSON: rows, bad_rows, the mean loss of the first and of the last ten steps, killed_after, resumed_from.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_diffgemma.repository import ROOT

STEPS, KILLED_AFTER, SAVED_EVERY = 200, 110, 25
CONVERSATIONS, HELD_OUT = 1200, 80
NETWORK = {
    "hidden_size": 96,
    "intermediate_size": 192,
    "sliding_window": 64,
    "canvas_length": 32,
    "max_position_embeddings": 1024,
    "initializer_range": 0.1,
}
LAYOUTS = {"two shards": ["parallel.tensor=2", "parallel.expert=2"], "two replicas": ["parallel.expert=2"]}


def rows() -> Iterator[dict[str, Any]]:
    """Conversations as messages: who speaks first is the user. Some have no answer; they are left to be noticed."""
    import chitchat_dataset

    for conversation in chitchat_dataset.Dataset().values():
        said = [message for turn in conversation["messages"] for message in turn]
        turns: list[dict[str, str]] = []
        for message in said:
            role = "user" if message["sender"] == said[0]["sender"] else "assistant"
            if turns and turns[-1]["role"] == role:
                turns[-1]["content"] += "\n" + message["text"]
            else:
                turns.append({"role": role, "content": message["text"]})
        if turns:
            yield {"messages": turns}


def write(folder: Path, conversations: int = CONVERSATIONS, held_out: int = HELD_OUT) -> None:
    """train.jsonl and held_out.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for _, row in zip(range(conversations + held_out), rows())]  # noqa: B905
    (folder / "held_out.jsonl").write_text("".join(lines[:held_out]))
    (folder / "train.jsonl").write_text("".join(lines[held_out:]))


def command(folder: Path, layout: list[str], steps: int = STEPS) -> list[str]:
    """`launch/train.py` on these files."""
    return [
        *(sys.executable, str(ROOT / "launch" / "train.py")),
        *("data=chat", f"data.train=[{folder}/train.jsonl]", f"data.validation=[{folder}/held_out.jsonl]"),
        *("data.vocabulary_size=2048", "data.global_batch_size=8"),
        *("model=sudoku", *(f"model.architecture.{name}={value}" for name, value in NETWORK.items())),
        *("data.tokens_per_micro_batch=4096", "data.max_length=512", "model.objective.canvases_per_example=4"),
        *("optim.lr=3e-3", "optim.warmup_steps=20", "optim.decay=constant"),
        *(f"trainer.max_steps={steps}", "trainer.validate_every=50", f"trainer.checkpoint_every={SAVED_EVERY}"),
        *(f"exp_manager.exp_dir={folder}", "exp_manager.name=runs", "exp_manager.version=chat", *layout),
    ]


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Lines of the run so far."""
    file = folder / "runs" / "chat" / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def train_and_kill(folder: Path, layout: list[str], steps: int = STEPS, killed_after: int = KILLED_AFTER) -> None:
    """Start a run and kill all of its processes once it has made so many steps."""
    process = subprocess.Popen(command(folder, layout, steps), stdout=subprocess.DEVNULL)
    try:
        while len(metrics(folder)) < killed_after:
            if process.poll() is not None:
                raise SystemExit(f"the run ended with code {process.returncode} before it could be killed")
            time.sleep(0.05)
    finally:
        process.kill()  # its ranks are killed with it
        process.wait()


def resume(folder: Path, layout: list[str], steps: int = STEPS) -> int:
    """Go on in another layout -> the step from which it went on."""
    saved = [int(place.name.removeprefix("step-")) for place in (folder / "runs/chat/checkpoints").glob("step-*")]
    subprocess.run(command(folder, layout, steps), stdout=subprocess.DEVNULL, check=True)
    return max(step for step in saved if step < steps)


def draw(folder: Path, before: list[dict[str, Any]], resumed_from: int, picture: Path) -> None:
    """Loss of both parts, and held-out canvas loss."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    first, second = LAYOUTS
    whole = metrics(folder)
    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    for lines, colour, label in (
        (before, "0.5", f"two processes as {first}, killed after step {len(before)}"),
        (whole[resumed_from:], "#76b900", f"resumed from step {resumed_from} as {second}"),
    ):
        axes.plot([line["step"] for line in lines], [line["loss"] for line in lines], color=colour, label=label)
    held_out = [json.loads(line) for line in (folder / "runs/chat/validation.jsonl").read_text().splitlines()]
    levels = [(line["step"], line["canvas_loss"]["0.5"]) for line in held_out]
    axes.plot(*zip(*levels, strict=True), "ko:", label="held-out canvas loss, half of the tokens replaced")
    axes.set(xlabel="optimizer step", ylabel="loss (nats a token)", title="chitchat-dataset, 0.86 M parameters")
    axes.legend()
    figure.savefig(picture, dpi=80)
    pyplot.close(figure)


def main() -> None:
    folder = Path(sys.argv[1]).absolute()
    write(folder)
    first, second = LAYOUTS.values()
    train_and_kill(folder, first)
    before = metrics(folder)
    resumed_from = resume(folder, second)
    draw(folder, before, resumed_from, ROOT / "docs" / "chitchat.png")
    losses = [line["loss"] for line in metrics(folder)]
    report = json.loads((folder / "runs/chat/data.json").read_text())
    found = {
        "rows": report["examples"],
        "bad_rows": report["bad_rows"],
        "first_steps": sum(losses[:10]) / 10,
        "last_steps": sum(losses[-10:]) / 10,
        "killed_after": len(before),
        "resumed_from": resumed_from,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
