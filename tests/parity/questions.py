"""What the network is asked, here, in every layout and on GPUs, and how transformers answers.

A question is a canvas after a context: `cases.logits` takes its fields. One module makes them, so that what is equal on
one process is the same thing that is equal on four.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from tests.reference import SIZES, multi_canvas

TOLERANCE = 1e-4
"""Largest difference of two float32 logits that lie in (-30, 30)."""

SUBLAYERS = dict.fromkeys(SIZES, 1.0) | {"deep": 0.2}
"""Seven undamped random layers amplify rounding so far that float32 itself is not good to 1e-4: the reference is up to
2.0e-4 away from itself in float64, we are 1.7e-4, and of seeds 0 to 4 two differ from us by 1.2e-4 and 1.5e-4. With a
fifth of the weight on the norms behind the sublayers the reference is good to 2e-5. Three layers differ from us by up
to 3e-5 as they are."""

KINDS = ("plain", "signal", "padded", "after_1_canvas", "after_3_canvases")


@dataclasses.dataclass(frozen=True)
class Question:
    """Context, finished canvases and a canvas; B rows of S tokens, canvases of C."""

    input_ids: Tensor
    canvas: Tensor
    attention_mask: Tensor | None = None
    self_conditioning_logits: Tensor | None = None
    finished: tuple[Tensor, ...] = ()

    def asked(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def contexts(size: str) -> tuple[int, ...]:
    """Context lengths below, at and above the sliding window."""
    window = SIZES[size]["sliding_window"]
    return (1, 5, window - 1, window, window + 1, 20)


def question(reference: Any, kind: str, context: int, rows: int = 3, seed: int = 1) -> Question:
    """A question of `KINDS`. Rows have different padding where `kind` has any: none, some, all but one token."""
    vocabulary, length = reference.config.text_config.vocab_size, reference.config.canvas_length
    generator = torch.Generator().manual_seed(seed)

    def ids(tokens: int) -> Tensor:
        return torch.randint(vocabulary, (rows, tokens), generator=generator)

    made = Question(ids(context), ids(length))
    if kind != "plain":
        signal = 5 * torch.randn(rows, length, vocabulary, generator=generator)
        made = dataclasses.replace(made, self_conditioning_logits=signal)
    if kind not in ("plain", "signal"):
        padding = torch.tensor([0, context // 2, context - 1])[:, None]
        made = dataclasses.replace(made, attention_mask=(torch.arange(context) >= padding).long())
    if kind.startswith("after"):
        made = dataclasses.replace(made, finished=tuple(ids(length) for _ in range(int(kind.split("_")[1]))))
    return made


def answer(reference: Any, asked: Question) -> Tensor:
    """Logits [B, C, V] of transformers."""
    return multi_canvas(
        reference,
        asked.input_ids,
        list(asked.finished),
        asked.canvas,
        asked.attention_mask,
        asked.self_conditioning_logits,
    )
