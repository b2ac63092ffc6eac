"""Serve a checkpoint, or a bundle of export/, to many users, behind OpenAI's API.

    python launch/serve.py checkpoint=google/... port=8000
    python launch/serve.py checkpoint=google/... parallel=tp2_ep2 replicas=2 dtype=bfloat16 engine.context_gb=20
    python launch/serve.py checkpoint=google/... host=0.0.0.0 api_keys_file=keys.txt
    python launch/serve.py checkpoint=google/... 'adapters={polite: runs/polite, terse: /data/terse}'
    python launch/serve.py bundle=bundles/mine provider=tensorrt
    python launch/serve.py replicas=0 address=tcp://0.0.0.0:5570 name=gemma       # replicas join: launch/replica.py

The first line of standard output, when the server is ready, is JSON: url, model, replicas. SIGTERM and Ctrl-C drain:
what is being answered is answered. Without an API key everybody who reaches the port may ask.
"""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nemo_diffgemma.cli.output import Results
from nemo_diffgemma.cli.start import start
from nemo_diffgemma.repository import ROOT, user_path
from nemo_diffgemma.schema import ConfigurationError, ParallelGroup
from nemo_diffgemma.serving.engine_config import EngineConfig, ServedModel
from nemo_diffgemma.serving.settings import DEFAULT_MAX_TOKENS


@dataclass
class ServeConfig(ServedModel):
    """Configuration of `launch/serve.py`. What is served is said of the replicas that are started here."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any that is free
    name: str | None = None  # of the model in requests; null: the checkpoint's. `default` is one too
    replicas: int = 1  # engines started on this node, each of parallel.* processes; 0: others join
    address: str | None = None  # tcp://0.0.0.0:port, where replicas of other nodes join
    queue_limit: int = 256  # requests that wait before others are told to come again
    request_seconds: float = 600.0  # time limit of a request, waiting included
    drain_seconds: float = 60.0  # after SIGTERM, for what is being answered
    max_body_mb: float = 8.0
    default_max_tokens: int = DEFAULT_MAX_TOKENS  # of answers to requests that name no limit
    api_keys_file: str | None = None  # one key a line; whoever has one may ask
    cors_origins: list[str] = field(default_factory=list)  # [https://a.example]: pages there may ask; none else may
    parallel: ParallelGroup = field(default_factory=ParallelGroup)
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        if self.replicas < 0 or self.queue_limit < 0 or not 0 <= self.port < 65536:
            raise ConfigurationError(
                f"replicas={self.replicas} queue_limit={self.queue_limit} port={self.port}; expected 0 or more"
            )
        if min(self.request_seconds, self.drain_seconds, self.max_body_mb, self.default_max_tokens) <= 0:
            raise ConfigurationError(
                f"request_seconds={self.request_seconds} drain_seconds={self.drain_seconds} "
                f"max_body_mb={self.max_body_mb} default_max_tokens={self.default_max_tokens}; expected above 0"
            )
        if self.replicas and self.checkpoint is None and self.bundle is None:
            raise ConfigurationError(
                "give checkpoint=... or bundle=..., or replicas=0 address=tcp://0.0.0.0:5570 for others to join"
            )
        if self.replicas:
            self.check_model()
        if not self.replicas and (self.address is None or self.name is None):
            raise ConfigurationError("replicas=0: give address=tcp://0.0.0.0:5570, where replicas join, and name=...")
        self._check_adapters()
        if self.parallel.replicas != 1:
            raise ConfigurationError(f"parallel.replicas={self.parallel.replicas}; a server has replicas=... instead")

    def _check_adapters(self) -> None:
        own = {_name(self), "default"}
        for name in self.adapters:
            if name in own:
                raise ConfigurationError(f"adapters={{{name}: ...}}: the model itself has that name; use another")
            if not re.fullmatch(r"[A-Za-z][\w./+@-]*", name, re.ASCII):
                what = "expected a letter, then letters, digits and _ . / + @ -"
                raise ConfigurationError(f"adapters={{{name}: ...}}: {what}; use another name")
        if self.adapters and not self.replicas:
            raise ConfigurationError("replicas=0: give adapters=... to each launch/replica.py instead")


def serve(config: ServeConfig, results: Results) -> dict[str, Any]:
    """Become the front end, which imports no torch."""
    import msgspec

    from nemo_diffgemma.cli.child_process import search_path
    from nemo_diffgemma.serving.settings import FrontSettings

    settings = FrontSettings(
        host=config.host,
        port=config.port,
        names=list(dict.fromkeys([_name(config), "default"])),
        replicas=[_command(config)] * config.replicas,
        environments=_environments(config),
        address=config.address,
        queue_limit=config.queue_limit,
        request_seconds=config.request_seconds,
        drain_seconds=config.drain_seconds,
        max_body_mb=config.max_body_mb,
        default_max_tokens=config.default_max_tokens,
        api_keys=_keys(config.api_keys_file),
        cors_origins=config.cors_origins,
    )
    reader = os.memfd_create("settings")  # keys stay out of files, arguments and environment
    os.write(reader, msgspec.json.encode(settings))
    os.lseek(reader, 0, os.SEEK_SET)
    os.set_inheritable(reader, True)
    results.restore()
    os.environ["PYTHONPATH"] = search_path()
    os.execv(sys.executable, [sys.executable, "-P", "-m", "nemo_diffgemma.serving.front", str(reader)])


def _name(config: ServeConfig) -> str:
    """Of the model in requests."""
    return config.name or user_path(config.checkpoint or config.bundle or "").resolve().name


def _command(config: ServeConfig) -> list[str]:
    """What starts a replica here."""
    axes = ("tensor", "expert", "expert_tensor", "pipeline", "context")
    what = [f"checkpoint={config.checkpoint}", f"dtype={config.dtype}"]
    if config.bundle is not None:
        what = [f"bundle={config.bundle}", f"provider={config.provider}"]
    return [
        sys.executable,
        str(ROOT / "launch" / "replica.py"),
        *what,
        *_adapters(config),
        *(f"parallel.{axis}={getattr(config.parallel, axis)}" for axis in axes),
        *(f"engine.{name}={value}" for name, value in vars(config.engine).items()),
    ]


def _adapters(config: ServeConfig) -> list[str]:
    pairs = [f"{name}: {json.dumps(path, ensure_ascii=False)}" for name, path in config.adapters.items()]
    return [f"adapters={{{', '.join(pairs)}}}"] if pairs else []


def _environments(config: ServeConfig) -> list[dict[str, str]]:
    """Each replica has GPUs, or cores, of its own. Raises `ConfigurationError` where there are not enough GPUs."""
    import torch

    from nemo_diffgemma.cli.torchrun import processes_of
    from nemo_diffgemma.parallel.threads import threads_of_process

    each, visible = processes_of(config.parallel), torch.cuda.device_count()
    if not visible:
        threads = os.environ.get("OMP_NUM_THREADS", str(threads_of_process(max(1, each * config.replicas))))
        return [{"OMP_NUM_THREADS": threads}] * config.replicas
    if each * config.replicas > visible:
        raise ConfigurationError(
            f"replicas={config.replicas} of {each} processes need {each * config.replicas} GPUs, one a process, but "
            f"{visible} are visible; use fewer, or a smaller layout"
        )
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(index) for index in range(visible)]
    return [
        {"CUDA_VISIBLE_DEVICES": ",".join(names[index * each : (index + 1) * each])} for index in range(config.replicas)
    ]


def _keys(file: str | None) -> list[str]:
    """Raises `ConfigurationError` for a file without keys."""
    if file is None:
        return []
    try:
        keys = user_path(file).read_text(encoding="ascii").split()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"api_keys_file={file} cannot be read: {error}") from None
    if not keys:
        raise ConfigurationError(f"api_keys_file={file} holds no key; write one a line")
    return keys


if __name__ == "__main__":
    start(serve, ServeConfig, "serve")
