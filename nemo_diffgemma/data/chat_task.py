"""Conversations as the task of a run: `data=chat data.train=[FILES] data.validation=[FILES]`.

Every assistant turn is an answer; formats: conversations.py; how answers are found: chat_template.py. An example is a
conversation. One that is longer than `data.max_length` (0: the network's positions) is a bad row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nemo_diffgemma.config import ModelConfig
from nemo_diffgemma.data.bad_rows import RowError
from nemo_diffgemma.data.chat_template import ChatTemplate, Encoded
from nemo_diffgemma.data.conversations import Conversation, conversation_of
from nemo_diffgemma.data.example import Example
from nemo_diffgemma.data.file_task import FileData, FileTask, Units
from nemo_diffgemma.data.prepared import Table
from nemo_diffgemma.data.sources import rows_of
from nemo_diffgemma.errors import ConfigurationError


@dataclass
class ChatData(FileData):
    """Keys of `data` for conversations."""

    kind: str = "chat"


class Chat(FileTask):
    """Conversations through the tokenizer's own chat template."""

    keys = ChatData

    def open(self, assets: Any) -> None:
        super().open(assets)
        if not self._tokenizer.chat_template:
            raise ConfigurationError(
                f"the tokenizer in {self.data.tokenizer or assets} has no chat template, which data=chat needs; give "
                "data.tokenizer=DIRECTORY with the same vocabulary and a chat_template.jinja"
            )
        if self.data.tokenizer is not None:  # a checkpoint trained with this template is used with it
            self.chat_template = self._tokenizer.chat_template

    def encoder(self) -> Any:
        assert self._model is not None
        template = ChatTemplate(self._tokenizer, self._ends(self._model))

        def encode(row: Any) -> Encoded:
            return template.encode(conversation_of(row))

        return encode

    def stops(self) -> list[int]:
        """With the token that ends a turn in the template."""
        eos = self._tokenizer.eos_token_id
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            made = ChatTemplate(self._tokenizer, {eos}).encode(Conversation(turns))
        except RowError:
            return [eos]
        last = made.tokens[-1]
        token = self._tokenizer.added_tokens_decoder.get(last)
        return [eos, last] if last != eos and token is not None and token.special else [eos]

    def texts(self, row: Any) -> Iterator[str]:
        for message in conversation_of(row).messages:
            yield message["content"]

    def units(self, table: Table, model: ModelConfig) -> Units:
        room = model.max_position_embeddings - (model.canvas_length - 1)  # the last canvas may go on behind the row
        limit = min(self.data.max_length or room, room)
        lengths = table.lengths[table.good]
        fit, long = table.good[lengths <= limit], table.good[lengths > limit]
        detail = "{} tokens; data.max_length and the network allow {}"
        unfit = [table.bad_row(row, "too long", detail.format(table.lengths[row], limit)) for row in long.tolist()]
        places = np.stack([fit, np.zeros_like(fit), table.lengths[fit]], axis=1)
        return Units(places, np.stack([table.lengths[fit], table.canvases(model.canvas_length)[fit]], axis=1), unfit)

    def example(self, table: Table, unit: np.ndarray, sample: int) -> Example:
        row = int(unit[0])
        return Example(tuple(table.tokens(row)), tuple(table.answers(row)), sample)

    def messages(self, seed: int, sample: int, held_out: bool = False) -> list[tuple[str, str]]:
        source, unit = self._held_out()[sample] if held_out else self._trained_on(seed, sample)
        file, line = source.table.place(int(unit[0]))
        row = next(row for number, row in rows_of(Path(file)) if number == line)
        return [(message["role"], message["content"]) for message in conversation_of(row).messages]
