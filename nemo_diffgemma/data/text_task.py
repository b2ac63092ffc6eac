"""Plain text as the task of a run: `data=text data.train=[FILES]`, for pre-training and its continuation.

A document is a row's `text` in JSON Lines, Parquet or Arrow, or a whole .txt file. An example is <bos> and a document
with <eos> behind it, all of it one answer; a longer document is cut into pieces of whole canvases, of at most
`data.max_length` tokens (0: 2048, or the network's positions where these are fewer).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nemo_diffgemma.config import ModelConfig
from nemo_diffgemma.data.bad_rows import RowError
from nemo_diffgemma.data.chat_template import Encoded
from nemo_diffgemma.data.example import Example
from nemo_diffgemma.data.file_task import FileData, FileTask, Units
from nemo_diffgemma.data.prepared import Table
from nemo_diffgemma.errors import ConfigurationError
from nemo_diffgemma.json_files import brief

_LENGTH = 2048


@dataclass
class TextData(FileData):
    """Keys of `data` for plain text."""

    kind: str = "text"


class PlainText(FileTask):
    """Documents, each an answer of its own."""

    keys = TextData

    def open(self, assets: Any) -> None:
        super().open(assets)
        if self._tokenizer.bos_token_id is None:
            raise ConfigurationError(
                f"the tokenizer in {self.data.tokenizer or assets} names no bos_token, the context of a document; name "
                "it in tokenizer_config.json"
            )

    def encoder(self) -> Any:
        tokenizer = self._tokenizer

        def encode(row: Any) -> Encoded:
            try:
                ids = tokenizer(_text(row), add_special_tokens=False).input_ids
            except RowError:
                raise
            except Exception as error:  # the tokenizers library raises nothing more special
                raise RowError("unknown characters", " ".join(str(error).split())) from None
            return Encoded([*ids, tokenizer.eos_token_id], [(0, len(ids) + 1)])

        return encode

    def texts(self, row: Any) -> Iterator[str]:
        yield _text(row)

    def answer_start(self, example: Example, canvas_length: int) -> int:
        """A document is gone on with from its middle, in whole canvases."""
        (start, end), *_ = example.answers
        return start + (end - start) // canvas_length // 2 * canvas_length

    def is_right(self, example: Example, answer: Sequence[int], reference: Sequence[int]) -> None:
        """There are many ways to go on."""
        return None

    def units(self, table: Table, model: ModelConfig) -> Units:
        limit = self.data.max_length or min(_LENGTH, model.max_position_embeddings)
        size = (limit - 1) // model.canvas_length * model.canvas_length
        if size < 1:
            raise ConfigurationError(
                f"data.max_length={limit} has no room for <bos> and a canvas; use at least {model.canvas_length + 1}"
            )
        lengths = table.lengths[table.good]
        counts = -(-lengths // size)
        rows = np.repeat(table.good, counts)
        first = np.repeat(np.cumsum(counts) - counts, counts)  # the first piece of each row, among all pieces
        begins = (np.arange(len(rows)) - first) * size
        ends = np.minimum(begins + size, np.repeat(lengths, counts))
        sizes = np.stack([1 + ends - begins, -(-(ends - begins) // model.canvas_length)], axis=1)
        return Units(np.stack([rows, begins, ends], axis=1), sizes, [])

    def example(self, table: Table, unit: np.ndarray, sample: int) -> Example:
        row, begin, end = unit.tolist()
        tokens = (self._tokenizer.bos_token_id, *table.tokens(row, begin, end))
        return Example(tokens, ((1, len(tokens)),), sample)


def _text(row: Any) -> str:
    text = row.get("text") if isinstance(row, Mapping) else None
    if not isinstance(text, str):
        raise RowError("no text", f"{brief(row)} has no text under 'text'")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError("broken text", str(error)) from None
    if not text.strip():
        raise RowError("empty text")
    return text
