"""How the first rank of a replica hears the front end and answers it, while passes run: a thread with the socket.

The thread says Hello until it is welcome, then says every second that the replica lives, however long a pass takes.
Where its connection ends, some of what was said may be lost: it forgets all requests and says Hello by another one.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
import uuid

import msgspec
import zmq

from nemo_diffgemma.errors import UserError
from nemo_diffgemma.serving.compiling import Compiled
from nemo_diffgemma.serving.messages import (
    Beat,
    Cancel,
    Drain,
    Hello,
    Ping,
    TextFiles,
    ToFront,
    ToReplica,
    Unknown,
    Welcome,
    encode,
    of_front,
)
from nemo_diffgemma.serving.request import Request

Errand = Request | Cancel | Drain | Unknown | Compiled  # what the engines of all ranks are told
_BEAT = 1.0  # seconds
_LINGER = 2.0  # seconds in which the last messages may leave


class Mailbox:
    """`name` is what the front end knows the replica by. `lonely_seconds` without a word of the front end end it."""

    def __init__(self, address: str, hello: Hello, text: TextFiles | None, lonely_seconds: float) -> None:
        self._hello, self._text, self._lonely_seconds = hello, text, lonely_seconds
        self._inbox: queue.SimpleQueue[Errand] = queue.SimpleQueue()
        self._context = zmq.Context()
        self._address = address
        try:
            self._connect()
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)  # or its end would wait for the socket's
            raise UserError(f"front={address}: {error}; expected tcp://host:port or ipc:///path") from None
        outgoing = f"inproc://{uuid.uuid4().hex}"
        self._pull = self._context.socket(zmq.PULL)
        self._pull.rcvhwm = 0
        self._pull.bind(outgoing)
        self._push = self._context.socket(zmq.PUSH)
        self._push.sndhwm = 0
        self._push.connect(outgoing)
        self.lonely = False
        self._beat, self._since = Beat(0, 0, 0, 0.0), time.monotonic()
        self._thread = threading.Thread(target=self._run, name="mailbox", daemon=True)
        self._thread.start()

    def _connect(self) -> None:
        """A connection with a name of its own, and what hears of its end."""
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.identity = uuid.uuid4().bytes
        self._socket.sndhwm = self._socket.rcvhwm = 0  # the front end limits its queue; nothing may be dropped
        self._socket.linger = int(1000 * _LINGER)
        self._ends = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._socket.connect(self._address)

    # -- of the thread that runs passes ----------------------------------------------------------------------------

    def take(self, wait_seconds: float) -> list[Errand]:
        """What has come since the last time; waits for the first for a while."""
        errands = []
        try:
            errands.append(self._inbox.get(timeout=wait_seconds) if wait_seconds else self._inbox.get_nowait())
            while True:
                errands.append(self._inbox.get_nowait())
        except queue.Empty:
            return errands

    def post(self, errand: Errand) -> None:
        """An errand of this process, from any thread: `take` gives it with what has come."""
        self._inbox.put(errand)

    def send(self, message: ToFront) -> None:
        self._push.send(encode(message))

    def passed(self, running: int, waiting: int, passes: int) -> None:
        """A pass is over, or is about to begin. Who comes and goes is told at once."""
        before, self._beat = self._beat, Beat(running, waiting, passes, 0.0)
        self._since = time.monotonic()
        if (running, waiting) != (before.running, before.waiting):
            self.send(self._beat)

    def close(self) -> None:
        """Send what is left, and end the thread."""
        self._push.send(b"")
        self._thread.join(2 * _LINGER)
        self._push.close(0)
        self._context.term()

    # -- of the thread with the socket -----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._speak()
        finally:
            self.lonely = True  # whatever ends this thread
            self._disconnect()
            self._pull.close(0)

    def _disconnect(self, linger: int | None = None) -> None:
        self._socket.disable_monitor()
        self._ends.close(0)
        self._socket.close(linger)

    def _speak(self) -> None:
        welcome, heard, next_beat = False, time.monotonic(), 0.0
        while True:
            now = time.monotonic()
            if now >= next_beat:
                self._socket.send(encode(self._news() if welcome else self._hello))
                next_beat = now + _BEAT
                self.lonely = now - heard > self._lonely_seconds
            ready = self._ready(max(1, int(1000 * (next_beat - now))))
            if self._pull in ready and not self._forward():
                break
            for message in self._received():
                heard = time.monotonic()
                if isinstance(message, Welcome):
                    welcome = True
                    if message.wants_text and self._text is not None:
                        self._socket.send(encode(self._text))
                elif isinstance(message, Unknown):
                    welcome, next_beat = False, 0.0
                    self._inbox.put(message)
                elif not isinstance(message, Ping):
                    self._inbox.put(message)
            if self._ends in ready:
                self._disconnect(linger=0)
                self._connect()
                self._inbox.put(Unknown())
                welcome, next_beat = False, 0.0

    def _ready(self, milliseconds: int) -> set[object]:
        """Which of the three sockets have something, after a while at most."""
        poller = zmq.Poller()
        for socket in (self._socket, self._ends, self._pull):
            poller.register(socket, zmq.POLLIN)
        return {socket for socket, _ in poller.poll(milliseconds)}

    def _news(self) -> Beat:
        beat, since = self._beat, self._since
        stalled = time.monotonic() - since if beat.running or beat.waiting else 0.0
        return msgspec.structs.replace(beat, stalled=stalled)

    def _forward(self) -> bool:
        """Send what the other thread wants sent; False when it has said that this was all."""
        try:
            while message := self._pull.recv(zmq.NOBLOCK):
                self._socket.send(message)
            return False
        except zmq.Again:
            return True

    def _received(self) -> list[ToReplica]:
        messages: list[ToReplica] = []
        try:
            while True:
                message = self._socket.recv(zmq.NOBLOCK)
                try:
                    messages.append(of_front(message))
                except msgspec.DecodeError as error:
                    print(f"replica: what came is no message of a front end ({error})", file=sys.stderr)
        except zmq.Again:
            return messages
