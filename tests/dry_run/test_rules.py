"""What counts as a launch, a wait or a violation: small operations, played on GPUs that are not there."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nemo_diffgemma.cli.child_process import call_in_child
from nemo_diffgemma.dry_run.driver import environment
from nemo_diffgemma.dry_run.mode import DryRun, MixedDevicesError
from nemo_diffgemma.dry_run.world import one_rank
from nemo_diffgemma.gpus import load_gpu
from nemo_diffgemma.model.fixed_step import CudaGraphs
from nemo_diffgemma.parallel.layout import ParallelLayout


def gpu_tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def pinned_copy() -> bool:
    flag = torch.empty((), dtype=torch.bool, pin_memory=True)
    flag.copy_(gpu_tensor(4).isnan().any(), non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    early = event.query()
    gpu_tensor(4).add_(1)
    return not early and event.query()


def replayed() -> None:
    graph, x = torch.cuda.CUDAGraph(), gpu_tensor(4, 4)
    with torch.cuda.graph(graph):
        (x @ x).add_(1).sum()
    for _ in range(10):
        graph.replay()


def waits_while_captured() -> None:
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        gpu_tensor(4).sum().item()


def recorded(record: Callable[[Callable[[], Any]], Any]) -> int:
    """Graphs that are kept, given back one by one, given back all, and recorded again."""

    def step() -> tuple[Tensor, ...]:
        return (gpu_tensor(4, 4) * 2,)

    kept = [record(step), record(step)]
    kept.pop(0)
    kept.append(record(step))
    kept.clear()
    kept.append(record(step))
    return len(kept)


def carelessly(share_stream: bool) -> Callable[[Callable[[], Any]], Any]:
    """A recorder that keeps one pool for ever, on one stream or not."""
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def record(step: Callable[[], Any]) -> Any:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream if share_stream else torch.cuda.Stream()):
            return graph, step()

    return record


def refused(run: Callable[[], Any]) -> str:
    try:
        run()
    except RuntimeError as error:
        return str(error)
    return "recorded"


def grouped(dtype: torch.dtype) -> None:
    ends = torch.tensor([16, 48], dtype=torch.int32).to("cuda", non_blocking=True)
    F.grouped_mm(gpu_tensor(64, 32, dtype=dtype), gpu_tensor(2, 32, 16, dtype=dtype), offs=ends)


def attended(width: int, keys: int, **options: Any) -> None:
    q, k = gpu_tensor(1, 8, 64, width), gpu_tensor(1, keys, 64, width)
    F.scaled_dot_product_attention(q, k, k, enable_gqa=keys < 8, **options)


def flexed() -> None:
    from torch.nn.attention import flex_attention as flex

    mask = flex.create_block_mask(lambda b, h, q, k: q >= k, None, None, 256, 256, device="cpu")
    q, k = gpu_tensor(1, 8, 256, 64).requires_grad_(), gpu_tensor(1, 2, 256, 64)
    flex.flex_attention(q, k, k, block_mask=mask, enable_gqa=True).sum().backward()


def masked() -> Tensor:
    """A shape that follows from numbers of the host."""
    chosen = torch.arange(10).to("cuda", non_blocking=True) % 3 == 0
    return gpu_tensor(10, 2)[chosen]


def zeroed() -> None:
    gpu_tensor(10, 2)[gpu_tensor(10).isnan()] = 0.0


OPERATIONS: dict[str, Callable[[], Any]] = {
    "adds": lambda: gpu_tensor(4).add_(1).view(2, 2) * 2,
    "makes nothing": lambda: gpu_tensor(4, 4).t()[0],
    "reads a number": lambda: gpu_tensor(4).sum().item(),
    "to the host": lambda: gpu_tensor(4).cpu(),
    "to the host, asynchronous": pinned_copy,
    "to the GPU": lambda: torch.ones(4).to("cuda"),
    "to the GPU, asynchronous": lambda: torch.ones(4).pin_memory().to("cuda", non_blocking=True),
    "makes a number": lambda: torch.tensor([1, 2], device="cuda"),
    "fills": lambda: torch.full((4,), 2.0, device="cuda"),
    "synchronises": lambda: torch.cuda.synchronize(),
    "masked": masked,
    "zeroed": zeroed,
    "indices of the host": lambda: gpu_tensor(4, 4)[torch.tensor([1, 2])],
    "replayed": replayed,
    "waits while captured": lambda: refused(waits_while_captured),
    "graphs of a network": lambda: recorded(CudaGraphs()),
    "a pool without graphs": lambda: refused(lambda: recorded(carelessly(share_stream=True))),
    "a pool of two streams": lambda: refused(lambda: recorded(carelessly(share_stream=False))),
    "grouped": lambda: grouped(torch.bfloat16),
    "grouped, float32": lambda: grouped(torch.float32),
    "float32 product": lambda: gpu_tensor(4, 4, dtype=torch.float32) @ gpu_tensor(4, 4, dtype=torch.float32),
    "attention": lambda: attended(64, 8),
    "attention, wide": lambda: attended(512, 8),
    "attention, grouped heads and a mask": lambda: attended(256, 2, attn_mask=gpu_tensor(64, 64, dtype=torch.bool)),
    "attention, wide and grouped": lambda: attended(512, 2),
    "flex": flexed,
    "mixed": lambda: gpu_tensor(4) + torch.ones(4, dtype=torch.bfloat16),
}


def play(names: list[str]) -> dict[str, tuple[dict[Any, float], list[str], Any]]:
    """Numbers and violations of each operation, and its shape or result."""
    results: dict[str, tuple[dict[Any, float], list[str], Any]] = {}
    for name in names:
        dry = DryRun(torch.bfloat16)
        with one_rank(dry, ParallelLayout(), 1, 0):
            dry.ledger.numbers.clear()
            with dry.ledger.doing("test"):
                try:
                    out = OPERATIONS[name]()
                except MixedDevicesError:
                    out = None
            results[name] = (
                {**dry.ledger.numbers},
                list(dry.ledger.violations),
                tuple(out.shape) if isinstance(out, Tensor) else out,
            )
    return results


@cache
def played(gpu: str) -> dict[str, tuple[dict[Any, float], list[str], Any]]:
    return call_in_child(play, list(OPERATIONS), environment=environment(load_gpu(gpu)))[0]


@pytest.mark.parametrize(
    ("name", "launches", "waits"),
    [
        ("adds", 2, 0),
        ("makes nothing", 0, 0),
        ("reads a number", 1, 1),
        ("to the host", 1, 1),
        ("to the GPU", 1, 1),
        ("to the GPU, asynchronous", 1, 0),
        ("makes a number", 1, 1),
        ("fills", 1, 0),
        ("synchronises", 0, 1),
        ("zeroed", 2, 0),
        ("replayed", 30, 1),  # the wait is that of torch.cuda.graph, before it records
        ("flex", 6, 0),  # with the sum, the gradient of the sum, and one forward, two backward of attention
        ("grouped", 2, 0),
        ("grouped, float32", 3, 1),
    ],
)
def test_launches_and_waits(name: str, launches: int, waits: int) -> None:
    numbers, _, _ = played("h100")[name]
    found = (numbers.get(("launches", "test"), 0), numbers.get(("waits", "test"), 0))
    assert found == (launches, waits), numbers


def test_a_grouped_product_is_a_loop_where_torch_has_no_kernel() -> None:
    assert played("rtx_5090")["grouped"][0]["waits", "test"] == 1
    assert played("rtx_5090")["grouped"][0]["launches", "test"] == 3


def test_rows_behind_the_last_group_are_not_multiplied() -> None:
    assert played("h100")["grouped"][0]["tflop", "test", "grouped_mm"] == pytest.approx(2e-12 * 48 * 32 * 16)


def test_flops_of_flex_attention_are_those_of_its_blocks() -> None:
    blocks = 3 * 128 * 128 * 8  # of four blocks one is left out; heads
    assert played("h100")["flex"][0]["tflop", "test", "flex_attention"] == pytest.approx(7 * 2e-12 * blocks * 64)


def test_shapes_follow_numbers_of_the_host() -> None:
    assert played("h100")["masked"][2] == (4, 2)


def test_an_event_comes_when_more_was_enqueued_behind_it() -> None:
    numbers, violations, came = played("h100")["to the host, asynchronous"]
    assert came and not violations and ("waits", "test") not in numbers


@pytest.mark.parametrize(
    ("gpu", "name", "kernel"),
    [
        ("h100", "attention", "cuDNN"),
        ("rtx_5090", "attention", "flash"),
        ("h100", "attention, wide", "memory-efficient"),
        ("rtx_5090", "attention, grouped heads and a mask", "math"),
        ("h100", "attention, wide and grouped", "math"),
    ],
)
def test_torch_chooses_the_kernel_of_the_gpu(gpu: str, name: str, kernel: str) -> None:
    numbers, violations, _ = played(gpu)[name]
    assert [key[2].partition(",")[0] for key in numbers if key[0] == "attention"] == [kernel]
    assert any(text.startswith("the math kernel") for text in violations) == (kernel == "math")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("mixed", "CPU and GPU tensors in one operation"),
        ("float32 product", "a float32 product in a bfloat16 model"),
        ("reads a number", "a wait of the host: reads a number"),
        ("indices of the host", "a wait of the host: indices from the host"),
        ("masked", "a wait of the host: shape depends on values"),
        ("waits while captured", "a wait while a CUDA graph is captured"),
        ("a pool of two streams", "CUDA graphs of one pool are captured on several streams"),
    ],
)
def test_what_must_not_be_is_told(name: str, text: str) -> None:
    assert any(violation.startswith(text) for violation in played("h100")[name][1])


def test_a_wait_breaks_a_capture_as_on_a_gpu() -> None:
    assert "not permitted when stream is capturing" in played("h100")["waits while captured"][2]


def test_a_pool_that_no_graph_has_any_more_cannot_be_recorded_into() -> None:
    assert "use_count > 0" in played("h100")["a pool without graphs"][2]


def test_steps_are_recorded_again_after_all_recordings_were_given_back_and_share_memory() -> None:
    _, violations, kept = played("h100")["graphs of a network"]
    assert kept == 1
    assert not any("several streams" in text for text in violations)
