"""Serve the model of `make demo`: five puzzles asked through OpenAI's client, one of them watched as it settles.

    make serve-demo
    make serve-demo ARGS="checkpoint=runs/sudoku_cpu/mine/checkpoints/step-1300 port=8000"

On a terminal the server stays until Ctrl-C, and the page at its address can be visited; elsewhere, or with stay=false,
it ends. Without a checkpoint the demo takes the newest one under runs/sudoku_cpu, and trains a shorter one where there
is none. The last line is JSON: url, checkpoint, solved, of, seconds. The exit code is 1 where the same seed gave the
stream another answer than a whole reply.
"""

from __future__ import annotations

import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nemo_diffgemma.cli.demo_checkpoint import demo_checkpoint
from nemo_diffgemma.cli.output import Results, table
from nemo_diffgemma.cli.start import start
from nemo_diffgemma.schema import ConfigurationError
from nemo_diffgemma.serving.started import serving

PUZZLES = 5
SHORT = 800  # steps of the demo, where it has not run
WATCHED = 0.25  # seconds that a step is shown for on a terminal
COLOURS = ((0.1, "green"), (0.5, "cyan"), (1.0, "yellow"))  # entropies below, in nats; else red


@dataclass
class ServeDemoConfig:
    """Configuration of `launch/serve_demo.py`."""

    checkpoint: str | None = None  # of the demo
    port: int = 0  # 0: any that is free
    stay: bool | None = None  # serve on after the puzzles; null: on a terminal

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ConfigurationError(f"port={self.port}; expected 0 (any that is free) to 65535")


def serve_demo(config: ServeDemoConfig, results: Results) -> dict[str, Any]:
    """Serve, ask, watch."""
    from openai import OpenAI

    from nemo_diffgemma.data.sudoku import SudokuTask

    began = time.time()
    checkpoint = demo_checkpoint(config.checkpoint, results, SHORT)
    puzzles = [puzzle for puzzle, _ in SudokuTask().test_set[:PUZZLES]]
    results.show(f"$ python launch/serve.py checkpoint={checkpoint} port={config.port}\n")
    with serving(checkpoint, f"port={config.port}") as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        answers = [ask(client, puzzle, seed) for seed, puzzle in enumerate(puzzles)]
        results.show(f"Five puzzles whose solutions were never trained on, through openai.OpenAI({url}/v1)\n")
        rows = [row(puzzle, answer) for puzzle, answer in zip(puzzles, answers, strict=True)]
        results.show(table(["puzzle", "answer", "solved", "steps", "tokens a step"], rows) + "\n")
        streamed = watch(client, puzzles[0], 0, results)
        if streamed != answers[0].text:
            results.show(f"the stream gave {streamed}, the whole reply {answers[0].text}")
            results.exit_code = 1
        if config.stay if config.stay is not None else sys.stdin.isatty() and results.is_terminal:
            results.show(f"the page: {url}/\n")
            results.show("Ctrl-C ends the server.")
            wait_for_interrupt()
    solved = sum(is_solved(puzzle, answer) for puzzle, answer in zip(puzzles, answers, strict=True))
    seconds = round(time.time() - began, 1)
    return {"url": url, "checkpoint": checkpoint, "solved": solved, "of": PUZZLES, "seconds": seconds}


def wait_for_interrupt() -> None:
    """Until Ctrl-C, which is no end before the time here: the last line follows."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        signal.sigwait({signal.SIGINT})
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def ask(client: Any, puzzle: tuple[int, ...], seed: int, **more: Any) -> Any:
    """The answer to a puzzle, or the stream of it."""
    given = dict(model="default", prompt=text_of(puzzle), max_tokens=len(puzzle), seed=seed, **more)
    answer = client.completions.create(**given)
    return answer if more else answer.choices[0]


def text_of(puzzle: tuple[int, ...]) -> str:
    return "".join(str(digit or ".") for digit in puzzle)


def is_solved(puzzle: tuple[int, ...], answer: Any) -> bool:
    from nemo_diffgemma.data.sudoku import decode_response, is_solution

    grid = decode_response(answer.diffusion["token_ids"])
    return grid is not None and is_solution(puzzle, grid)


def row(puzzle: tuple[int, ...], answer: Any) -> list[Any]:
    steps = answer.diffusion["steps"]
    solved = "yes" if is_solved(puzzle, answer) else "no"
    return [text_of(puzzle), answer.text, solved, steps, f"{len(answer.diffusion['token_ids']) / steps:.1f}"]


def watch(client: Any, puzzle: tuple[int, ...], seed: int, results: Results) -> str:
    """Show the canvas after each step, accepted cells in [brackets] -> the text of the stream."""
    results.show("The first once more, streamed with its drafts: all cells at once, [accepted] where certain enough,")
    results.show("coloured by entropy (on a terminal)\n")
    text, number = "", 0
    for chunk in ask(client, puzzle, seed, stream=True, extra_body={"stream_options": {"drafts": True}}):
        draft = (getattr(chunk, "diffusion", None) or {}).get("draft")
        if draft is None:
            text += "".join(choice.text for choice in chunk.choices)
            continue
        number += 1
        results.show(drawn(number, draft, results.colours))
        if results.is_terminal:
            time.sleep(WATCHED)
    results.show("")
    return text


def drawn(number: int, draft: dict[str, Any], colours: bool) -> str:
    """A draft on one line."""
    from rich.console import Console
    from rich.text import Text

    line = Text(f"step {number:2}  {sum(draft['accepted']):2} of {len(draft['accepted'])}  ")
    for piece, accepted, entropy in zip(draft["pieces"], draft["accepted"], draft["entropy"], strict=True):
        colour = next((colour for bound, colour in COLOURS if entropy < bound), "red")
        line.append(f"[{piece}]" if accepted else f" {piece} ", style=f"bold {colour}" if accepted else colour)
    console = Console(force_terminal=colours, no_color=not colours, width=200, highlight=False)
    with console.capture() as captured:
        console.print(line)
    return captured.get().rstrip("\n")


if __name__ == "__main__":
    start(serve_demo, ServeDemoConfig, "serve_demo")
