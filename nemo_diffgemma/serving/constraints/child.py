"""The child process of `compiler.py`: compiles constraints and checks texts, one after the other, until it is left.

python -P -m nemo_diffgemma.serving.constraints.child FILE_DESCRIPTOR
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection

from nemo_diffgemma.cli.child_process import end_with_parent
from nemo_diffgemma.serving.constraints.byte_automaton import byte_automaton
from nemo_diffgemma.serving.constraints.errors import ConstraintError, ConstraintViolation
from nemo_diffgemma.serving.constraints.languages import Language
from nemo_diffgemma.serving.constraints.token_automaton import TokenAutomaton, token_automaton
from nemo_diffgemma.serving.constraints.trie import Trie


@dataclass(frozen=True)
class Vocabulary:
    """The bytes of the tokens that are text, how many ids the model has, and which of them end a text."""

    tokens: Mapping[int, bytes]
    size: int
    eos_ids: tuple[int, ...]


@dataclass(frozen=True)
class Limits:
    """`seconds` for one constraint or one check, `states` of an automaton, `memory` of a child in bytes."""

    seconds: float = 10.0
    states: int = 16384
    memory: int = 4 << 30


class Worker:
    """What the child does."""

    def __init__(self, vocabulary: Vocabulary, limits: Limits) -> None:
        self._vocabulary, self._limits = vocabulary, limits
        self._trie = Trie.of(vocabulary.tokens)

    def compile(self, language: Language) -> TokenAutomaton:
        automaton = byte_automaton(language.expression, self._limits.states)
        return token_automaton(automaton, self._trie, self._vocabulary.size, self._vocabulary.eos_ids)

    def check(self, language: Language, text: str) -> None:
        language.check(text)


def main() -> None:
    end_with_parent()
    connection = Connection(int(sys.argv[1]))
    try:
        vocabulary, limits = connection.recv()
        resource.setrlimit(resource.RLIMIT_AS, (limits.memory, limits.memory))
        worker = Worker(vocabulary, limits)
        connection.send(None)
        while True:
            job, *arguments = connection.recv()
            try:
                result = getattr(worker, job)(*arguments)
            except (ConstraintError, ConstraintViolation) as error:
                result = error
            except (MemoryError, RecursionError) as error:
                result = ConstraintError(f"the constraint is too large to be compiled ({type(error).__name__})")
            except Exception as error:  # of a library: one constraint is refused, and the next one is still to come
                result = ConstraintError(f"the constraint cannot be used ({type(error).__name__}: {error})")
            connection.send(result)
    except (EOFError, BrokenPipeError):  # nobody is there any more
        return


if __name__ == "__main__":
    main()
