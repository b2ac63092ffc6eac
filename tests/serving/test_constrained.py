"""Constrained generation: every answer validates, what is allowed already stays, and nobody else notices."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from nemo_diffgemma import SamplerConfig
from nemo_diffgemma.diffusion.generate import StepInputs
from nemo_diffgemma.serving.constraints import Constraint, ConstraintError, Limits, Vocabulary, choice, regex
from nemo_diffgemma.serving.constraints.worker import Worker
from tests.distributed.layouts import LAYOUTS
from tests.parity.fixed import fixed
from tests.serving import constrained as cases
from tests.serving import examples
from tests.serving.constrained import LENGTH, worker

ENDS = dict(eos_token_id=examples.EOS, pad_token_id=examples.PAD)


@pytest.fixture(scope="module")
def model(single):
    return cases.model({})


def prompts(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, examples.vocab_size(), (rows, 5), generator=torch.Generator().manual_seed(seed))


def check(answers: torch.Tensor, seed: int) -> None:
    for (language, constraint), answer in zip(cases.constrained(seed, len(answers)), answers, strict=True):
        ids = answer[: constraint.max_tokens].tolist()
        language.check(examples.text_of(ids).decode())
        assert set(answer[constraint.max_tokens :].tolist()) <= {examples.EOS, examples.PAD}


@pytest.mark.parametrize("seed", range(10))
def test_thirty_random_constraints_are_kept(single, seed):
    check(cases.generated({}, seed, 30, steps=2)[:-1], seed)


def check_served(answers: dict[str, list[int]], seed: int, many: int) -> None:
    for index, (language, constraint) in enumerate(cases.constrained(seed, many)):
        assert len(answers[str(index)]) <= constraint.max_tokens
        language.check(examples.text_of(answers[str(index)]).decode())


@pytest.mark.parametrize("many", [40, pytest.param(300, marks=pytest.mark.slow)])
def test_random_constraints_are_kept_in_an_engine(single, many):
    check_served(cases.served({}, many, many, steps=2), many, many)


def test_random_constraints_are_kept_in_an_engine_of_four_ranks(pool):
    given = dict(layout=dict(tensor=2, expert=2), seed=8, many=15, steps=2)
    for answers in pool(4).run("tests.serving.constrained:served", **given):
        check_served(answers, 8, 15)


def test_rows_without_a_constraint_do_not_notice(model):
    sampler = SamplerConfig(max_denoising_steps=4, confidence_threshold=2.0, **ENDS)
    constraint = Constraint(worker().compile(regex("[a-z ]{20,}")))
    alone = model.generate(prompts(3), max_new_tokens=3 * LENGTH, sampler=sampler)
    mixed = model.generate(prompts(3), max_new_tokens=3 * LENGTH, sampler=sampler, constraints=[None, constraint, None])
    for row in (0, 2):
        assert torch.equal(mixed.sequences[row], alone.sequences[row])
        assert mixed.forwards[row] == alone.forwards[row]
    assert not torch.equal(mixed.sequences[1], alone.sequences[1])


@pytest.mark.parametrize("threshold, stability", [(0.0, 1), (100.0, 0), (100.0, 1), (4.2, 1)])
def test_an_answer_that_is_allowed_already_stays(model, threshold, stability):
    anything = any_letters()
    sampler = SamplerConfig(5, confidence_threshold=threshold, stability_threshold=stability, **ENDS)
    free = model.generate(prompts(12), max_new_tokens=2 * LENGTH, sampler=sampler)
    bound = model.generate(prompts(12), max_new_tokens=2 * LENGTH, sampler=sampler, constraints=[anything] * 12)
    stayed = 0
    for ours, theirs, steps, other_steps in zip(
        bound.sequences, free.sequences, bound.forwards, free.forwards, strict=True
    ):
        answer = theirs[5:].tolist()
        answer = answer[: answer.index(examples.EOS)] if examples.EOS in answer else answer
        if examples.PAD not in answer:
            stayed += 1
            assert torch.equal(ours, theirs) and steps == other_steps
        else:
            assert not torch.equal(ours, theirs)
    assert stayed >= 4


def any_letters(eos_ids: tuple[int, ...] = (examples.EOS,)) -> Constraint:
    """Every id but the special ones is a letter: any canvas without PAD is allowed."""
    letters = {id: b"abc"[id % 3 : id % 3 + 1] for id in range(examples.vocab_size()) if id > 1}
    made = Worker(Vocabulary(letters, examples.vocab_size(), eos_ids), Limits())
    return Constraint(made.compile(regex("[abc]*")))


def test_a_canvas_that_is_not_allowed_is_guided_until_it_is_stable(model):
    constraint = Constraint(worker().compile(regex("[0-9]{4}-[0-9]{2}-[0-9]{2}")))
    sampler = SamplerConfig(8, confidence_threshold=100.0, stability_threshold=0, **ENDS)  # free, it stops at once
    seen = []
    bound = model.generate(prompts(4), max_new_tokens=LENGTH, sampler=sampler, constraints=[constraint] * 4,
                           observe=seen.append)  # fmt: skip
    free = model.generate(prompts(4), max_new_tokens=LENGTH, sampler=sampler)
    assert (free.forwards == 1).all() and (bound.forwards == 2).all()
    for step in seen:  # drafts are of the language as well
        for canvas in step.argmax.tolist():
            regex(r"\d{4}-\d{2}-\d{2}").check(examples.text_of(canvas).decode())


def test_choices_and_locked_tokens(model):
    language = choice(["true", "false", "the year was"])
    automaton = worker().compile(language)
    ids = examples.tokenizer().encode("the year was").ids
    sampler = SamplerConfig(2, **ENDS)
    constraints = [Constraint(automaton), Constraint(automaton, len(ids))]
    answers = model.generate(
        prompts(2), max_new_tokens=40, sampler=sampler, constraints=constraints, locked=[None, {0: ids[0]}]
    )
    for answer in answers.sequences[:, 5:].tolist():
        language.check(examples.text_of(answer).decode())
    assert answers.sequences[1, 5] == ids[0] and examples.text_of(answers.sequences[1, 5:].tolist()) == b"the year was"
    with pytest.raises(ConstraintError, match="2 constraints for 1 rows"):
        model.generate(prompts(1), sampler=sampler, constraints=[None, None])
    with pytest.raises(ConstraintError, match="eos_token_id"):
        model.generate(prompts(1), sampler=SamplerConfig(2), constraints=[any_letters(eos_ids=())])


def test_recorded_steps_are_the_steps(model):
    language = regex("[a-z ]{20,}")
    constraints = [Constraint(worker().compile(language)), None]
    asked = dict(max_new_tokens=3 * LENGTH, sampler=SamplerConfig(4, **ENDS), constraints=constraints)
    plain = model.generate(prompts(2), **asked)
    recorder = fixed(model)
    try:
        recorded = model.generate(prompts(2), **asked)
    finally:
        model.fixed_steps = None
    assert recorder.replayed > 2
    assert torch.equal(recorded.sequences, plain.sequences)
    language.check(examples.text_of(recorded.sequences[0, 5:].tolist()).decode())


@pytest.mark.parametrize("name", ["tp2_ep2", "ep2"])
def test_layouts_give_the_answers_of_one_process(pool, single, name):
    world, layout = LAYOUTS[name]
    expected = cases.generated({}, 5, 6, steps=1)  # without a signal there is no chaos
    for answers in pool(world).run("tests.serving.constrained:generated", layout=layout, seed=5, many=6, steps=1):
        assert torch.equal(answers, expected)
    ranks = pool(world).run("tests.serving.constrained:generated", layout=layout, seed=6, many=6, steps=3)
    check(ranks[0][:-1], 6)
    assert all(torch.equal(one, other) for one, other in itertools.pairwise(ranks))


def test_engines_refuse(single):
    from export.engine.engine import Engine, EngineError

    step = StepInputs(*[torch.zeros(1, 1)] * 3, 1.0, 0.1, constraint=SimpleNamespace())
    with pytest.raises(EngineError, match="cannot be constrained"):
        Engine.sampling_step(SimpleNamespace(), step, None)
