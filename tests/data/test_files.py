"""Files of every kind hold the same rows; they are tokenised once; what is wrong is said before work is lost."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_diffgemma.config import ModelConfig
from nemo_diffgemma.data import prepared, text_tokenizer
from nemo_diffgemma.data.bad_rows import RowError
from nemo_diffgemma.data.chat_task import Chat, ChatData
from nemo_diffgemma.data.chat_template import Encoded
from nemo_diffgemma.data.sources import files_of, rows_of
from nemo_diffgemma.data.text_task import PlainText, TextData
from nemo_diffgemma.errors import ConfigurationError
from tests.data import templates
from tests.training.cases import ARCHITECTURE


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def conversation(index: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"fox {index}?"}, {"role": "assistant", "content": f"box {index} " * 3}]
    return {"messages": messages * (1 + index % 3)}


def lines(rows: list[Any]) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def chat_files(folder: Path, count: int = 12) -> dict[str, list[str]]:
    (folder / "train.jsonl").write_text(lines([conversation(index) for index in range(count)]))
    (folder / "held_out.jsonl").write_text(lines([conversation(100 + index) for index in range(5)]))
    return {"train": [str(folder / "train.jsonl")], "validation": [str(folder / "held_out.jsonl")]}


@pytest.fixture(scope="module")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("tokenizer")
    templates.tokenizer().save_pretrained(directory)
    return str(directory)


def ready(task: Any, **sizes: Any) -> Any:
    task.open(None)
    task.prepare(ModelConfig(**(ARCHITECTURE | {"max_position_embeddings": 512} | task.architecture() | sizes)))
    return task


# -- files -----------------------------------------------------------------------------------------------------------


def test_every_kind_of_file_holds_the_same_rows(tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = [conversation(index) | {"note": None if index else "x"} for index in range(5)]
    (tmp_path / "a.jsonl").write_text(lines(rows[:2]) + "\n" + lines(rows[2:]))
    (tmp_path / "b.json").write_text("\ufeff" + json.dumps(rows, indent=1))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines(rows).encode()))
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "d.parquet")
    for name, writer in (("e.arrow", pyarrow.ipc.new_stream), ("f.arrow", pyarrow.ipc.new_file)):
        with writer(str(tmp_path / name), table.schema) as stream:
            stream.write_table(table)
    files = files_of(str(tmp_path), "data.train[0]")
    assert [file.name for file in files] == ["a.jsonl", "b.json", "c.jsonl.gz", "d.parquet", "e.arrow", "f.arrow"]
    assert files_of(str(tmp_path / "*.arrow"), "data.train[0]") == files[-2:]
    for file in files:
        found = [{key: value for key, value in row.items() if value is not None} for _, row in rows_of(file)]
        assert found == [{k: v for k, v in row.items() if v is not None} for row in rows], file
    assert [line for line, _ in rows_of(files[0])] == [1, 2, 4, 5, 6]


def test_what_cannot_be_read_is_a_row_and_the_next_rows_are_read(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"a": 1}\n{"a": \n\xff\xfe\n{"a": 2}\n' + b"[" * 100_000 + b'\n{"a": 3}')
    rows = dict(rows_of(file))
    assert [rows[line] for line in (1, 4, 6)] == [{"a": 1}, {"a": 2}, {"a": 3}]
    assert [rows[line].reason for line in (2, 3, 5)] == ["broken JSON", "no UTF-8 text", "broken JSON"]
    for name, content in (
        ("b.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 9)[:-9]),
        ("c.parquet", b"PAR1"),
        ("d.arrow", b""),
    ):
        (tmp_path / name).write_bytes(content)
        assert [row.reason for _, row in rows_of(tmp_path / name) if isinstance(row, RowError)] == ["damaged file"], (
            name
        )


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("nothing.jsonl", r"data.train\[1\]: nothing.jsonl does not exist; expected .jsonl"),
        ("*.parquet", r"\*.parquet does not exist"),
        ("folder", "folder has no such files"),
        ("book.pdf", "book.pdf is of no known kind"),
        ("text.txt", "text.txt is of no known kind"),
    ],
)
def test_files_that_are_not_there_are_named(tmp_path, monkeypatch, entry, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for name in ("book.pdf", "text.txt"):
        (tmp_path / name).write_text("a")
    with pytest.raises(ConfigurationError, match=message):
        files_of(entry, "data.train[1]")
    assert files_of("text.txt", "data.train[0]", with_text=True) == [tmp_path / "text.txt"]


def test_files_are_tokenised_once_until_something_changes(tmp_path):
    file, seen = tmp_path / "a.jsonl", []
    file.write_text(lines([{"n": 1}, {"n": 2}, "{"]))

    def encode(row: Any) -> Encoded:
        seen.append(row["n"])
        return Encoded([2, row["n"]], [(1, 2)], "odd" if row["n"] % 2 else "")

    first = prepared.prepare([file], encode, "key")
    again = prepared.prepare([file], encode, "key")
    assert seen == [1, 2] and first.fingerprint == again.fingerprint
    for table in (first, again):
        assert table.good.tolist() == [0, 1] and table.tokens(1) == [2, 2] and table.answers(1) == [(1, 2)]
        assert table.notes == {"odd": 1}
        assert [(row.source, row.line, row.reason) for row in table.bad_rows] == [(str(file), 3, "broken JSON")]
    prepared.prepare([file], encode, "another key")
    assert seen == [1, 2] * 2
    file.write_text(lines([{"n": 3}, {"n": 4}, {"n": 5}]))
    assert prepared.prepare([file], encode, "key").fingerprint != first.fingerprint and seen[4:] == [3, 4, 5]


def test_files_without_a_single_good_row(tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(
        ConfigurationError, match=r"data.train\[0\]=.*a.jsonl has no row to learn from; 1 row left out: 1 empty"
    ):
        ready(Chat(ChatData(train=[str(tmp_path / "a.jsonl")], tokenizer=None, vocabulary_size=400)))
    (tmp_path / "a.jsonl").write_text(lines([{"messages": []}, 3]))
    with pytest.raises(
        ConfigurationError, match="no row to learn from; 2 rows left out: 1 .*a.jsonl:1: unknown format"
    ):
        ready(Chat(ChatData(train=[str(tmp_path / "a.jsonl")], vocabulary_size=400)))


# -- chat ------------------------------------------------------------------------------------------------------------


def test_conversations_become_examples(tmp_path, tokenizer_directory):
    task = ready(Chat(ChatData(**chat_files(tmp_path), tokenizer=tokenizer_directory)))
    epoch = [task.training_example(0, index) for index in range(12)]
    tokenizer = task.tokenizer()
    texts = sorted(tokenizer.decode(example.tokens) for example in epoch)
    expected = []
    for index in range(12):
        text = tokenizer.apply_chat_template(conversation(index)["messages"], tokenize=False)
        expected.append(text.rstrip("\n"))
    assert texts == sorted(expected)
    assert [example.sample for example in epoch] == list(range(12))
    assert task.architecture() == {"vocab_size": 360, "eos_token_id": [1, 6], "bos_token_id": 2, "pad_token_id": 0}
    held_out = task.held_out_examples(3)
    assert len(held_out) == 3 and "fox 100?" in tokenizer.decode(held_out[0].tokens)
    assert len(task.held_out_examples()) == 5 and task.report().examples == {"train": 12, "validation": 5}
    assert (
        task.training_example(1, 0).tokens != epoch[0].tokens or task.training_example(1, 1).tokens != epoch[1].tokens
    )


def test_bad_rows_are_counted_and_fatal_where_asked_for(tmp_path, tokenizer_directory):
    bad = ["{", {"messages": [{"role": "user", "content": "a"}]}, {"prompt": "a", "completion": "the fox " * 300}]
    (tmp_path / "a.jsonl").write_text(lines([conversation(0), *bad]))
    keys = dict(train=[str(tmp_path / "a.jsonl")], tokenizer=tokenizer_directory)
    report = ready(Chat(ChatData(**keys))).report()
    assert report.examples["train"] == 1
    assert [(row.line, row.reason) for row in sorted(report.bad_rows, key=lambda row: row.line)] == [
        (2, "broken JSON"),
        (3, "no answer"),
        (4, "too long"),
    ]
    assert "3 rows left out: " in str(report)
    with pytest.raises(ConfigurationError, match="3 rows left out.*data.bad_rows=skip"):
        ready(Chat(ChatData(**keys, bad_rows="fatal")))
    assert len(ready(Chat(ChatData(**keys, max_length=40))).report().bad_rows) == 3
    with pytest.raises(ConfigurationError, match="no row to learn from"):
        ready(Chat(ChatData(**keys, max_length=5)))


BAD = {
    "broken JSON": '{"messages": [',
    "not an object": "17",
    "unknown format": {"text": "the fox"},
    "unknown role": {"messages": [{"role": "boss", "content": "fox"}, {"role": "assistant", "content": "box"}]},
    "empty answer": {"messages": [{"role": "user", "content": "fox"}, {"role": "assistant", "content": " "}]},
    "no answer": {"messages": [{"role": "user", "content": "fox"}]},
    "too long": {"prompt": "fox", "completion": "the fox " * 300},
    "no supervised token": {"prompt": "fox", "completion": "unmarked"},
}


@settings(max_examples=10, deadline=None)
@given(st.lists(st.sampled_from(["", *BAD]), min_size=1, max_size=12), st.booleans())
def test_every_row_is_an_example_or_is_named_with_its_line_and_reason(tmp_path_factory, kinds, of_two):
    """In one file or two; an example keeps its text, whatever stands around it."""
    folder = tmp_path_factory.mktemp("rows")
    templates.tokenizer(templates.MARKED_BUT_ONE).save_pretrained(folder / "tokenizer")
    rows = [BAD[kind] if kind else conversation(index) for index, kind in enumerate(kinds)]
    cut = len(rows) // 2 if of_two else 0
    parts = [part for part in ((0, rows[:cut]), (cut, rows[cut:])) if part[1]]
    files = [folder / f"{first}.jsonl" for first, _ in parts]
    for file, (_, part) in zip(files, parts, strict=True):
        file.write_text(lines(part))
    keys = dict(train=[str(folder / "*.jsonl")], tokenizer=str(folder / "tokenizer"))
    if not any(kind == "" for kind in kinds):
        with pytest.raises(ConfigurationError, match="has no row to learn from"):
            ready(Chat(ChatData(**keys)))
        return
    task = ready(Chat(ChatData(**keys)))
    report = task.report()
    wanted = [
        (str(file), index - first + 1, kind)
        for file, (first, part) in zip(files, parts, strict=True)
        for index, kind in enumerate(kinds[first : first + len(part)], first)
        if kind
    ]
    assert sorted((row.source, row.line, row.reason) for row in report.bad_rows) == sorted(wanted)
    good = [index for index, kind in enumerate(kinds) if not kind]
    assert report.examples["train"] == len(good)
    texts = [task.tokenizer().decode(task.training_example(0, index).tokens) for index in range(len(good))]
    assert all(sum(f"fox {index}?" in text for text in texts) == 1 for index in good)
    if wanted:
        with pytest.raises(ConfigurationError, match=f"{len(wanted)} rows? left out: .*data.bad_rows=skip"):
            ready(Chat(ChatData(**keys, bad_rows="fatal")))


def test_a_row_and_the_fill_of_its_last_canvas_fit_into_the_networks_positions(tmp_path, tokenizer_directory):
    keys = ChatData(**chat_files(tmp_path), tokenizer=tokenizer_directory)
    lengths = [len(ready(Chat(keys)).training_example(0, index).tokens) for index in range(12)]
    for positions in (max(lengths) + 14, max(lengths) + 15):
        report = ready(Chat(keys), max_position_embeddings=positions, canvas_length=16).report()
        assert (report.examples["train"] == 12) == (positions == max(lengths) + 15)


def test_a_tokenizer_is_trained_where_a_network_from_scratch_has_none(tmp_path):
    task = ready(Chat(ChatData(**chat_files(tmp_path), vocabulary_size=400)))
    assert 270 < task.architecture()["vocab_size"] <= 400
    assert "box" in task.tokenizer().decode(task.training_example(0, 0).tokens)
    with pytest.raises(ConfigurationError, match="data.vocabulary_size=100; a tokenizer needs at least"):
        Chat(ChatData(**chat_files(tmp_path), vocabulary_size=100)).open(None)


def test_tokenizers_that_do_not_belong_are_refused(tmp_path, tokenizer_directory):
    files = chat_files(tmp_path)
    other = tmp_path / "other"
    text_tokenizer.from_json(text_tokenizer.train(["other words"], 400)).save_pretrained(other)
    with pytest.raises(ConfigurationError, match="another vocabulary than the tokenizer in .*leave data.tokenizer out"):
        Chat(ChatData(**files, tokenizer=str(other))).open(Path(tokenizer_directory))
    Chat(ChatData(**files, tokenizer=tokenizer_directory)).open(Path(tokenizer_directory))
    with pytest.raises(ConfigurationError, match="token ids up to 359, but the network has vocab_size=64"):
        ready(Chat(ChatData(**files, tokenizer=tokenizer_directory)), vocab_size=64)
    with pytest.raises(ConfigurationError, match="has no tokenizer.json; give data.tokenizer=DIRECTORY"):
        Chat(ChatData(**files)).open(tmp_path)
    (Path(other) / "chat_template.jinja").unlink()
    with pytest.raises(ConfigurationError, match="no chat template, which data=chat needs"):
        Chat(ChatData(**files, tokenizer=str(other))).open(None)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(train=[]), "data=chat needs files"),
        (dict(weights=[1.0]), "data.weights=.* expected one positive number for each"),
        (dict(weights=[1.0, 0.0]), "expected one positive"),
        (dict(bad_rows="ignore"), "use 'skip' or 'fatal'"),
        (dict(tokenizer="/nowhere"), "data.tokenizer=/nowhere has no tokenizer.json"),
        (dict(max_length=-1), "expected 0 or more"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_keys_that_make_no_task(tmp_path, wrong, message):
    file = chat_files(tmp_path)["train"][0]
    with pytest.raises(ConfigurationError, match=message):
        Chat(ChatData(**({"train": [file, file]} | wrong)))


def test_no_held_out_files(tmp_path, tokenizer_directory):
    task = ready(Chat(ChatData(train=chat_files(tmp_path)["train"], tokenizer=tokenizer_directory)))
    with pytest.raises(ConfigurationError, match="give data.validation=.* trainer.validate_every=0"):
        task.held_out_examples(1)
    with pytest.raises(ConfigurationError, match="data.max_length=600, but the network has 512 positions"):
        ready(Chat(ChatData(train=chat_files(tmp_path)["train"], tokenizer=tokenizer_directory, max_length=600)))


# -- text ------------------------------------------------------------------------------------------------------------


def test_a_document_is_cut_into_whole_canvases_and_nothing_is_lost(tmp_path, tokenizer_directory):
    texts = ["the fox " * count for count in (1, 7, 40, 41, 160)]
    (tmp_path / "a.jsonl").write_text(lines([{"text": text} for text in texts] + [{"text": " "}, {"words": "x"}]))
    (tmp_path / "book.txt").write_text("a lazy dog\n" * 60)
    keys = TextData(
        train=[str(tmp_path / "a.jsonl"), str(tmp_path / "book.txt")], tokenizer=tokenizer_directory, max_length=40
    )
    task = ready(PlainText(keys))
    examples = [task.training_example(0, index) for index in range(task.report().examples["train"])]
    tokenizer = task.tokenizer()
    wanted = [tokenizer(text, add_special_tokens=False).input_ids + [1] for text in (*texts, "a lazy dog\n" * 60)]
    pieces = []
    for document in wanted:
        pieces += [(2, *document[start : start + 32]) for start in range(0, len(document), 32)]  # two canvases of 16
    assert sorted(example.tokens for example in examples) == sorted(pieces)
    assert all(example.answers == ((1, len(example.tokens)),) for example in examples)
    assert sorted(row.reason for row in task.report().bad_rows) == ["empty text", "no text"]
    with pytest.raises(
        ConfigurationError, match="data.max_length=16 has no room for <bos> and a canvas; use at least 17"
    ):
        ready(PlainText(TextData(train=keys.train, tokenizer=tokenizer_directory, max_length=16)))


def test_a_trained_tokenizer_gives_every_text_back():
    made = text_tokenizer.from_json(text_tokenizer.train([templates.TEXT], 360))
    for text in (templates.TEXT, "  two  spaces ", "日本語 ☃\n\ttab", "<0x41> 007"):
        ids = made(text, add_special_tokens=False).input_ids
        assert made.decode(ids, clean_up_tokenization_spaces=False) == text
        assert text_tokenizer.SPECIAL.index("<unk>") not in ids
    assert made("a").input_ids[0] == made.bos_token_id == 2
    assert [made.convert_tokens_to_ids(token) for token in text_tokenizer.SPECIAL] == list(range(7))


def test_a_tokenizer_is_a_function_of_its_texts():
    """In any process: letters that are equally frequent are more than there is room for."""
    train = "train(['abcdefghij klmn' * 2, 'opqrstuvwxyz'], 335)"
    made = f"from nemo_diffgemma.data import text_tokenizer; print(text_tokenizer.{train})"
    texts = {subprocess.run([sys.executable, "-c", made], capture_output=True, check=True).stdout for _ in range(3)}
    assert len(texts) == 1 and len(*texts) > 1000
