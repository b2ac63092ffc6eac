"""Tokens of data files, made once and kept by the `datasets` library: memory-mapped, and found again by a fingerprint.

    table = prepare(files, encode, key="...")        # collective; rank 0 works, with a bar on standard error
    table.tokens(5), table.answers(5), table.bad_rows

`encode(row)` gives `Encoded` or raises `RowError`; bad rows are kept too, so that they are reported at every start. The
fingerprint covers name, size and time of the files, `key` (tokenizer, template and settings), and the code of this
folder: unchanged, nothing is tokenised again. The cache is that of `datasets`: HF_DATASETS_CACHE or HF_HOME move it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from nemo_diffgemma.data.bad_rows import BadRow, RowError
from nemo_diffgemma.data.chat_template import Encoded
from nemo_diffgemma.data.sources import rows_of
from nemo_diffgemma.parallel.agreement import all_or_none, is_rank_zero, on_rank_zero

Encode = Callable[[Any], Encoded]


class Table:
    """Rows of one source by position in `good`, those that can be learnt from; nothing is in memory but numbers."""

    def __init__(self, dataset: Any, files: Sequence[Path]) -> None:
        self._dataset, self.files = dataset, list(files)
        self._answers: np.ndarray = self._numbers("answer_tokens")
        self.lengths: np.ndarray = self._numbers("length")  # tokens of every row, 0 of bad ones
        self.good: np.ndarray = np.flatnonzero(self.lengths)

    def _numbers(self, column: str) -> np.ndarray:
        return self._dataset.data.column(column).to_numpy()

    def __len__(self) -> int:
        return len(self._dataset)

    def tokens(self, row: int, begin: int = 0, end: int | None = None) -> list[int]:
        """Tokens of a row of the file, or some of them."""
        value = self._dataset.data.column("tokens")[row].values
        return value[begin : len(value) if end is None else end].to_pylist()

    def answers(self, row: int) -> list[tuple[int, int]]:
        """(start, end) of the answers of a row."""
        edges = self._dataset.data.column("answers")[row].values.to_pylist()
        return list(zip(edges[::2], edges[1::2], strict=True))

    def canvases(self, canvas_length: int) -> np.ndarray:
        """Canvases of every row."""
        counts = [np.zeros(0, dtype=np.int64)]
        for chunk in self._dataset.data.column("answers").chunks:
            edges, offsets = chunk.flatten().to_numpy(), chunk.offsets.to_numpy()
            of_answers = -(-(edges[1::2] - edges[::2]).astype(np.int64) // canvas_length)
            before = np.concatenate([[0], of_answers.cumsum()])
            counts.append(np.diff(before[(offsets - offsets[0]) // 2]))
        return np.concatenate(counts)

    def place(self, row: int) -> tuple[str, int]:
        """File and line of a row."""
        columns = self._dataset.data
        return str(self.files[columns.column("file")[row].as_py()]), columns.column("line")[row].as_py()

    def bad_row(self, row: int, reason: str, detail: str) -> BadRow:
        """A row that is good, but not for this network."""
        return BadRow(*self.place(row), reason, detail)

    @cached_property
    def bad_rows(self) -> list[BadRow]:
        columns = self._dataset.data
        return [
            BadRow(*self.place(row), columns.column("reason")[row].as_py(), columns.column("note")[row].as_py())
            for row in np.flatnonzero(self.lengths == 0).tolist()
        ]

    @cached_property
    def notes(self) -> dict[str, int]:
        """What should be known of good rows, and of how many."""
        notes = self._dataset.data.column("note").take(self.good).to_numpy(zero_copy_only=False)
        names, counts = np.unique(notes.astype(str), return_counts=True)
        return {str(name): int(count) for name, count in zip(names, counts, strict=True) if name}

    @property
    def fingerprint(self) -> str:
        """Of what was prepared: equal where the rows have equal lengths and answers, wherever the files lie."""
        digest = hashlib.sha256(self.lengths.tobytes())
        digest.update(self._answers.tobytes())
        return digest.hexdigest()[:16]


def prepare(files: Sequence[Path], encode: Encode, key: str) -> Table:
    """The table of `files`. Collective: rank 0 makes it where it is not there, the others wait and open it.

    Where ranks do not share the cache's file system, one process a node makes it again; a lock keeps others waiting.
    """
    on_rank_zero(lambda: _dataset(files, encode, key) and None)
    with all_or_none():
        return Table(_dataset(files, encode, key), files)


def _dataset(files: Sequence[Path], encode: Encode, key: str) -> Any:
    import datasets

    columns = {
        "tokens": datasets.List(datasets.Value("int32")),
        "answers": datasets.List(datasets.Value("int32")),  # start, end, start, end, ...
        "length": datasets.Value("int64"),
        "answer_tokens": datasets.Value("int64"),
        "file": datasets.Value("int32"),
        "line": datasets.Value("int64"),
        "reason": datasets.Value("string"),
        "note": datasets.Value("string"),  # of a bad row what is wrong with it
    }
    with _quiet(datasets, bar=is_rank_zero()):
        return datasets.Dataset.from_generator(
            _encoded_rows,
            features=datasets.Features(columns),
            gen_kwargs={"files": tuple(files), "encode": encode},  # no list: that would be cut into shards
            fingerprint=_fingerprint(files, key),
        )


@contextlib.contextmanager
def _quiet(datasets: Any, bar: bool) -> Iterator[None]:
    """Without the library's bar where another process shows it."""
    shown = datasets.are_progress_bars_enabled() if hasattr(datasets, "are_progress_bars_enabled") else True
    (datasets.enable_progress_bars if bar else datasets.disable_progress_bars)()
    try:
        yield
    finally:
        (datasets.enable_progress_bars if shown else datasets.disable_progress_bars)()


def _encoded_rows(files: tuple[Path, ...], encode: Encode) -> Iterator[dict[str, Any]]:
    for number, file in enumerate(files):
        line = 0
        for line, row in rows_of(file):
            yield {"file": number, "line": line} | _columns(row, encode)
        if line == 0:
            yield {"file": number, "line": line} | _columns(RowError("empty file"), encode)


def _columns(row: Any, encode: Encode) -> dict[str, Any]:
    try:
        if isinstance(row, RowError):
            raise row
        made = encode(row)
    except RowError as error:
        empty: dict[str, Any] = {"tokens": [], "answers": [], "length": 0, "answer_tokens": 0}
        return empty | {"reason": error.reason, "note": error.detail[:500]}
    edges = [edge for answer in made.answers for edge in answer]
    return {
        "tokens": made.tokens,
        "answers": edges,
        "length": len(made.tokens),
        "answer_tokens": sum(end - start for start, end in made.answers),
        "reason": "",
        "note": made.note,
    }


def _fingerprint(files: Sequence[Path], key: str) -> str:
    digest = hashlib.sha256(key.encode())
    for file in files:
        stat = file.stat()
        digest.update(f"{file.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode(errors="surrogateescape"))
    for module in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(module.read_bytes())
    return digest.hexdigest()[:32]


def tokenizer_key(tokenizer: Any) -> str:
    """What the tokens of a text depend on."""
    state = tokenizer.backend_tokenizer.to_str() + str(tokenizer.chat_template) + os.linesep
    return hashlib.sha256(state.encode(errors="surrogatepass")).hexdigest()
