"""From examples to batches: what every dataset of this package returns, and who gets which example at which step.

    dataset[index] -> Example;   Batches -> indices of a step;   collate -> Batch

    to_batch = partial(collate, canvas_length=16, eos_token_id=1, pad_token_id=0)
    DataLoader(dataset, batch_sampler=Batches(64, replica, replicas), collate_fn=to_batch)

Shapes: B examples of this batch, S tokens of its longest row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Example:
    """One prompt and its clean response, as token ids, before batching.

    `sample` is the index in the data stream: noise is keyed by it, so it must not depend on the layout.
    Raises ValueError where prompt or response is empty.
    """

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    sample: int

    def __post_init__(self) -> None:
        if not self.prompt or not self.response:
            raise ValueError(
                f"example {self.sample} has {len(self.prompt)} prompt and {len(self.response)} response tokens; "
                "both need at least 1: a prompt may be just <bos>, and an empty response is left out of the data"
            )


@dataclass(frozen=True, eq=False)
class Batch:
    """Examples as right-padded tensors.

    A row is its prompt, its response, <eos> up to a whole number of canvases, then padding. The <eos> fill is as real
    as the response (attended, corrupted, supervised): that is how a model learns to end. Row b has
    `(lengths_B[b] - prompt_lengths_B[b]) / canvas_length` canvases, without remainder.
    """

    tokens_BS: Tensor  # int64
    prompt_lengths_B: Tensor  # int64
    lengths_B: Tensor  # int64: prompt, response and fill; columns from here on are padding
    samples_B: Tensor  # int64: Example.sample of each row

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on `device`."""
        return Batch(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


def collate(examples: Sequence[Example], canvas_length: int, eos_token_id: int, pad_token_id: int) -> Batch:
    """A Batch of `examples`, in their order; S is the longest row, nothing is cut.

    Raises ValueError for no examples or a canvas shorter than 1.
    """
    if not examples:
        raise ValueError("no examples to collate; expected at least 1")
    if canvas_length < 1:
        raise ValueError(f"canvas_length={canvas_length}; expected at least 1, as in the model's config.json")
    rows = []
    for example in examples:
        fill = -len(example.response) % canvas_length
        rows.append([*example.prompt, *example.response, *[eos_token_id] * fill])
    longest = max(map(len, rows))
    return Batch(
        tokens_BS=torch.tensor([row + [pad_token_id] * (longest - len(row)) for row in rows]),
        prompt_lengths_B=torch.tensor([len(example.prompt) for example in examples]),
        lengths_B=torch.tensor([len(row) for row in rows]),
        samples_B=torch.tensor([example.sample for example in examples]),
    )


class Batches:
    """Which examples one data-parallel replica reads: a batch sampler that resumes by arithmetic.

    Step s of the run takes the indices s*G .. (s+1)*G-1, G = `global_batch_size`, whatever the layout; replica r of R
    has the r-th of R equal contiguous slices. Iterating yields the steps from `first_step` up to, not including,
    `steps`: the length of the whole run, so that a resumed run differs in `first_step` only (None: without end). Every
    iteration starts at `first_step` again.

    Raises ValueError where the batch does not divide, `replica` is not one of `replicas`, or the run ends before
    `first_step`.
    """

    def __init__(
        self, global_batch_size: int, replica: int, replicas: int, first_step: int = 0, steps: int | None = None
    ) -> None:
        if not 0 <= replica < replicas:
            raise ValueError(f"replica={replica} of replicas={replicas}; expected 0 <= replica < replicas")
        if global_batch_size < 1 or global_batch_size % replicas:
            below = global_batch_size // replicas * replicas
            advice = [f"data.global_batch_size={size}" for size in (below, below + replicas) if size > 0]
            raise ValueError(
                f"data.global_batch_size={global_batch_size} cannot be shared by {replicas} data-parallel replicas; "
                f"expected a positive multiple of {replicas}: use {' or '.join(advice)}"
            )
        if first_step < 0 or (steps is not None and steps < first_step):
            raise ValueError(
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
