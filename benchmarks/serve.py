"""What serving gains: the figures of issue "Serve it", each beside what it is compared with, in one run.

    python benchmarks/serve.py products                   # of a pass, how much its matrix products take
    python benchmarks/serve.py arrivals                   # against transformers' `generate` in batches of what has come
    python benchmarks/serve.py server CHECKPOINT          # through HTTP: one at a time, eight at a time
    python benchmarks/serve.py prefix                     # time to the first canvas behind a prompt that is known

The model of `products`, `arrivals` and `prefix` is that of benchmarks/generate.py, with 8 denoising steps a canvas and
stopping switched off. Seconds are processor seconds of one thread: other processes that want the cores change them
little. Each prints its row as it stands in benchmarks/README.md.

`products` has two engines with the same requests in turn: a pass of the first is timed, and the products of the same
pass of the second (linear, grouped, attention's two, the vocabulary's) are run once more with the same tensors.
`arrivals` gives both sides the same requests at the same times by a clock that goes on by the processor seconds of each
pass, or of each call of `generate`: 12 requests of one or two canvases, a second apart on average. transformers' batch
is what has come by the end of the last, padded on the left.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
import warnings
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))
warnings.filterwarnings("ignore")

STEPS, VOCABULARY = 8, 32768


def models(folder: Path) -> tuple[Any, Any]:
    """Our model and transformers', with the same random weights."""
    import generate

    return generate.build(Namespace(vocabulary=VOCABULARY, hidden=512, layers=6), folder)


def requests(count: int, prompts: tuple[int, ...], canvases: tuple[int, ...]) -> list[Any]:
    from nemo_diffgemma import SamplerConfig
    from nemo_diffgemma.serving.request import Request

    draw = random.Random(0)
    sampler = SamplerConfig(max_denoising_steps=STEPS, stability_threshold=STEPS + 1, eos_token_id=(), pad_token_id=0)
    made = []
    for index in range(count):
        prompt = tuple(draw.randrange(3, VOCABULARY) for _ in range(draw.choice(prompts)))
        made.append(Request(str(index), prompt, 256 * draw.choice(canvases), 256, sampler, index))
    return made


def engine_of(ours: Any) -> Any:
    from nemo_diffgemma.serving.engine import Engine
    from nemo_diffgemma.serving.engine_config import EngineConfig
    from nemo_diffgemma.serving.freed_memory import keep_freed_memory

    keep_freed_memory()  # as a replica does
    return Engine(ours, EngineConfig(context_gb=0.5))


# -- products ----------------------------------------------------------------------------------------------------------


def recorder() -> Any:
    """Keeps the products of a pass as they are called, `linear` ones and those of `attention` as its two."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    linear = ("linear", "mm", "addmm", "addmm_", "matmul", "bmm", "_grouped_mm")

    class Recorder(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.linear: list[Callable[[], Any]] = []
            self.attention: list[Callable[[], Any]] = []

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name, given = function.overloadpacket.__name__, kwargs or {}
            if name in linear:
                self.linear.append(lambda: function(*args, **given))
            elif name.startswith(("scaled_dot_product", "_scaled_dot_product")):
                q, k, v = (x.flatten(0, 1) for x in args[:3])
                repeat = q.shape[0] // k.shape[0]
                k, v = (x.repeat_interleave(repeat, 0) if repeat > 1 else x for x in (k, v))
                weights = torch.empty(q.shape[0], q.shape[1], k.shape[1])
                self.attention += [lambda: torch.bmm(q, k.transpose(1, 2), out=weights), lambda: torch.bmm(weights, v)]
            return function(*args, **given)

    return Recorder()


def seconds_of(calls: list[Callable[[], Any]]) -> float:
    start = time.process_time()
    for call in calls:
        call()
    return time.process_time() - start


def products(options: argparse.Namespace) -> None:
    import torch

    with tempfile.TemporaryDirectory() as folder:
        ours = models(Path(folder))[0]
    engine, recorded = engine_of(ours), engine_of(ours)
    asked, total, alone, attention = requests(16, (512,), (1,)), 0.0, 0.0, 0.0
    warm, asked = asked[:8], asked[8:]
    for each in (engine, recorded):
        for request in warm:
            each.add(request)
        each.step()
        for request in warm:
            each.cancel(request.id)
        for request in asked:
            each.add(request)
    while engine.has_work:
        passed = seconds_of([engine.step])
        with recorder() as of_pass:
            recorded.step()
        with torch.inference_mode():
            seconds_of(of_pass.attention)  # fresh memory is not its cost
            of_linear, of_attention = seconds_of(of_pass.linear), seconds_of(of_pass.attention)
        total, alone, attention = total + passed, alone + of_linear, attention + of_attention
        print(f"pass {engine.passes}: {passed:.2f} s, products {of_linear:.2f} + {of_attention:.2f}", file=sys.stderr)
    tokens = sum(request.max_tokens for request in asked)
    print("| at a time | tokens/s | if linear products were all | if all products were | share, linear | share, all |")
    print("|---|---|---|---|---|---|")
    print(
        f"| 8 | {tokens / total:.1f} | {tokens / alone:.1f} | {tokens / (alone + attention):.1f} | "
        f"{alone / total:.2f} | {(alone + attention) / total:.2f} |"
    )


# -- arrivals ----------------------------------------------------------------------------------------------------------


def arrivals(options: argparse.Namespace) -> None:
    asked, draw, clock = requests(12, (64, 200, 512), (1, 2)), random.Random(1), 0.0
    due = []
    for _ in asked:
        due.append(clock)
        clock += draw.expovariate(1.0)
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = models(Path(folder))
    found = {"ours": continuous(engine_of(ours), asked, due), "transformers": static(theirs, asked, due)}
    tokens = sum(request.max_tokens for request in asked)
    print("| | tokens/s | mean latency, s |")
    print("|---|---|---|")
    for name, (end, latencies) in found.items():
        print(f"| {name} | {tokens / end:.1f} | {statistics.mean(latencies):.1f} |")
    print(f"ratio of tokens/s: {found['transformers'][0] / found['ours'][0]:.2f}")


def continuous(engine: Any, asked: list[Any], due: list[float]) -> tuple[float, list[float]]:
    """When the last answer was whole, and how long each took."""
    from nemo_diffgemma.serving.request import Finished

    clock, waiting, latencies = 0.0, list(zip(due, asked, strict=True)), []
    while waiting or engine.has_work:
        if not engine.has_work:
            clock = max(clock, waiting[0][0])
        while waiting and waiting[0][0] <= clock:
            engine.add(waiting.pop(0)[1])
        start = time.process_time()
        events = engine.step()
        clock += time.process_time() - start
        latencies += [clock - due[int(event.id)] for event in events if isinstance(event, Finished)]
        print(f"ours: {clock:.1f} s, {len(latencies)} answered", file=sys.stderr)
    return clock, latencies


def static(theirs: Any, asked: list[Any], due: list[float]) -> tuple[float, list[float]]:
    """The same of `generate`, for all that wait at a time."""
    import torch
    from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
        DiffusionGemmaGenerationConfig,
        EntropyBoundSamplerConfig,
    )

    clock, waiting, latencies = 0.0, list(zip(due, asked, strict=True)), []
    while waiting:
        clock = max(clock, waiting[0][0])
        batch = [request for when, request in waiting if when <= clock]
        del waiting[: len(batch)]
        longest = max(len(request.prompt) for request in batch)
        ids = torch.tensor([[0] * (longest - len(request.prompt)) + list(request.prompt) for request in batch])
        generation = DiffusionGemmaGenerationConfig(
            max_new_tokens=max(request.max_tokens for request in batch),
            max_denoising_steps=STEPS,
            sampler_config=EntropyBoundSamplerConfig(entropy_bound=0.1),
            t_min=0.4,
            t_max=0.8,
            stability_threshold=STEPS + 1,
            confidence_threshold=0.005,
            eos_token_id=None,
            pad_token_id=None,
        )
        start = time.process_time()
        theirs.generate(ids, attention_mask=(ids > 0).long(), generation_config=generation)
        clock += time.process_time() - start
        latencies += [clock - due[int(request.id)] for request in batch]
        print(f"transformers: {clock:.1f} s, a batch of {len(batch)}", file=sys.stderr)
    return clock, latencies


# -- prefix ------------------------------------------------------------------------------------------------------------


def prefix(options: argparse.Namespace) -> None:
    """Pairs of requests behind 2,000 tokens in common: the first of a pair encodes them, the second finds them."""
    import msgspec

    from nemo_diffgemma.serving.request import Settled

    with tempfile.TemporaryDirectory() as folder:
        engine = engine_of(models(Path(folder))[0])
    like, draw = requests(1, (1,), (1,))[0], random.Random(2)
    ids = lambda count: tuple(draw.randrange(3, VOCABULARY) for _ in range(count))

    def seconds(name: str, prompt: tuple[int, ...]) -> float:
        sampler = like.sampler.with_overrides({"max_denoising_steps": options.steps})
        short = {"canvas_length": 64, "max_tokens": 64}
        engine.add(msgspec.structs.replace(like, id=name, prompt=prompt, sampler=sampler, **short))
        start = time.process_time()
        while not any(isinstance(event, Settled) for event in engine.step()):
            pass
        return time.process_time() - start

    pairs = []
    for pair in range(-1, options.pairs):  # the first warms up
        shared = ids(2000)
        pairs.append([seconds(f"{pair} {which}", shared + ids(20)) for which in ("first", "second")])
        print(f"{pairs[-1][0]:.2f} s, then {pairs[-1][1]:.2f} s", file=sys.stderr)
    first, second = (statistics.median(column) for column in zip(*pairs[1:], strict=True))
    ratio = statistics.median(a / b for a, b in pairs[1:])
    print("| steps of the canvas | first time, s | second time, s | ratio (median of pairs) |")
    print("|---|---|---|---|")
    print(f"| {options.steps} | {first:.2f} | {second:.2f} | {ratio:.1f} |")


# -- server ------------------------------------------------------------------------------------------------------------


def server(options: argparse.Namespace) -> None:
    from nemo_diffgemma.serving.bench import report
    from nemo_diffgemma.serving.bench.calls import RandomPrompts
    from nemo_diffgemma.serving.bench.load import Load, Target, run
    from nemo_diffgemma.serving.started import serving

    body = {"max_tokens": options.max_tokens, "stream_options": {"include_usage": True}}
    rows: dict[int, list[dict[str, Any]]] = {1: [], 8: []}
    with serving(options.checkpoint, "port=0", "engine.context_gb=0.2") as url:
        facts = Target(url, body, {}, 300.0).facts()
        target = Target(url, {"model": facts["id"], **body}, {}, 300.0)
        for pair in range(-1, options.pairs):  # the first warms up
            for users, some in rows.items():
                load, seed = (
                    Load(options.requests * (users > 1) or options.requests // 4, concurrency=users),
                    100 * pair,
                )
                prompts = RandomPrompts(options.prompt, 0, facts["diffusion"]["vocab_size"], seed)
                before = processor_seconds()
                row = report.figures(load, asyncio.run(run(target, load, prompts, seed, lambda: None)))
                row["processor"] = row["tokens"] / (processor_seconds() - before)
                some += [row] * (pair >= 0)
                print(f"{users} at a time: {row['tokens_per_second']:.1f} tokens/s", file=sys.stderr)
    ratio = lambda name: statistics.median(b[name] / a[name] for a, b in zip(*rows.values(), strict=True))
    print("| at a time | tokens/s | latency, s (median) | K | tokens a processor second of the server |")
    print("|---|---|---|---|---|")
    for users, some in rows.items():
        numbers = [statistics.median(row[name] for row in some) for name in ("tokens_per_second", "K", "processor")]
        latency = statistics.median(row["latency_s"]["p50"] for row in some)
        print(f"| {users} | {numbers[0]:.1f} | {latency:.3f} | {numbers[1]:.1f} | {numbers[2]:.1f} |")
    print(f"ratio (median of pairs): {ratio('tokens_per_second'):.1f}; a processor second {ratio('processor'):.1f}")


def processor_seconds() -> float:
    """Of all processes below this one."""
    import os

    import psutil

    times = [child.cpu_times() for child in psutil.Process(os.getpid()).children(recursive=True)]
    return sum(one.user + one.system for one in times)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", required=True)
    modes.add_parser("products")
    modes.add_parser("arrivals")
    of_prefix = modes.add_parser("prefix")
    of_prefix.add_argument("--steps", type=int, default=1)
    of_prefix.add_argument("--pairs", type=int, default=3)
    of_server = modes.add_parser("server")
    of_server.add_argument("checkpoint")
    of_server.add_argument("--prompt", type=int, default=18)
    of_server.add_argument("--max-tokens", type=int, default=16)
    of_server.add_argument("--requests", type=int, default=96)
    of_server.add_argument("--pairs", type=int, default=3)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    import torch

    torch.set_num_threads(1)
    {"products": products, "arrivals": arrivals, "prefix": prefix, "server": server}[options.mode](options)


if __name__ == "__main__":
    main()
