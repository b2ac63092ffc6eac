"""Tasks: one `Task` for each kind of data, chosen once by `data.kind`.

    task = task_of(config.data)
    task.open(network.assets);  task.prepare(network.model_config)
    task.training_examples(seed)[7];  task.held_out_examples(400)       # what is trained on, and what never is
    task.measures(network, budgets=[4, 16], seed=0)                     # what is measured beside the canvas loss

A new kind is one file, with a dataclass of its keys and a class derived from `Task`, and one line in `KINDS`. On the
command line `data=<kind>` chooses it; `conf/data/<name>.yaml` may hold other values of its keys.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from nemo_diffgemma.config import ModelConfig
from nemo_diffgemma.data.bad_rows import BadRow, summary
from nemo_diffgemma.data.example import Example
from nemo_diffgemma.errors import ConfigurationError

if TYPE_CHECKING:
    from nemo_diffgemma.diffusion_gemma import DiffusionGemma

KINDS = {  # data.kind -> the class, imported when it is asked for
    "sudoku": "nemo_diffgemma.data.sudoku_task:Sudoku",
    "chat": "nemo_diffgemma.data.chat_task:Chat",
    "text": "nemo_diffgemma.data.text_task:PlainText",
}


@dataclass
class DataGroup:
    """What is trained on: keys of every kind. `global_batch_size` counts examples of one step over all replicas."""

    kind: str = "sudoku"
    global_batch_size: int = 64
    micro_batch_size: int = 0  # examples of one forward pass of one replica; 0: its whole share
    tokens_per_micro_batch: int = 0  # instead: tokens of one pass, of rows and the canvases scored of them


class Measures(NamedTuple):
    """What a task finds in a network: `values` for JSON, and a table for a reader (none without a header)."""

    values: dict[str, Any]
    title: str = ""
    header: list[str] = []
    rows: list[list[Any]] = []


class DataReport(NamedTuple):
    """What is in the files of a run."""

    examples: dict[str, int]  # by what they are for: train, validation
    bad_rows: list[BadRow]
    notes: dict[str, int]  # what should be known of rows that are used, and of how many
    fingerprint: str  # of what is trained on

    def __str__(self) -> str:
        counts = ", ".join(f"{count} examples for {name}" for name, count in self.examples.items() if count)
        notes = [f"in {count} rows {note}" for note, count in self.notes.items()]
        return "; ".join(part for part in (counts, summary(self.bad_rows), *notes) if part)


class Task(ABC):
    """A kind of data: its examples, how they read as text, and what to measure. Made from its group of keys.

    The constructor raises `ConfigurationError` for keys with which there are no such data.
    """

    keys: ClassVar[type[DataGroup]]  # the dataclass of this kind's keys
    eos_token_id: int | list[int]  # sampler settings of a network trained from scratch
    pad_token_id: int
    validated: ClassVar[tuple[str, ...]] = ()  # what `validate` measures, which may choose the best checkpoint
    fills_rows: ClassVar[bool] = True  # an answer that ends its row is filled up to whole canvases in the context, too

    chat_template: str | None = None  # that came with the data, not with the checkpoint; known after `open`

    def __init__(self, data: Any) -> None:
        self.data = data

    @abstractmethod
    def training_example(self, seed: int, index: int) -> Example:
        """A pure function; `Example.sample` differs for every (seed, index), since noise is keyed by it."""

    @abstractmethod
    def held_out_examples(self, wanted: int | None = None) -> Sequence[Example]:
        """The first `wanted` examples that are never trained on; None: all of them."""

    def training_examples(self, seed: int) -> TrainingExamples:
        """The endless stream of a seed."""
        return TrainingExamples(self, seed)

    def size(self, seed: int, index: int, canvas_length: int) -> tuple[int, int]:
        """Tokens and canvases of a training example, for packing; a task that knows them without making it says so."""
        example = self.training_example(seed, index)
        canvases = sum(-(-(end - start) // canvas_length) for start, end in example.answers)
        start, end = example.answers[-1]
        fill = -(end - start) % canvas_length if self.fills_rows and end == len(example.tokens) else 0
        return len(example.tokens) + fill, canvases

    def largest(self, canvases: int) -> int | None:
        """Tokens of the largest training example with so many of its canvases (0: all); None where nobody knows."""
        return None

    def tokenizer(self) -> Any:
        """A Hugging Face tokenizer for a network trained from scratch; None: it takes token ids only."""
        return None

    def open(self, assets: Path | None) -> None:  # noqa: B027  a task may have ids of its own
        """Take the tokenizer in `assets`, or for a network from scratch (None) one's own. Collective, and done once."""

    def architecture(self) -> dict[str, Any]:
        """Fields of `ModelConfig` that the tokenizer of a network from scratch decides."""
        return {}

    def prepare(self, model: ModelConfig) -> None:  # noqa: B027  a task may have nothing to read
        """Read the data for a network; again for the same one it is nothing. Collective, after `open`.

        Raises `ConfigurationError` where there are no such data, or the network cannot read them.
        """

    def report(self) -> DataReport | None:
        """What was found in files, after `prepare`; None for data that come from none."""
        return None

    def messages(self, seed: int, sample: int, held_out: bool = False) -> list[tuple[str, str]]:
        """(role, text) of what an example is made of, for a reader; none where nobody speaks."""
        return []

    def measures(self, network: DiffusionGemma, budgets: Sequence[int], seed: int, batch_size: int = 400) -> Measures:
        """What `launch/evaluate.py` reports beside the canvas loss, by budget of denoising steps. Collective."""
        return Measures({})

    def answer_start(self, example: Example, canvas_length: int) -> int:
        """Where the answer begins that a network is asked for: the tokens before are its prompt."""
        return example.answers[-1][0]

    def is_right(self, example: Example, answer: Sequence[int], reference: Sequence[int]) -> bool | None:
        """Whether an answer is right, both without what ends them; None where nobody can say."""
        return list(answer) == list(reference)

    def validate(self, network: DiffusionGemma, examples: int, seed: int) -> dict[str, float]:
        """What goes into a line of `validation.jsonl` beside the canvas loss, on so many examples. Collective."""
        return {}


class TrainingExamples:
    """The stream of one seed, as torch's DataLoader reads it: by index, or by a list of them, without end."""

    def __init__(self, task: Task, seed: int) -> None:
        self.task, self.seed = task, seed

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, list):
            return [self.task.training_example(self.seed, one) for one in index]
        return self.task.training_example(self.seed, index)


def task_class(kind: str) -> type[Task]:
    """The class of a kind of data. Raises `ConfigurationError` for one that does not exist."""
    if kind not in KINDS:
        raise ConfigurationError(f"data.kind={kind!r}; use one of {', '.join(KINDS)}")
    module, _, name = KINDS[kind].partition(":")
    return getattr(importlib.import_module(module), name)


def task_of(data: DataGroup) -> Task:
    """The task of a run. Raises `ConfigurationError` where its keys do not make one."""
    task = task_class(data.kind)
    if not isinstance(data, task.keys):
        raise ConfigurationError(
            f"data.kind={data.kind!r} with the keys of {type(data).__name__}; choose both with data={data.kind}"
        )
    return task(data)


def default_data() -> DataGroup:
    """The keys of the kind that a run is about if nobody says which."""
    return task_class(DataGroup.kind).keys()


def fill_id(model: ModelConfig) -> int:
    """The id that fills the last canvas of an answer."""
    return model.eos_token_id if isinstance(model.eos_token_id, int) else model.eos_token_id[0]
