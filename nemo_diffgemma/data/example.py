"""Examples and batches: what every dataset returns, and which replica gets which example at which step.

dataset[index] -> Example;   Batches -> indices of a step;   collate -> Rows

to_rows = partial(collate, canvas_length=16, fill_id=1)
DataLoader(dataset, batch_sampler=Batches(64, replica, replicas), collate_fn=to_rows)
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from nemo_diffgemma.diffusion.rows import Rows, check_answers
from nemo_diffgemma.errors import UserError


@dataclass(frozen=True)
class Example:
    """A row before batching: clean token ids, and which of them are answers: (start, end) each, in order.

    `sample` is the index in the data stream: noise is keyed by it, so it must not depend on the layout.
    Raises `UserError` where an answer is empty, has no context before it or lies outside of the tokens.
    """

    tokens: tuple[int, ...]
    answers: tuple[tuple[int, int], ...]
    sample: int

    def __post_init__(self) -> None:
        try:
            check_answers(self.answers, len(self.tokens))
        except UserError as error:
            raise UserError(f"example {self.sample}: {error}") from None


def collate(examples: Sequence[Example], canvas_length: int, fill_id: int, fills_rows: bool = False) -> Rows:
    """The rows of `examples`, in their order; nothing is cut or padded.

    Where `fills_rows`, an answer that ends its row goes on with `fill_id` up to a whole number of canvases, as in the
    published recipe for a prompt and its response: the encoder's loss has the fill, too.

    Raises `UserError` for no examples or a canvas shorter than 1.
    """
    if not examples:
        raise UserError("no examples to collate; expected at least 1")
    if canvas_length < 1:
        raise UserError(f"canvas_length={canvas_length}; expected at least 1, as in the model's config.json")
    tokens: list[int] = []
    lengths, answers = [], []
    for example in examples:
        length, spans = len(example.tokens), list(example.answers)
        tokens += example.tokens
        start, end = spans[-1]
        if fills_rows and end == length:
            fill = -(end - start) % canvas_length
            tokens += [fill_id] * fill
            length, spans[-1] = length + fill, (start, end + fill)
        lengths.append(length)
        answers.append(spans)
    return Rows(torch.tensor(tokens), answers, lengths, [example.sample for example in examples], fill_id)


def collate_packed(passes: Sequence[Sequence[Example]], **settings: Any) -> Rows:
    """The rows of the examples of several passes; settings as those of `collate`."""
    rows = collate([example for examples in passes for example in examples], **settings)
    return replace(rows, passes=[len(examples) for examples in passes])


class Batches:
    """Which examples one data-parallel replica reads: a batch sampler that resumes by arithmetic.

    Step s of the run takes the indices s*G .. (s+1)*G-1, G = `global_batch_size`, whatever the layout; replica r of R
    has the r-th of R equal contiguous slices. Iterating yields the steps from `first_step` up to, not including,
    `steps`: the length of the whole run, so that a resumed run differs in `first_step` only (None: without end). Every
    iteration starts at `first_step` again.

    Raises `UserError` where the batch does not divide, `replica` is not one of `replicas`, or the run ends before
    `first_step`.
    """

    def __init__(
        self, global_batch_size: int, replica: int, replicas: int, first_step: int = 0, steps: int | None = None
    ) -> None:
        if not 0 <= replica < replicas:
            raise UserError(f"replica={replica} of replicas={replicas}; expected 0 <= replica < replicas")
        if global_batch_size < 1 or global_batch_size % replicas:
            below = global_batch_size // replicas * replicas
            advice = [f"data.global_batch_size={size}" for size in (below, below + replicas) if size > 0]
            raise UserError(
                f"data.global_batch_size={global_batch_size} cannot be shared by {replicas} data-parallel replicas; "
                f"expected a positive multiple of {replicas}: use {' or '.join(advice)}"
            )
        if first_step < 0 or (steps is not None and steps < first_step):
            raise UserError(
                f"first_step={first_step} in a run of steps={steps}; expected 0 <= first_step <= steps, counted "
                f"from the start of the run: use trainer.max_steps={max(first_step, 0)} or more"
            )
        self.global_batch_size = global_batch_size
        self.replica = replica
        self.replicas = replicas
        self.first_step = first_step
        self.steps = steps

    def __iter__(self) -> Iterator[list[int]]:
        size = self.global_batch_size // self.replicas
        step = self.first_step
        while self.steps is None or step < self.steps:
            start = step * self.global_batch_size + self.replica * size
            yield list(range(start, start + size))
            step += 1

    def __len__(self) -> int:
        """Number of steps from `first_step` on. Raises TypeError where there is no end, as Python does."""
        if self.steps is None:
            raise TypeError("Batches without steps has no length; give steps= (trainer.max_steps)")
        return self.steps - self.first_step
