"""Answers to held-out questions: what a network generates, whatever the batch, beside the references."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from nemo_diffgemma.data.example import Example
from nemo_diffgemma.data.sudoku_task import Sudoku, SudokuData
from nemo_diffgemma.data.text_task import PlainText
from nemo_diffgemma.diffusion.noise import KeyedNoise
from nemo_diffgemma.evaluation.samples import answers
from nemo_diffgemma.schema import ConfigurationError
from nemo_diffgemma.training import saving
from tests.evaluation.cases import network_and_rows
from tests.training.cases import config

EOS = 1


class Uneven(Sudoku):
    """Questions of several lengths, with answers of one and of two canvases."""

    def held_out_examples(self, wanted=None):
        made = []
        for example in super().held_out_examples(wanted):
            tokens = (*example.tokens, *example.tokens[18 : 18 + 3 * (example.sample % 3)])
            cut = (2, *tokens[3 + example.sample :])
            made.append(dataclasses.replace(example, tokens=cut, answers=((18 - 2 - example.sample, len(cut)),)))
        return made


def test_answers_do_not_depend_on_the_batch_and_are_what_is_generated(single):
    network, _ = network_and_rows({})
    task = Uneven(SudokuData(test_puzzles=5))
    examples = task.held_out_examples(5)
    together, apart = ([*answers(network, task, examples, seed=3, batch_size=size)] for size in (5, 2))
    assert together == apart
    for sample, example in zip(together, examples, strict=True):
        start, end = example.answers[-1]
        assert sample.prompt == list(example.tokens[:start])
        reference = list(example.tokens[start:end])
        assert sample.reference == reference
        noise = KeyedNoise([3], [example.sample], 16, 64)
        generation = network.generate(torch.tensor([sample.prompt]), None, len(reference), noise=noise)
        told = generation.sequences[0, start:].tolist()
        assert sample.answer == (told[: told.index(EOS)] if EOS in told else told)
        assert sample.right == (sample.answer == reference)
        assert list(sample.line(None)) == ["example", "prompt", "reference", "answer", "exact_match", "forwards"]


def test_a_right_answer_is_the_reference_up_to_its_end(single, monkeypatch):
    network, _ = network_and_rows({})
    task = Sudoku(SudokuData(test_puzzles=2))
    examples = task.held_out_examples(2)
    told = torch.tensor([[*examples[0].tokens], [*examples[1].tokens[:-1], EOS]])
    generation = type("Generation", (), {"sequences": told, "forwards": torch.tensor([4, 5])})
    monkeypatch.setattr(type(network), "generate", lambda self, *_, **__: generation)
    assert [(sample.right, sample.forwards) for sample in answers(network, task, examples, 0)] == [
        (True, 4),
        (False, 5),
    ]


def test_a_text_is_gone_on_with_from_its_middle_and_nobody_says_what_is_right():
    example = Example(tuple(range(60)), ((1, 60),), 0)
    assert PlainText.answer_start(PlainText, example, 8) == 1 + 24  # type: ignore[arg-type]
    assert PlainText.answer_start(PlainText, Example((2, 3), ((1, 2),), 0), 8) == 1  # type: ignore[arg-type]
    assert PlainText.is_right(PlainText, example, [1], [1]) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["canvas_loss", "bits_per_token", "solve_rate", "tokens_per_forward"])
def test_every_measure_of_validation_can_choose_the_best_checkpoint(name):
    trainer = config(trainer__validate_every=2, trainer__keep_best=1, trainer__keep_by=name, every=2).trainer
    saving.check(trainer, Sudoku.validated)
    with pytest.raises(
        ConfigurationError, match="keep_by='solved'.*use one of canvas_loss, bits_per_token, solve_rate"
    ):
        saving.check(dataclasses.replace(trainer, keep_by="solved"), Sudoku.validated)


def test_the_measures_that_a_task_promises_are_those_that_it_takes(single):
    network, _ = network_and_rows({})
    assert tuple(Sudoku(SudokuData(test_puzzles=2)).validate(network, 2, seed=0)) == Sudoku.validated
