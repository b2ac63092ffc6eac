"""launch/data.py shows what a run would learn from; a checkpoint trained on conversations is evaluated on them."""

from __future__ import annotations

import json
import re
from itertools import chain, groupby
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data import runs, templates
from tests.launch import verbs


class Shown:
    """Stands in for `Results`."""

    exit_code, is_rank_zero = 0, True

    def __init__(self, colours: bool = False) -> None:
        self.colours, self.lines = colours, []

    def show(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("conversations")
    runs.files(made, count=20)
    with (made / "train.jsonl").open("a") as stream:
        stream.write('{"messages": []}\n{\n')
    return made


def test_a_look_at_conversations(folder, tmp_path):
    verb, shown = verbs.load("data"), Shown()
    data = runs.config(str(folder)).data
    config = verb.DataConfig(data, canvas_length=8, out=str(tmp_path / "look"), show=3)
    found = verb.data(config, shown)
    assert found["examples"] == {"train": 20, "validation": 20}
    assert found["bad_rows"] == {"unknown format": 1, "broken JSON": 1} and found["notes"] == {}
    rows = [json.loads(line) for line in (tmp_path / "look" / "bad_rows.jsonl").read_text().splitlines()]
    assert [(row["line"], row["reason"]) for row in rows] == [(21, "unknown format"), (22, "broken JSON")]
    assert (tmp_path / "look" / "lengths.png").read_bytes().startswith(b"\x89PNG")
    text = "\n".join(shown.lines)
    assert "2 rows left out: 1 unknown format, 1 broken JSON" in text and "train.jsonl:22: broken JSON" in text
    assert "<|turn>user" in text and "[1: " in text and "<turn|>" in text
    # every answer as a whole: what is in brackets, without the fill, is what the assistant says
    counts = [int(line.split()[-1]) for line in text.split("canvases of an example")[1].splitlines() if "█" in line]
    assert sum(counts) == 20 and found["canvases_max"] >= found["canvases_mean"] >= 1 > found["fill"] > 0
    coloured = Shown(colours=True)
    verb.data(config, coloured)
    assert plain(coloured.lines[-1]).count("fill") == text.split("An example")[1].count(" fill]")


def plain(text: str) -> str:
    return re.sub(r"\033\[[\d;]*m", "", text)


@settings(max_examples=30)
@given(
    st.lists(st.sampled_from(["a", "er", "the fox", "box 7 +\n5?", "model"]), min_size=1, max_size=4),
    st.integers(1, 9),
)
def test_each_letter_has_the_colour_of_who_says_it_and_of_its_canvas(contents, canvas_length):
    """Also letters that the template's own words have."""
    from nemo_diffgemma.cli import data_view
    from nemo_diffgemma.data import Example
    from nemo_diffgemma.data.chat_template import ChatTemplate
    from nemo_diffgemma.data.conversations import Conversation

    turns = [[{"role": "user", "content": text}, {"role": "assistant", "content": text}] for text in contents]
    said = [{"role": "system", "content": "rules"}, *chain(*turns)]
    tokenizer = templates.tokenizer()
    encoded = ChatTemplate(tokenizer, {1, 6}).encode(Conversation(said))
    shown = Shown(colours=True)
    example = Example(tuple(encoded.tokens), tuple(encoded.answers), 0)
    data_view.show_example(example, [(m["role"], m["content"]) for m in said], tokenizer, canvas_length, shown)
    painted = re.findall(r"\033\[([\d;]+)m(.*?)\033\[0m", shown.lines[-1])
    by_role = {"35": ["rules"], "36": contents}
    for colour, texts in by_role.items():
        assert "".join(text for paint, text in painted if paint == colour) == "".join(texts).replace("\n", "")
    answers = "".join(text for paint, text in painted if paint.startswith("1;"))
    assert re.sub(r" \+\d+ fill", "", answers) == "".join(f"{text}<turn|>" for text in contents).replace("\n", "")
    grounds = [paint[2:] for paint, _ in groupby(paint for paint, _ in painted if paint.startswith("1;"))]
    assert all(ground in ("42", "44") for ground in grounds) and ("44" in grounds) == (
        len(shown_canvases(example, canvas_length)) > 1
    )


def shown_canvases(example, canvas_length: int) -> list[int]:
    return [begin for start, end in example.answers for begin in range(start, end, canvas_length)]


def test_a_look_at_puzzles_and_at_held_out_files_alone(folder, tmp_path):
    from nemo_diffgemma.data.sudoku_task import SudokuData

    verb = verbs.load("data")
    found = verb.data(verb.DataConfig(SudokuData(), canvas_length=16, out=str(tmp_path), examples=50), Shown())
    assert (found["tokens_max"], found["canvases_max"], found["fill"]) == (34, 1, 0.0)
    data = runs.config(str(folder), data__train=[]).data
    assert verb.data(verb.DataConfig(data, out=str(tmp_path)), Shown())["examples"] == {"train": 0, "validation": 20}


def test_a_checkpoint_is_evaluated_on_held_out_conversations(single, folder, tmp_path):
    from nemo_diffgemma.training.run import train

    config = runs.config(str(folder), steps=1)
    done = train(config, tmp_path)
    evaluate = verbs.load("evaluate")
    held_out = runs.config(str(folder), data__train=[], data__tokenizer=None).data  # the checkpoint has its own
    asked = evaluate.EvaluateConfig(str(done.checkpoint), data=held_out, levels=[0.5])
    measured = evaluate.evaluate(asked, Shown())
    assert set(measured) == {"canvas_loss", "bits_per_token"} and 1 < measured["canvas_loss"]["0.5"] < 10
    generate = verbs.load("generate")
    answer = generate.generate(
        generate.GenerateConfig(checkpoint=str(done.checkpoint), prompt="what is 7 + 5?"), Shown()
    )
    assert isinstance(answer["text"], str)
