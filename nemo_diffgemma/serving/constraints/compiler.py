"""Languages -> token automata, in child processes: what a stranger sends may take for ever, or all memory.

A child knows the vocabulary and stays warm; one that exceeds the time is killed, and the next job starts another.
Automata are kept by expression.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import Pipe
from typing import Any, Self

from nemo_diffgemma.repository import ROOT
from nemo_diffgemma.serving.constraints.errors import ConstraintError
from nemo_diffgemma.serving.constraints.languages import Language
from nemo_diffgemma.serving.constraints.token_automaton import TokenAutomaton
from nemo_diffgemma.serving.constraints.worker import HasLanguage, Limits, Vocabulary

KEPT = 64  # automata: 1 to 10 MB each
START_SECONDS = 120.0  # for a child to import what it needs and to read the vocabulary, on a machine that is busy


class Compiler:
    """Compiles for one vocabulary; `close` it, or use it in a `with`. Safe to use from several threads."""

    def __init__(self, vocabulary: Vocabulary, limits: Limits | None = None, processes: int = 1) -> None:
        self._vocabulary, self._limits = vocabulary, limits or Limits()
        self._threads = ThreadPoolExecutor(processes, thread_name_prefix="constraints")
        self._own = threading.local()
        self._children: set[_Child] = set()
        self._lock = threading.Lock()
        self._compiled: OrderedDict[str, Future[TokenAutomaton]] = OrderedDict()

    def submit(self, language: Language) -> Future[TokenAutomaton]:
        """The automaton, or a `ConstraintError`, as soon as it is there."""
        with self._lock:
            future = self._compiled.get(language.expression)
            if future is None or _is_late(future):
                future = self._threads.submit(self._ask, "compile", language)
                self._compiled[language.expression] = future
            self._compiled.move_to_end(language.expression)
            over = [name for name, one in self._compiled.items() if one.done()][: max(0, len(self._compiled) - KEPT)]
            for name in over:  # what is waited for stays: whoever cancels it must find it
                del self._compiled[name]
        return future

    def cancel(self, language: Language) -> None:
        """Nobody wants its automaton any more: it is not compiled, unless that has begun."""
        with self._lock:
            future = self._compiled.get(language.expression)
            if future is not None and future.cancel():
                del self._compiled[language.expression]

    def compile(self, language: Language) -> TokenAutomaton:
        """The automaton. Raises `ConstraintError`, for one that exceeds the limits too."""
        return self.submit(language).result()

    def forget(self, language: Language) -> None:
        """Keep its automaton no longer: somebody else does."""
        with self._lock:
            self._compiled.pop(language.expression, None)

    def submit_language(self, of: HasLanguage) -> Future[Language | None]:
        """`of.language`, or the exception that it raises; `ConstraintError` if late. `of` is pickled."""
        return self._threads.submit(self._ask, "language", of)

    def submit_check(self, language: Language, text: str) -> Future[None]:
        """`language.check(text)` in the limit of time: None, `ConstraintViolation`, or `ConstraintError` if late."""
        return self._threads.submit(self._ask, "check", language, text)

    def check(self, language: Language, text: str) -> None:
        """The same at once. Raises `ConstraintViolation`, or `ConstraintError`."""
        self.submit_check(language, text).result()

    def close(self) -> None:
        """End the children, whatever they do."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            children = set(self._children)
        for child in children:
            child.kill()
        self._threads.shutdown(wait=True)
        for child in self._children:
            child.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, job: str, *arguments: Any) -> Any:
        """In a thread that has a child of its own."""
        child = getattr(self._own, "child", None)
        if child is None or not child.is_alive:
            child = self._own.child = _Child(self._vocabulary, self._limits)
            with self._lock:
                self._children = {other for other in self._children if other.is_alive} | {child}
        result = child.ask(self._limits.seconds, job, *arguments)
        if isinstance(result, Exception):
            raise result
        return result


class _LateError(ConstraintError):
    """Not in the limit of time: a busy machine may be to blame, so this is no lasting answer."""


def _is_late(future: Future[TokenAutomaton]) -> bool:
    return future.done() and (future.cancelled() or isinstance(future.exception(), _LateError))


class _Child:
    def __init__(self, vocabulary: Vocabulary, limits: Limits) -> None:
        self._connection, theirs = Pipe()
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "nemo_diffgemma.serving.constraints.child", str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            env=environment,
        )
        theirs.close()
        self._say((vocabulary, limits), START_SECONDS)

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, seconds: float, *job: Any) -> Any:
        return self._say(job, seconds)

    def kill(self) -> None:
        """Whoever waits for it, in another thread, hears no more."""
        self._process.kill()

    def end(self) -> None:
        self._connection.close()
        self._process.kill()
        self._process.wait()

    def _say(self, message: Any, seconds: float) -> Any:
        """The answer. Raises `ConstraintError` where there is none in time, or the child dies of it."""
        with contextlib.suppress(EOFError, ConnectionError):
            self._connection.send(message)
            if self._connection.poll(seconds):
                return self._connection.recv()
            self.end()
            raise _LateError(
                f"the constraint is too large: not compiled or checked within {seconds:g} s; make it simpler"
            )
        self.end()
        raise ConstraintError("the constraint is too large: the process that compiled it ran out of memory")
