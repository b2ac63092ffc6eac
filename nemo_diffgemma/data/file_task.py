"""What tasks have in common whose examples come from files: sources with weights, tokenizer, bad rows.

Chat and text derive from `FileTask`: chat_task.py, text_task.py.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nemo_diffgemma.config import ModelConfig
from nemo_diffgemma.data import bad_rows, text_tokenizer
from nemo_diffgemma.data.bad_rows import BadRow, RowError
from nemo_diffgemma.data.example import Example
from nemo_diffgemma.data.order import Order
from nemo_diffgemma.data.prepared import Table, prepare, tokenizer_key
from nemo_diffgemma.data.sources import files_of, rows_of
from nemo_diffgemma.data.tasks import DataGroup, DataReport, Task
from nemo_diffgemma.errors import ConfigurationError
from nemo_diffgemma.parallel.agreement import all_or_none, on_rank_zero
from nemo_diffgemma.repository import user_path
from nemo_diffgemma.tokenizer import Text


@dataclass
class FileData(DataGroup):
    """Keys of kinds that read files. An entry is a file, a pattern or a directory; each is a source of its own."""

    train: list[str] = field(default_factory=list)
    validation: list[str] = field(default_factory=list)  # never trained on
    weights: list[float] = field(default_factory=list)  # shares of the entries of train; none: every example alike
    tokenizer: str | None = None  # directory; null: the checkpoint's, else one is trained on the data
    vocabulary_size: int = 8192  # of a tokenizer that is trained here
    max_length: int = 0  # tokens of an example; 0: see the kind
    bad_rows: str = "skip"  # or fatal: rows that cannot be used


class Units(NamedTuple):
    """Examples in a table."""

    places: np.ndarray  # [n, 3]: row of the table, first and last token of it (excluded)
    sizes: np.ndarray  # [n, 2]: tokens and canvases of the example
    unfit: list[BadRow]  # rows that this network cannot have


class Source:
    """The examples of one entry of files."""

    def __init__(self, entry: str, table: Table, units: Units) -> None:
        self.entry, self.table, self.units, self.sizes = entry, table, units.places, units.sizes
        self.bad_rows = [*table.bad_rows, *units.unfit]

    def __len__(self) -> int:
        return len(self.units)


class FileTask(Task):
    """Examples from files. `open` takes a tokenizer, `prepare` reads the files for a network; both are collective."""

    fills_rows = False
    data: FileData

    def __init__(self, data: FileData) -> None:
        super().__init__(data)
        self._check_keys()
        self._files = {key: self._entries(key) for key in ("train", "validation")}
        self._tokenizer: Any = None
        self._model: ModelConfig | None = None
        self._train: list[Source] = []
        self._validation: list[Source] = []
        self._order = lru_cache(maxsize=2)(self._order_of)

    def _check_keys(self) -> None:
        data = self.data
        if data.bad_rows not in ("skip", "fatal"):
            raise ConfigurationError(f"data.bad_rows={data.bad_rows!r}; use 'skip' or 'fatal'")
        if data.weights and (len(data.weights) != len(data.train) or min(data.weights) <= 0):
            raise ConfigurationError(
                f"data.weights={data.weights} for the {len(data.train)} entries of data.train; expected one positive "
                "number for each, or none"
            )
        if data.max_length < 0 or data.vocabulary_size < 1:
            raise ConfigurationError(
                f"data.max_length={data.max_length}, data.vocabulary_size={data.vocabulary_size}; expected 0 or more, "
                "and at least 1"
            )
        if data.tokenizer is not None and not (user_path(data.tokenizer) / "tokenizer.json").is_file():
            raise ConfigurationError(
                f"data.tokenizer={data.tokenizer} has no tokenizer.json; give a directory as save_pretrained writes it"
            )
        if not data.train and not data.validation:
            raise ConfigurationError(
                f"data={data.kind} needs files: data.train=[FILES], and data.validation=[FILES] to measure on"
            )

    def _entries(self, key: str) -> list[tuple[str, list[Path]]]:
        with_text = self.data.kind == "text"
        return [
            (entry, files_of(entry, f"data.{key}[{index}]", with_text))
            for index, entry in enumerate(getattr(self.data, key))
        ]

    # -- what a kind says ----------------------------------------------------------------------------------------

    @abstractmethod
    def encoder(self) -> Any:
        """`encode(row)` for `prepare`, with the tokenizer that is open."""

    @abstractmethod
    def texts(self, row: Any) -> Iterator[str]:
        """Texts of a row, for training a tokenizer."""

    @abstractmethod
    def units(self, table: Table, model: ModelConfig) -> Units:
        """Examples in a table, for a network."""

    @abstractmethod
    def example(self, table: Table, unit: np.ndarray, sample: int) -> Example:
        """One of them."""

    # -- tokenizer -----------------------------------------------------------------------------------------------

    def open(self, assets: Path | None) -> None:
        if self._tokenizer is not None:
            return
        with all_or_none():
            tokenizer = self._found(assets)
        self._tokenizer = tokenizer if tokenizer is not None else self._trained()
        if self._tokenizer.eos_token_id is None:
            raise ConfigurationError(
                f"the tokenizer in {self.data.tokenizer or assets} names no eos_token, which fills canvases behind an "
                "answer; name it in tokenizer_config.json"
            )
        self.eos_token_id, self.pad_token_id = self.stops(), self._tokenizer.pad_token_id or 0

    def _found(self, assets: Path | None) -> Any:
        """The tokenizer that is given, else that of the checkpoint; None where there is none."""
        own = Text(assets).tokenizer
        given = None if self.data.tokenizer is None else Text(user_path(self.data.tokenizer)).tokenizer
        if own is not None and given is not None and own.get_vocab() != given.get_vocab():
            raise ConfigurationError(
                f"data.tokenizer={self.data.tokenizer} has another vocabulary than the tokenizer in {assets}, with "
                "which the network was trained; leave data.tokenizer out"
            )
        if own is None and given is None and assets is not None:
            raise ConfigurationError(f"{assets} has no tokenizer.json; give data.tokenizer=DIRECTORY")
        return own if given is None else given

    def _trained(self) -> Any:
        """A tokenizer trained on data.train by rank 0."""
        if not self.data.train:
            raise ConfigurationError("no tokenizer: give data.tokenizer=DIRECTORY, or data.train to train one on")

        def train() -> str:
            return text_tokenizer.train(_TextsOf(self), self.data.vocabulary_size)

        return text_tokenizer.from_json(on_rank_zero(train))

    def training_texts(self) -> Iterator[str]:
        """All texts of data.train, from the files; rows that cannot be used are left out."""
        for row in (row for _, files in self._files["train"] for file in files for _, row in rows_of(file)):
            try:
                if not isinstance(row, RowError):
                    yield from self.texts(row)
            except RowError:
                continue

    def tokenizer(self) -> Any:
        return self._tokenizer

    def architecture(self) -> dict[str, Any]:
        tokenizer = self._tokenizer
        sizes = {
            "vocab_size": max(len(tokenizer), 1 + max(tokenizer.get_vocab().values())),
            "eos_token_id": self.eos_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        return {name: value for name, value in sizes.items() if value is not None}

    def stops(self) -> list[int]:
        """Tokens at which a network from scratch ends its answers; the first fills canvases."""
        return [self._tokenizer.eos_token_id]

    # -- reading -------------------------------------------------------------------------------------------------

    def prepare(self, model: ModelConfig) -> None:
        if self._model is not None and self._model == model:
            return
        assert self._tokenizer is not None, "open comes first"
        self._check_network(model)
        self._model = model  # the encoder asks for it
        self._train, self._validation = self._sources("train", model), self._sources("validation", model)
        self._order.cache_clear()

    def _check_network(self, model: ModelConfig) -> None:
        largest = max(self._tokenizer.get_vocab().values())
        if largest >= model.vocab_size:
            raise ConfigurationError(
                f"the tokenizer has token ids up to {largest}, but the network has vocab_size={model.vocab_size}: it "
                "is not this network's tokenizer; leave data.tokenizer out, or give the right one"
            )
        if self.data.max_length > model.max_position_embeddings:
            raise ConfigurationError(
                f"data.max_length={self.data.max_length}, but the network has {model.max_position_embeddings} "
                "positions; use at most that, or 0"
            )

    def _sources(self, key: str, model: ModelConfig) -> list[Source]:
        encode, sources = self.encoder(), []
        cache_key = f"{self.data.kind} {tokenizer_key(self._tokenizer)} {sorted(self._ends(model))}"
        for entry, files in self._files[key]:
            table = prepare(files, encode, cache_key)
            sources.append(Source(entry, table, self.units(table, model)))
        for index, source in enumerate(sources):
            bad_rows.check(source.bad_rows, self.data.bad_rows, len(source), f"data.{key}[{index}]={source.entry}")
        return sources

    def _ends(self, model: ModelConfig) -> set[int]:
        """Tokens at which generation stops."""
        ends = [model.eos_token_id] if isinstance(model.eos_token_id, int) else model.eos_token_id
        return {self._tokenizer.eos_token_id, *ends}

    # -- examples ------------------------------------------------------------------------------------------------

    def _order_of(self, seed: int) -> Order:
        if not self._train:
            raise ConfigurationError(f"data={self.data.kind} has nothing to train on: give data.train=[FILES]")
        return Order([len(source) for source in self._train], self.data.weights or None, seed)

    def _trained_on(self, seed: int, index: int) -> tuple[Source, np.ndarray]:
        """Where the training example at an index comes from."""
        source, position = self._order(seed).at(index)
        return self._train[source], self._train[source].units[position]

    def _held_out(self, wanted: int | None = None) -> list[tuple[Source, np.ndarray]]:
        """Where the first held-out examples come from."""
        return [(source, unit) for source in self._validation for unit in source.units[:wanted]][:wanted]

    def training_example(self, seed: int, index: int) -> Example:
        source, unit = self._trained_on(seed, index)
        return self.example(source.table, unit, index)

    def size(self, seed: int, index: int, canvas_length: int) -> tuple[int, int]:
        assert self._model is not None and canvas_length == self._model.canvas_length
        source, position = self._order(seed).at(index)
        tokens, canvases = self._train[source].sizes[position].tolist()
        return tokens, canvases

    def largest(self, canvases: int) -> int | None:
        assert self._model is not None
        sizes = np.concatenate([source.sizes for source in self._train])
        scored = np.minimum(sizes[:, 1], canvases) if canvases else sizes[:, 1]
        return int((sizes[:, 0] + scored * self._model.canvas_length).max())

    def held_out_examples(self, wanted: int | None = None) -> Sequence[Example]:
        if not self._validation:
            raise ConfigurationError(
                f"data={self.data.kind} has no held-out examples: give data.validation=[FILES], or measure nothing "
                "during training with trainer.validate_every=0"
            )
        places = self._held_out(wanted)
        return [self.example(source.table, unit, sample) for sample, (source, unit) in enumerate(places)]

    def report(self) -> DataReport:
        digest = hashlib.sha256("".join(source.table.fingerprint for source in self._train).encode())
        return DataReport(
            {"train": sum(map(len, self._train)), "validation": sum(map(len, self._validation))},
            [row for source in (*self._train, *self._validation) for row in source.bad_rows],
            _sum(source.table.notes for source in (*self._train, *self._validation)),
            digest.hexdigest()[:16],
        )

    @property
    def sources(self) -> dict[str, list[Source]]:
        """What was prepared, for a look at it."""
        return {"train": self._train, "validation": self._validation}


class _TextsOf:
    """They can be read more than once."""

    def __init__(self, task: FileTask) -> None:
        self.task = task

    def __iter__(self) -> Iterator[str]:
        return self.task.training_texts()


def _sum(counts: Iterator[dict[str, int]] | Any) -> dict[str, int]:
    total: dict[str, int] = {}
    for count in counts:
        for name, number in count.items():
            total[name] = total.get(name, 0) + number
    return total
