"""Compiling in a child: what is too large is refused in time, and the next one is compiled all the same."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from nemo_diffgemma.serving.constraints import (
    Compiler,
    ConstraintError,
    ConstraintViolation,
    Language,
    Limits,
    Vocabulary,
    choice,
    json_object,
    regex,
)
from nemo_diffgemma.serving.constraints.compiler import KEPT
from tests.serving import examples

VOCABULARY = Vocabulary(examples.tokens(), examples.vocab_size(), (examples.EOS,))
EXPONENTIAL = "(?:a|b)*a(?:a|b){40}"


@pytest.fixture(scope="module")
def compiler():
    with Compiler(VOCABULARY, Limits(seconds=20.0, states=2000)) as made:
        yield made


def test_automata_are_kept_and_shared_by_threads(compiler):
    language, found = json_object(), []
    threads = [threading.Thread(target=lambda: found.append(compiler.compile(language))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(automaton is found[0] for automaton in found)
    assert found[0].distance[found[0].start] > 0


def test_states_are_limited_and_texts_are_checked(compiler):
    with pytest.raises(ConstraintError, match="at most 2000"):
        compiler.compile(regex(".{0,700}"))
    assert compiler.compile(choice(["ab"])).distance.max() > 0
    with pytest.raises(ConstraintViolation, match="does not match"):
        compiler.check(regex("a"), "b")
    compiler.check(regex("a"), "a")


def test_time_and_memory_are_limited_and_the_next_job_is_done():
    slow = regex("(?:a+)+b")
    with Compiler(VOCABULARY, Limits(seconds=1.0)) as compiler:
        with pytest.raises(ConstraintError, match="too large"):
            compiler.compile(regex(EXPONENTIAL))
        with pytest.raises(ConstraintError, match="within 1 s"):
            compiler.check(slow, "a" * 40)
    with Compiler(VOCABULARY, Limits(seconds=60.0, memory=700 << 20)) as compiler:
        with pytest.raises(ConstraintError, match="too large"):
            compiler.compile(regex(EXPONENTIAL))
        assert compiler.compile(slow).start >= 0


def test_what_nobody_waits_for_is_not_compiled():
    """Or whoever sends a hundred slow patterns and leaves keeps all others waiting."""
    with Compiler(VOCABULARY, Limits(seconds=3.0)) as compiler:
        begun = compiler.submit(regex(EXPONENTIAL))
        while not begun.running():
            time.sleep(0.01)
        waiting = [regex(f"{EXPONENTIAL}{letter}") for letter in "abcdefgh"]
        futures = [compiler.submit(one) for one in waiting]
        for one in [*waiting, regex(EXPONENTIAL), regex("x")]:
            compiler.cancel(one)
        assert all(future.cancelled() for future in futures) and not begun.cancelled()
        assert compiler.submit(choice(["ab"])).result(120).start >= 0
        assert isinstance(begun.exception(), ConstraintError)


def test_of_any_number_what_nobody_waits_for_is_not_compiled():
    with Compiler(VOCABULARY, Limits(seconds=3.0)) as compiler:
        begun = compiler.submit(regex(EXPONENTIAL))
        while not begun.running():
            time.sleep(0.01)
        waiting = [choice([str(number)]) for number in range(3 * KEPT)]
        futures = [compiler.submit(one) for one in waiting]
        for one in waiting:
            compiler.cancel(one)
        assert all(future.cancelled() for future in futures)


def test_of_automata_that_are_there_few_are_kept(compiler):
    for number in range(KEPT + 9):
        compiler.compile(choice([f"{number % 3}"] if number < 3 else [f"a{number}"]))
    assert len(compiler._compiled) <= KEPT


def test_what_a_library_stumbles_over_is_refused_and_the_child_lives(compiler):
    odd = Language("json_schema", '{"$ref": "http://elsewhere.example/schema"}', "1")
    with pytest.raises(ConstraintError, match="cannot be used"):
        compiler.check(odd, "1")
    (child,) = compiler._children
    assert child.is_alive


@pytest.mark.parametrize("name", ["torch", "nemo_diffgemma.serving.constraints.child"])
def test_importing_constraints_leaves_out(name):
    """A front end needs no torch; Python warns in each child if its module was imported by its package."""
    code = f"import nemo_diffgemma.serving.constraints, sys; assert '{name}' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_is_forgotten_is_compiled_anew(compiler):
    language = choice(["ab", "ba"])
    first = compiler.compile(language)
    assert compiler.compile(language) is first
    compiler.forget(language)
    assert compiler.compile(language) is not first
