"""Load on a server: steps a canvas, tokens a forward, latencies and tokens a second, by how many ask at a time.

    python launch/bench_serve.py url=http://localhost:8000                        # one that runs
    python launch/bench_serve.py checkpoint=google/... dtype=bfloat16             # one that is started for it
    python launch/bench_serve.py url=... concurrency=[1,8,32] rates=[0.5,2] requests=100
    python launch/bench_serve.py url=... prompts=chat.jsonl max_tokens=512        # or texts, one a line
    python launch/bench_serve.py url=... prompt_tokens=2048 shared_tokens=2000    # a system prompt that all have

First so many users who each ask again when answered (`concurrency`), then requests that arrive at random (`rates`, a
second). An API key is taken from OPENAI_API_KEY. In the folder `out`: load.png and load.json. The last line is JSON:
model, loads (for each K, tokens_per_forward, first_canvas_s, between_canvases_s, latency_s, tokens_per_second,
tokens_per_second_of_one, counts), plot.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nemo_diffgemma.cli.output import Results
from nemo_diffgemma.cli.start import start
from nemo_diffgemma.schema import ConfigurationError, ParallelGroup, SamplerGroup
from nemo_diffgemma.serving.engine_config import EngineConfig


@dataclass
class BenchServeConfig:
    """Configuration of `launch/bench_serve.py`."""

    url: str | None = None  # of a server that runs
    checkpoint: str | None = None  # or served here, with dtype, replicas, parallel.* and engine.* as launch/serve.py
    concurrency: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32])  # requests at a time
    rates: list[float] = field(default_factory=list)  # requests a second, which arrive whether others are answered
    requests: int = 64  # of each load
    prompts: str | None = None  # file: chat or prompts as .jsonl, else a text a line; null: random ids
    prompt_tokens: int = 256  # of a random prompt
    shared_tokens: int = 0  # of these, at the beginning, the same in all
    max_tokens: int = 256  # of an answer
    canvas_length: int | None = None  # null: the model's
    sampler: SamplerGroup = field(default_factory=SamplerGroup)
    request_seconds: float = 600.0  # after which a request counts as failed
    out: str = "runs/bench_serve"
    seed: int = 0
    dtype: str = "float32"
    replicas: int = 1
    parallel: ParallelGroup = field(default_factory=ParallelGroup)
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        if (self.url is None) == (self.checkpoint is None):
            raise ConfigurationError("give url=http://host:port of a server, or checkpoint=... to start one")
        if not [*self.concurrency, *self.rates] or min([*self.concurrency, *self.rates]) <= 0:
            raise ConfigurationError(
                f"concurrency={self.concurrency} rates={self.rates}; expected numbers above 0, one at least"
            )
        if self.requests < 1 or self.max_tokens < 1 or not self.request_seconds > 0:
            raise ConfigurationError(
                f"requests={self.requests} max_tokens={self.max_tokens} request_seconds={self.request_seconds}; "
                "expected above 0"
            )
        if not 0 <= self.shared_tokens <= self.prompt_tokens or self.prompt_tokens < 1:
            raise ConfigurationError(
                f"prompt_tokens={self.prompt_tokens} shared_tokens={self.shared_tokens}; expected at least one token, "
                "and no more of them shared"
            )


def bench_serve(config: BenchServeConfig, results: Results) -> dict[str, Any]:
    """Measure a server, starting it where a checkpoint is given."""
    from nemo_diffgemma.serving.started import serving

    if config.url is not None:
        return measure(config, config.url.rstrip("/"), results)
    assert config.checkpoint is not None
    options = ["port=0", f"dtype={config.dtype}", f"replicas={config.replicas}"]
    options += [f"parallel.{name}={size}" for name, size in vars(config.parallel).items()]
    options += [f"engine.{name}={value}" for name, value in vars(config.engine).items()]
    with serving(config.checkpoint, *options) as url:
        return measure(config, url, results)


def measure(config: BenchServeConfig, url: str, results: Results) -> dict[str, Any]:
    """Every load, one after the other."""
    import asyncio
    import json
    import os
    import shutil

    from tqdm import tqdm

    from nemo_diffgemma.repository import user_path
    from nemo_diffgemma.serving.bench import report
    from nemo_diffgemma.serving.bench.calls import FilePrompts, RandomPrompts
    from nemo_diffgemma.serving.bench.load import Load, Target, run

    key = os.environ.get("OPENAI_API_KEY")
    diffusion = {**vars(config.sampler), "canvas_length": config.canvas_length}  # null is as good as absent
    body = {"max_tokens": config.max_tokens, "stream_options": {"include_usage": True}, "diffusion": diffusion}
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    facts = Target(url, body, headers, config.request_seconds).facts()
    target = Target(url, {"model": facts["id"], **body}, headers, config.request_seconds)
    of_file = None if config.prompts is None else FilePrompts.of(config.prompts)
    loads = [Load(config.requests, concurrency=users) for users in config.concurrency]
    loads += [Load(config.requests, rate=rate) for rate in config.rates]
    rows = []
    for index, load in enumerate([Load(1, concurrency=1), *loads]):  # the first warms up
        seed = config.seed + index * (config.requests + 1)
        prompts = of_file or RandomPrompts(
            config.prompt_tokens, config.shared_tokens, facts["diffusion"]["vocab_size"], seed
        )
        with tqdm(total=load.requests, desc=load.name if index else "warm-up", unit="request") as bar:
            records = asyncio.run(run(target, load, prompts, seed, bar.update))
        rows += [report.figures(load, records)] if index else []
    width = shutil.get_terminal_size().columns if results.colours else None
    results.show(report.show(rows, loads, width))
    for row, load in zip(rows, loads, strict=True):
        for error, count in row["errors"].items():
            results.show(f"{load.name}: {count} failed: {error}")
    results.exit_code = 0 if all(row["answered"] for row in rows) else 1
    out = user_path(config.out)
    report.plot(rows, out / "load.png")
    found = {"model": facts["id"], "url": url, "loads": rows, "plot": str(out / "load.png")}
    (out / "load.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


if __name__ == "__main__":
    start(bench_serve, BenchServeConfig, "bench_serve")
