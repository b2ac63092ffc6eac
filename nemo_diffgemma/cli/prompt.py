"""Generation after one prompt, as launch/generate.py and export/run.py do it: its options, its work, its JSON.

Exactly one of: prompt=TEXT, taken literally; prompt=- , read from standard input; prompt_file=FILE; prompt_ids=[2,10].
Text of a file or of standard input is UTF-8; one line end at its end, which editors and `echo` add, is no part of it.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from nemo_diffgemma.cli.output import Results
from nemo_diffgemma.repository import user_path
from nemo_diffgemma.schema import ConfigurationError, SamplerGroup


@dataclass(kw_only=True)
class PromptOptions:
    """Keys of a command that generates after one prompt."""

    prompt: str | None = field(default=None, metadata={"literal": True})  # -: from standard input
    prompt_file: str | None = None  # UTF-8
    prompt_ids: list[int] | None = None
    chat: bool = True  # wrap the prompt in the tokenizer's chat template, where it has one
    max_new_tokens: int | None = None  # rounded up to whole canvases; null: one canvas
    seed: int = 0
    show: bool = False  # print the canvas at every denoising step
    sampler: SamplerGroup = field(default_factory=SamplerGroup)

    def __post_init__(self) -> None:
        given = [name for name in ("prompt", "prompt_file", "prompt_ids") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigurationError(
                "give one of prompt='some text', prompt=- (standard input), prompt_file=FILE and "
                f"prompt_ids=[2,10,11], not {' and '.join(given) or 'none'}"
            )

    def read_prompt(self, launched: bool = False) -> None:
        """Put what a file or standard input holds into `prompt`. `launched`: other processes do the same.

        Raises `ConfigurationError` for what is no text.
        """
        if self.prompt_file is not None:
            try:
                content = user_path(self.prompt_file).read_bytes()
            except OSError as error:
                raise ConfigurationError(f"prompt_file={self.prompt_file} cannot be read: {error.strerror}") from None
            self.prompt, self.prompt_file = _text(content, f"prompt_file={self.prompt_file}"), None
        elif self.prompt == "-":
            if launched:
                raise ConfigurationError(
                    "prompt=- is read by one process, but a launcher has started several; give prompt_file=FILE"
                )
            self.prompt = _text(_standard_input(), "standard input (prompt=-)")


@cache
def _standard_input() -> bytes:
    """Once, also for the runs of a sweep."""
    return sys.stdin.buffer.read()


def _text(content: bytes, name: str) -> str:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{name} is not UTF-8 text ({error}); convert it, with iconv for instance") from None
    return text.removesuffix("\n").removesuffix("\r") if text.endswith("\n") else text


def generate_after_prompt(
    denoiser: Any, canvas_length: int, options: PromptOptions, results: Results
) -> tuple[dict[str, Any], float]:
    """Generate with a network or an engine, and show it -> the JSON of it, seconds."""
    import torch

    from nemo_diffgemma.cli.canvas_view import CanvasView
    from nemo_diffgemma.tokenizer import Text

    text = Text(denoiser.assets)
    ids = options.prompt_ids if options.prompt is None else text.encode(options.prompt, options.chat)
    if not ids:
        raise ConfigurationError("the prompt has no tokens; give at least one")
    began = time.perf_counter()
    generation = denoiser.generate(
        torch.tensor([ids]),
        max_new_tokens=canvas_length if options.max_new_tokens is None else options.max_new_tokens,
        sampler=denoiser.sampler_defaults.with_overrides(vars(options.sampler)),
        seed=options.seed,
        observe=CanvasView(results, text) if options.show else None,
    )
    seconds = time.perf_counter() - began
    new = generation.sequences[0, len(ids) :].tolist()
    answer = text.decode(new)
    results.show(" ".join(map(str, new)) if answer is None else answer)
    json = {
        "sequences": generation.sequences.tolist(),
        "text": answer,
        "forwards": generation.forwards.tolist(),
        "tokens_per_forward": generation.tokens_per_forward.tolist(),
    }
    return json, seconds
