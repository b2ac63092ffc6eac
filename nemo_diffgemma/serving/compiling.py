"""Languages of requests on their way to automata, while passes run.

Rank 0 compiles in child processes (`constraints.Compiler`) and posts a `Compiled` when one is done. It reaches all
ranks between the same two passes, and so all of them begin the requests that wait for it in the same one. What follows
from a request follows on every rank alike: which automata are kept, which requests wait.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future

from msgspec import Struct

from nemo_diffgemma.serving.constraints import Compiler, ConstraintError, Language, Limits, Vocabulary
from nemo_diffgemma.serving.constraints.token_automaton import TokenAutomaton
from nemo_diffgemma.serving.request import Request

_KEPT = 32  # automata, 1 to 10 MB each
_PROCESSES = 2  # that compile: one slow pattern does not keep all others waiting


class Compiled(Struct, frozen=True, tag=True):
    """The automaton of an expression, pickled by rank 0 for the other ranks, or why there is none."""

    expression: str
    automaton: bytes
    why: str = ""


class LanguageCompiler:
    """Rank 0's: calls `post` with the result of each language, from a thread of its own.

    `vocabulary` makes what the compiler needs to know of the tokens; where it raises `ConstraintError`, that is the
    answer to every language.
    """

    def __init__(
        self, vocabulary: Callable[[], Vocabulary], post: Callable[[Compiled], None], limits: Limits | None = None
    ) -> None:
        self._post, self._compiler, self._why = post, None, ""
        try:
            self._compiler = Compiler(vocabulary(), limits, _PROCESSES)
        except ConstraintError as error:
            self._why = str(error)

    def submit(self, language: Language) -> None:
        """Compile, unless that is going on already."""
        if self._compiler is None:
            self._post(Compiled(language.expression, b"", self._why))
            return
        future = self._compiler.submit(language)
        future.add_done_callback(lambda done: self._done(language, done))

    def cancel(self, language: Language) -> None:
        """Nobody waits for it any more."""
        if self._compiler is not None:
            self._compiler.cancel(language)

    def _done(self, language: Language, future: Future[TokenAutomaton]) -> None:
        if future.cancelled():  # the replica ends, or nobody waits
            return
        expression = language.expression
        error = future.exception()
        if error is None:
            self._post(Compiled(expression, pickle.dumps(future.result(), pickle.HIGHEST_PROTOCOL)))
            if self._compiler is not None:  # `Compilation` keeps it, on this rank too
                self._compiler.forget(language)
        else:
            why = str(error) if isinstance(error, ConstraintError) else f"{type(error).__name__}: {error}"
            self._post(Compiled(expression, b"", why))

    def close(self) -> None:
        """End the children, whatever they do."""
        if self._compiler is not None:
            self._compiler.close()


class Compilation:
    """What every rank knows: the automata there are, by expression, and the requests that wait for others."""

    def __init__(self) -> None:
        self._automata: OrderedDict[str, TokenAutomaton] = OrderedDict()
        self._waiting: dict[str, list[Request]] = {}

    def __len__(self) -> int:
        """Requests that wait."""
        return sum(map(len, self._waiting.values()))

    def automaton(self, language: Language) -> TokenAutomaton | None:
        """The automaton of a language that has been compiled."""
        if language.expression in self._automata:
            self._automata.move_to_end(language.expression)
        return self._automata.get(language.expression)

    def wait(self, request: Request, language: Language) -> bool:
        """Let a request wait for its language; whether it is the first to do so."""
        waiting = self._waiting.setdefault(language.expression, [])
        waiting.append(request)
        return len(waiting) == 1

    def cancel(self, id: str) -> Request | None:
        """The request of this id, if it waits, which it does no more."""
        for expression, waiting in self._waiting.items():
            for request in waiting:
                if request.id == id:
                    waiting.remove(request)
                    if not waiting:
                        del self._waiting[expression]
                    return request
        return None

    def awaits(self, language: Language) -> bool:
        """Whether some request waits for it."""
        return language.expression in self._waiting

    def forget(self) -> list[Language]:
        """No request waits any more -> the languages that they have waited for."""
        languages = [waiting[0].language for waiting in self._waiting.values()]
        self._waiting.clear()
        return [language for language in languages if language is not None]

    def take(self, compiled: Compiled) -> tuple[list[Request], TokenAutomaton | None]:
        """The requests that have waited for this, and their automaton, None where there is none."""
        waiting = self._waiting.pop(compiled.expression, [])
        if compiled.why:
            return waiting, None
        automaton: TokenAutomaton = pickle.loads(compiled.automaton)  # of rank 0: no front end can send one
        self._automata[compiled.expression] = automaton
        self._automata.move_to_end(compiled.expression)
        while len(self._automata) > _KEPT:
            self._automata.popitem(last=False)
        return waiting, automaton
