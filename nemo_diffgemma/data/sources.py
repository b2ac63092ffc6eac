"""The rows of data files: JSON Lines, Parquet, Arrow, and plain text. Bad rows are rows: they come out as `RowError`.

    for line, row in rows_of(Path("chat.jsonl")): ...

`files_of("data/*.jsonl", "data.train[0]")` names the files of an entry: a file, a pattern, or a directory of files.
"""

from __future__ import annotations

import glob
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_diffgemma.data.bad_rows import RowError
from nemo_diffgemma.errors import ConfigurationError
from nemo_diffgemma.repository import user_path

_JSON, _TABLES, _TEXT = (".jsonl", ".ndjson", ".json"), (".parquet", ".arrow", ".feather"), (".txt", ".md")
SUFFIXES = (*_JSON, *(f"{suffix}.gz" for suffix in _JSON), *_TABLES, *_TEXT)


def files_of(entry: str, key: str, with_text: bool = False) -> list[Path]:
    """The files that an entry of `key` means, in the order of their names.

    Raises `ConfigurationError` where there are none, or one is of no known kind. Plain text only where `with_text`.
    """
    place, known = user_path(entry).absolute(), SUFFIXES if with_text else SUFFIXES[: -len(_TEXT)]
    if place.is_dir():
        files = sorted(file for file in place.rglob("*") if file.is_file() and file.name.endswith(known))
    elif place.exists():
        files = [place]
    else:
        files = sorted(map(Path, glob.glob(str(place), recursive=True)))
    expected = f"expected {', '.join(known)}: a file, a pattern (data/*.jsonl) or a directory of them"
    if not files:
        what = "has no such files" if place.is_dir() else "does not exist"
        raise ConfigurationError(f"{key}: {entry} {what}; {expected}")
    for file in files:
        if not file.name.endswith(known):
            raise ConfigurationError(f"{key}: {file} is of no known kind; {expected}")
        try:
            file.open("rb").close()
        except OSError as error:
            raise ConfigurationError(f"{key}: {file} cannot be read: {error.strerror}") from None
    return files


def rows_of(file: Path) -> Iterator[tuple[int, Any]]:
    """(line, row) of each row of a file; a row that cannot be read is a `RowError`. Lines count from 1."""
    name = file.name.removesuffix(".gz")
    if name.endswith(_JSON):
        yield from _json_rows(file)
    elif name.endswith(_TABLES):
        yield from _table_rows(file)
    else:
        yield 1, _decoded(file.read_bytes(), lambda text: {"text": text})


def _json_rows(file: Path) -> Iterator[tuple[int, Any]]:
    opener: Any = gzip.open if file.name.endswith(".gz") else open
    with opener(file, "rb") as stream:
        start = stream.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
        stream.seek(0)
        if start.startswith(b"["):  # one array, as many tools write .json
            rows = _decoded(stream.read(), json.loads)
            yield from enumerate(rows, 1) if isinstance(rows, list) else [(1, rows)]
            return
        try:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield number, _decoded(line, json.loads)
        except (EOFError, gzip.BadGzipFile, OSError) as error:
            yield 0, RowError("damaged file", str(error))


def _decoded(content: bytes, read: Any) -> Any:
    try:
        return read(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return RowError("no UTF-8 text", str(error))
    except (ValueError, RecursionError) as error:
        return RowError("broken JSON", str(error))


def _table_rows(file: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow

    number = 0
    try:
        for batch in _batches(file):
            for row in batch.to_pylist():
                number += 1
                yield number, _without_nulls(row)
    except (pyarrow.ArrowException, OSError) as error:
        yield number + 1, RowError("damaged file", " ".join(str(error).split()))


def _batches(file: Path) -> Iterator[Any]:
    """Record batches of a table: Parquet, or Arrow's stream or file format."""
    if file.name.endswith(".parquet"):
        from pyarrow.parquet import ParquetFile

        with ParquetFile(file) as table:
            yield from table.iter_batches(batch_size=1024)
        return
    import pyarrow

    with pyarrow.memory_map(str(file)) as source:
        try:
            reader = pyarrow.ipc.open_stream(source)
        except pyarrow.ArrowInvalid:
            source.seek(0)
            whole = pyarrow.ipc.open_file(source)
            yield from (whole.get_batch(index) for index in range(whole.num_record_batches))
            return
        yield from reader


def _without_nulls(value: Any) -> Any:
    """A table has every key of every row: what a row does not have is null."""
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value
