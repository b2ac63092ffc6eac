"""One engine with its ranks, in the service of a front end: launch/replica.py.

Rank 0 speaks with the front end (mailbox.py). Before each pass it tells the others what has come, so that the engines
of all ranks are given the same calls in the same order. SIGTERM drains: what is being answered is answered, nothing
new is taken. An error of one request ends that request; any other ends the replica, which tells the front end why.
A request with a language is accepted when that is compiled (compiling.py); passes go on meanwhile.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import msgspec
import torch
import torch.distributed as dist

from nemo_diffgemma.config import ModelConfig
from nemo_diffgemma.data.sudoku_tokenizer import is_sudoku
from nemo_diffgemma.diffusion.sampler_config import SamplerConfig
from nemo_diffgemma.errors import UserError
from nemo_diffgemma.parallel.agreement import all_or_none, is_rank_zero, world_size
from nemo_diffgemma.parallel.groups import device
from nemo_diffgemma.serving.backend import Backend
from nemo_diffgemma.serving.compiling import Compilation, Compiled, LanguageCompiler
from nemo_diffgemma.serving.constraints import ConstraintError, Language, Vocabulary, bytes_of_tokens
from nemo_diffgemma.serving.constraints.token_automaton import TokenAutomaton
from nemo_diffgemma.serving.ending import Decode
from nemo_diffgemma.serving.engine import Engine
from nemo_diffgemma.serving.engine_config import EngineConfig
from nemo_diffgemma.serving.freed_memory import keep_freed_memory
from nemo_diffgemma.serving.mailbox import Errand, Mailbox
from nemo_diffgemma.serving.markers import Markers
from nemo_diffgemma.serving.messages import (
    Accepted,
    Cancel,
    Drain,
    Event,
    Events,
    Farewell,
    Hello,
    Refused,
    Unknown,
    encode,
)
from nemo_diffgemma.serving.request import Finished, Reason, Request
from nemo_diffgemma.serving.text import ServedText, files_of, fingerprint
from nemo_diffgemma.tokenizer import Text

_IDLE_SECONDS = 1.0  # after which the ranks of an idle replica hear of each other
_errands = msgspec.msgpack.Decoder(list[Errand])


class Network(Protocol):
    """What a `backend` runs; `assets` is the folder with its tokenizer."""

    model_config: ModelConfig

    @property
    def assets(self) -> Path | None: ...

    @property
    def sampler_defaults(self) -> SamplerConfig: ...


class Replica:
    """The engine of this rank and, on rank 0, the way to the front end at `address`.

    `lonely_seconds` without a word of the front end end it: whoever has started it starts it again.
    """

    def __init__(
        self,
        network: Network,
        config: EngineConfig,
        address: str,
        name: str,
        lonely_seconds: float,
        backend: Callable[[Any, EngineConfig, Decode | None, Markers | None], Backend] = Engine,
    ) -> None:
        read = Text(network.assets)
        files = files_of(read)
        text = ServedText(files) if files else None
        self.engine = backend(network, config, text.decode if text else None, text.part_markers if text else None)
        self.draining = False
        self._signalled = False
        self._errands_of_ranks = _Errands()
        self._compilation = Compilation()
        self._compiler: LanguageCompiler | None = None
        self._mailbox: Mailbox | None = None
        task = "sudoku" if read.tokenizer is not None and is_sudoku(read.tokenizer) else None
        facts = msgspec.structs.replace(self.engine.facts(), text=fingerprint(files), task=task)
        hello = Hello(name, facts)
        with all_or_none():
            if is_rank_zero():
                self._mailbox = Mailbox(address, hello, files, lonely_seconds)
                self._compiler = LanguageCompiler(partial(_vocabulary, network, read), self._mailbox.post)

    def serve(self) -> None:
        """Until it is drained. Raises what ends it before."""
        before = {number: signal.signal(number, self._drain_at_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            while not (self.draining and not self.engine.has_work and not self._compilation):
                self._turn()
            self._close(Farewell(False, "drained"))
        except Exception as error:
            self._close(Farewell(False, f"{type(error).__name__}: {error}"))
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _drain_at_signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True  # of rank 0 alone it counts: it tells the others

    def _close(self, farewell: Farewell) -> None:
        if self._mailbox is not None:
            self._mailbox.send(farewell)
            self._mailbox.close()
        if self._compiler is not None:
            self._compiler.close()

    def _turn(self) -> None:
        """What has come, then a pass."""
        engine = self.engine
        events: list[Event] = []
        for errand in self._errands_of_ranks.of_rank_zero(self._taken()):
            events += self._do(errand)
        self._tell(events)  # also that there is work, should the pass not end
        if engine.has_work:
            self._tell(engine.step())

    def _tell(self, events: Sequence[Event]) -> None:
        if self._mailbox is not None:
            if events:
                self._mailbox.send(Events(list(events)))
            engine = self.engine
            running, waiting = engine.counts
            self._mailbox.passed(running, waiting + len(self._compilation), engine.passes)

    def _taken(self) -> list[Errand]:
        """What rank 0 has heard; others hear it from there."""
        if self._mailbox is None:
            return []
        is_first_signal = self._signalled and not self.draining
        errands = self._mailbox.take(0 if self.engine.has_work or is_first_signal else _IDLE_SECONDS)
        if is_first_signal:
            errands.append(Drain())
        if self._mailbox.lonely and not self.draining:
            print("replica: nothing heard of the front end for long; ending", file=sys.stderr)
            errands += [Unknown(), Drain()]
        return errands

    def _do(self, errand: Errand) -> list[Event]:
        """The same on every rank."""
        engine = self.engine
        if isinstance(errand, Request):
            return self._begin(errand)
        if isinstance(errand, Compiled):
            requests, automaton = self._compilation.take(errand)
            if automaton is None:
                return [Refused(request.id, errand.why) for request in requests]
            return [self._added(request, automaton) for request in requests]
        if isinstance(errand, Cancel):
            if (request := self._compilation.cancel(errand.id)) is not None:
                assert request.language is not None
                if not self._compilation.awaits(request.language):
                    self._cancel_compilation([request.language])
                return [Finished(request.id, Reason.CANCELLED, len(request.prompt), 0)]
            return [*engine.cancel(errand.id)]
        if isinstance(errand, Unknown):
            self._cancel_compilation(self._compilation.forget())
            for request in engine.requests:
                engine.cancel(request.id)
            return []
        if not self.draining and self._mailbox is not None:
            self._mailbox.send(Farewell(True, "draining"))
        self.draining = True
        return []

    def _begin(self, request: Request) -> list[Event]:
        """A request has come."""
        if self.draining:
            return [Refused(request.id, "this replica is about to end", elsewhere=True)]
        if request.language is None:
            return [self._added(request, None)]
        automaton = self._compilation.automaton(request.language)
        if automaton is not None:
            return [self._added(request, automaton)]
        try:
            self.engine.check(request)
        except UserError as error:
            return [Refused(request.id, str(error))]
        if self._compilation.wait(request, request.language) and self._compiler is not None:
            self._compiler.submit(request.language)
        return []

    def _cancel_compilation(self, languages: Sequence[Language]) -> None:
        """Of rank 0: others have less to wait for."""
        if self._compiler is not None:
            for language in languages:
                self._compiler.cancel(language)

    def _added(self, request: Request, automaton: TokenAutomaton | None) -> Event:
        try:
            self.engine.add(request, automaton)
        except UserError as error:
            return Refused(request.id, str(error))
        return Accepted(request.id)


class _Errands:
    """Messages of rank 0 for all ranks, over a group of CPUs: no GPU waits for them."""

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo") if world_size() > 1 else None

    def of_rank_zero(self, errands: list[Errand]) -> list[Errand]:
        """Collective: rank 0's list, on every rank. Where there is none, a rank waits for rank 0 here."""
        if self._group is None:
            return errands
        packed = encode(errands) if errands else b""
        size = torch.tensor(len(packed))
        dist.broadcast(size, 0, group=self._group)
        if not size:
            return []
        content = torch.empty(int(size), dtype=torch.uint8)
        if is_rank_zero():
            content = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
        dist.broadcast(content, 0, group=self._group)
        return errands if is_rank_zero() else _errands.decode(content.numpy().tobytes())


def _vocabulary(network: Network, text: Text) -> Vocabulary:
    """What languages are spelled with. Raises `ConstraintError`."""
    if text.tokenizer is None:
        raise ConstraintError("this model has no tokenizer, so its answers cannot be held to a language")
    tokens = bytes_of_tokens(text.tokenizer)
    return Vocabulary(tokens, network.model_config.vocab_size, network.sampler_defaults.eos_ids)


def run(
    network: Network,
    config: EngineConfig,
    address: str,
    name: str,
    lonely_seconds: float,
    backend: Callable[[Any, EngineConfig, Decode | None, Markers | None], Backend] = Engine,
) -> dict[str, float]:
    """Serve until drained -> what was done."""
    began = time.monotonic()
    if device().type == "cpu":
        keep_freed_memory()
    replica = Replica(network, config, address, name, lonely_seconds, backend)
    replica.serve()
    return {"passes": replica.engine.passes, "seconds": round(time.monotonic() - began, 1)}
