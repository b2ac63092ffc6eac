"""What `child.py` does, for one vocabulary: make a language, compile it, check a text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from nemo_diffgemma.serving.constraints.byte_automaton import byte_automaton
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


class HasLanguage(Protocol):
    """Says what an answer must be: a `property` that may take a while."""

    @property
    def language(self) -> Language | None: ...


class Worker:
    """Jobs are its methods, by name."""

    def __init__(self, vocabulary: Vocabulary, limits: Limits) -> None:
        self._vocabulary, self._limits = vocabulary, limits
        self._trie = Trie.of(vocabulary.tokens)

    def compile(self, language: Language) -> TokenAutomaton:
        automaton = byte_automaton(language.expression, self._limits.states)
        return token_automaton(automaton, self._trie, self._vocabulary.size, self._vocabulary.eos_ids)

    def language(self, of: HasLanguage) -> Language | None:
        return of.language

    def check(self, language: Language, text: str) -> None:
        language.check(text)
