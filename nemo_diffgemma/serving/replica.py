"""One engine with its ranks, in the service of a front end: launch/replica.py.

Rank 0 speaks with the front end (mailbox.py). Before each pass it tells the others what has come, so that the engines
of all ranks are given the same calls in the same order. SIGTERM drains: what is being answered is answered, nothing
new is taken. An error of one request ends that request; any other ends the replica, which tells the front end why.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType

import msgspec
import torch
import torch.distributed as dist

from nemo_diffgemma.diffusion_gemma import DiffusionGemma
from nemo_diffgemma.errors import UserError
from nemo_diffgemma.model.visibility import TILE
from nemo_diffgemma.parallel.agreement import all_or_none, is_rank_zero, world_size
from nemo_diffgemma.parallel.groups import current_layout, device
from nemo_diffgemma.serving.engine import Engine, EngineConfig
from nemo_diffgemma.serving.mailbox import Errand, Mailbox
from nemo_diffgemma.serving.messages import (
    Accepted,
    Cancel,
    Drain,
    Event,
    Events,
    Facts,
    Farewell,
    Hello,
    Refused,
    Unknown,
    encode,
)
from nemo_diffgemma.serving.request import Request
from nemo_diffgemma.serving.text import ServedText, files_of, fingerprint
from nemo_diffgemma.tokenizer import Text

_IDLE_SECONDS = 1.0  # after which the ranks of an idle replica hear of each other
_errands = msgspec.msgpack.Decoder(list[Errand])


class Replica:
    """The engine of this rank and, on rank 0, the way to the front end at `address`.

    `lonely_seconds` without a word of the front end end it: whoever has started it starts it again.
    """

    def __init__(
        self, network: DiffusionGemma, config: EngineConfig, address: str, name: str, lonely_seconds: float
    ) -> None:
        files = files_of(Text(network.assets))
        text = ServedText(files) if files else None
        self.engine = Engine(network, config, decode=text.decode if text else None)
        self.draining = False
        self._signalled = False
        self._errands_of_ranks = _Errands()
        self._mailbox: Mailbox | None = None
        hello = Hello(name, _facts(self.engine, fingerprint(files)))
        with all_or_none():
            if is_rank_zero():
                self._mailbox = Mailbox(address, hello, files, lonely_seconds)

    def serve(self) -> None:
        """Until it is drained. Raises what ends it before."""
        before = {number: signal.signal(number, self._drain_at_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            while not (self.draining and not self.engine.has_work):
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
            self._mailbox.passed(len(engine.running), len(engine.waiting) + len(engine.moved_out), engine.passes)

    def _taken(self) -> list[Errand]:
        """What rank 0 has heard; others hear it from there."""
        if self._mailbox is None:
            return []
        errands = self._mailbox.take(0 if self.engine.has_work or self._signalled else _IDLE_SECONDS)
        if self._signalled and not self.draining:
            errands.append(Drain())
        if self._mailbox.lonely and not self.draining:
            print("replica: nothing heard of the front end for long; ending", file=sys.stderr)
            errands += [Unknown(), Drain()]
        return errands

    def _do(self, errand: Errand) -> list[Event]:
        """The same on every rank."""
        engine = self.engine
        if isinstance(errand, Request):
            if self.draining:
                return [Refused(errand.id, "this replica is about to end")]
            try:
                engine.add(errand)
            except UserError as error:
                return [Refused(errand.id, str(error))]
            return [Accepted(errand.id)]
        if isinstance(errand, Cancel):
            return [*engine.cancel(errand.id)]
        if isinstance(errand, Unknown):
            everyone = [one.request for one in [*engine.running, *engine.moved_out]]
            for request in [*everyone, *(request for _, request in engine.waiting)]:
                engine.cancel(request.id)
            return []
        if not self.draining and self._mailbox is not None:
            self._mailbox.send(Farewell(True, "draining"))
        self.draining = True
        return []


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


def _facts(engine: Engine, text: str) -> Facts:
    model, network = engine.network.model_config, engine.network
    layout = ", ".join(f"{axis}={size}" for axis, size in vars(current_layout()).items() if size > 1)
    return Facts(
        vocab_size=model.vocab_size,
        canvas_length=model.canvas_length,
        context_tokens=_most_context(engine),
        tile=TILE,
        cached_tiles=max(1, min(blocks.count for blocks in engine.memory.blocks.values())),
        max_running=engine.config.max_running,
        sampler=network.sampler_defaults,
        text=text,
        layout=layout or "one process",
        device=torch.cuda.get_device_name() if device().type == "cuda" else "cpu",
        adapters=list(network.beside),
    )


def _most_context(engine: Engine) -> int:
    """The most tokens of context that one request can have: the memory's limit, or the model's, less a canvas."""
    model = engine.network.model_config
    low, high = 1, max(1, model.max_position_embeddings - model.canvas_length)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if engine.memory.fits(middle) else (low, middle - 1)
    return low


def run(
    network: DiffusionGemma, config: EngineConfig, address: str, name: str, lonely_seconds: float
) -> dict[str, float]:
    """Serve until drained -> what was done."""
    began = time.monotonic()
    replica = Replica(network, config, address, name, lonely_seconds)
    replica.serve()
    return {"passes": replica.engine.passes, "seconds": round(time.monotonic() - began, 1)}
