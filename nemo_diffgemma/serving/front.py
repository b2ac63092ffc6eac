"""The front end's process: HTTP, the router, and the replicas of this node. It imports no torch.

    python -m nemo_diffgemma.serving.front FD      # reads its settings from a file descriptor; launch/serve.py does it

The first line of standard output, when the first replica is ready, is JSON: url, model, replicas. SIGTERM and SIGINT
drain: no new connections, what is being answered is answered, then the replicas end, and the exit code is 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import math
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import uvicorn
import zmq

from nemo_diffgemma.cli.reporting import USER_ERROR, print_error
from nemo_diffgemma.scratch import scratch_directory
from nemo_diffgemma.serving.api.app import create_app
from nemo_diffgemma.serving.http_protocol import Protocol
from nemo_diffgemma.serving.metrics import Metrics
from nemo_diffgemma.serving.router import Router
from nemo_diffgemma.serving.settings import FrontSettings
from nemo_diffgemma.serving.supervisor import StartError, Supervisor

_LAST_WORDS = 5.0  # seconds after the time to drain, in which those that are not answered hear so
_KEEP_ALIVE = 65  # seconds; longer than clients keep idle connections, or one may close as a request comes


class _Server(uvicorn.Server):
    """uvicorn without its handlers of signals: ours drain first and end the replicas after."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(settings: FrontSettings, listener: socket.socket, folder: Path) -> int:
    """Serve until a signal comes -> exit code."""
    metrics = Metrics()
    own = f"ipc://{folder}/replicas"
    router = Router(
        settings, metrics, on_dead=lambda name: supervisor.kill(name), on_ready=lambda name: supervisor.served(name)
    )
    supervisor = Supervisor(settings, own, on_end=router.ended)
    try:
        router.listen([own, settings.address] if settings.address else [own])
    except zmq.ZMQError as error:
        print_error(f"address={settings.address}: {error}; expected tcp://0.0.0.0:port, a port that is free")
        return USER_ERROR
    config = uvicorn.Config(
        create_app(router, settings, metrics),
        log_level="warning",
        access_log=False,
        http=Protocol,
        ws="none",
        timeout_keep_alive=_KEEP_ALIVE,
        timeout_graceful_shutdown=math.ceil(settings.drain_seconds + _LAST_WORDS),
    )
    server = _Server(config)
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    http = asyncio.create_task(server.serve(sockets=[listener]))
    replicas = supervisor.start()
    announced = asyncio.create_task(_announce(settings, listener, router))
    ends = [asyncio.create_task(stopped.wait()), http, *([replicas] if settings.replicas else [])]
    try:
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        server.should_exit = True
        late = asyncio.get_running_loop().call_later(settings.drain_seconds, router.abandon)
        await http
        late.cancel()
    finally:
        for task in (ends[0], announced):
            task.cancel()
        await router.close()
        await supervisor.close()
    return await _exit_code(replicas)


async def _exit_code(replicas: asyncio.Task[None]) -> int:
    with contextlib.suppress(asyncio.CancelledError):
        try:
            await replicas
        except StartError as error:
            print_error(str(error))
            return error.exit_code if error.exit_code > 0 else 1
    return 0


async def _announce(settings: FrontSettings, listener: socket.socket, router: Router) -> None:
    await router.ready.wait()
    assert router.facts is not None
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    print(json.dumps({"url": url, "model": settings.names[0], "replicas": len(router.replicas)}), flush=True)


def _listener(settings: FrontSettings) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if sys.platform == "linux":  # the kernel cuts off clients that read nothing for so long
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * settings.request_seconds))
    listener.bind((settings.host, settings.port))
    return listener


def main() -> int:
    """Read the settings and serve -> exit code."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    with os.fdopen(int(sys.argv[1]), "rb") as stream:
        settings = msgspec.json.decode(stream.read(), type=FrontSettings)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # one file a connection
    gc.freeze()
    try:
        listener = _listener(settings)
    except OSError as error:
        print_error(f"host={settings.host} port={settings.port} cannot be listened at ({error}); port=0 takes any")
        return USER_ERROR
    # not below TMPDIR, which may be long: paths of sockets have 107 characters
    with scratch_directory(Path("/tmp"), "serve", private=True) as folder, listener:
        return asyncio.run(serve(settings, listener, folder))


if __name__ == "__main__":
    raise SystemExit(main())
