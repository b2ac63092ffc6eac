"""Streams, events and CUDA graphs: what synchronises waits; a graph counts what it holds at every replay.

The block of a capture runs as it stands, but what it launches counts with the replays, as on a GPU. An event has not
come yet (`query` says so) as long as nothing was enqueued after it: then the host would wait and the GPU run dry.

Pools of graphs are those of torch's allocator (c10/cuda/CUDACachingAllocator.cpp): one that no graph has any more
cannot be recorded into, and memory is shared on one stream only.
"""

from __future__ import annotations

import functools
import itertools
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

from nemo_diffgemma.dry_run import waits
from nemo_diffgemma.dry_run.ledger import Ledger


@contextmanager
def followed(ledger: Ledger) -> Iterator[None]:
    """Inside the block torch.cuda's streams, events and graphs count in `ledger`."""

    def synchronise(*_: Any, **__: Any) -> None:
        waits.record(ledger, waits.SYNCHRONISE)

    def end(graph: torch.cuda.CUDAGraph) -> None:
        graph.__dict__["_dry_run_counts"], ledger.captured = ledger.captured, None

    def replay(graph: torch.cuda.CUDAGraph) -> None:
        ledger.replay(graph.__dict__["_dry_run_counts"])
        ledger.add("graph_launches")

    pools = _Pools(ledger)
    record_event, recorded = torch.cuda.Event.record, weakref.WeakKeyDictionary[torch.cuda.Event, int]()

    def record(event: torch.cuda.Event, *args: Any, **kwargs: Any) -> None:
        recorded[event] = ledger.enqueued
        record_event(event, *args, **kwargs)

    def query(event: torch.cuda.Event) -> bool:
        return event not in recorded or ledger.enqueued > recorded[event]

    patches: list[tuple[Any, str, Any]] = [
        (torch.cuda, "synchronize", synchronise),
        (torch.cuda.Event, "synchronize", synchronise),
        (torch.cuda.Event, "record", record),
        (torch.cuda.Event, "query", query),
        (torch.cuda.Stream, "synchronize", synchronise),
        (torch.cuda, "is_current_stream_capturing", lambda: ledger.captured is not None),
        (torch.cuda.graphs, "is_current_stream_capturing", lambda: ledger.captured is not None),
        (torch.cuda.CUDAGraph, "capture_begin", lambda graph, pool=None, **_: pools.begin(graph, pool)),
        (torch.cuda.CUDAGraph, "capture_end", end),
        (torch.cuda.CUDAGraph, "replay", replay),
        (torch.cuda.CUDAGraph, "reset", lambda graph: None),
        (torch.cuda.CUDAGraph, "pool", lambda graph: (0, 0)),
        (torch.cuda, "graph_pool_handle", pools.handle),
        (torch.cuda.graphs, "graph_pool_handle", pools.handle),
        (torch.cuda, "empty_cache", functools.partial(int, 0)),
    ]
    with ExitStack() as stack:
        for owner, name, stand_in in patches:
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        yield


class _Pools:
    """Memory pools of CUDA graphs, with the graphs that they have and the stream these were captured on."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._graphs: dict[Any, weakref.WeakSet[torch.cuda.CUDAGraph]] = {}
        self._streams: dict[Any, torch.cuda.Stream] = {}
        self._numbers = itertools.count(1)

    def handle(self) -> tuple[int, int]:
        """A new pool."""
        return 0, next(self._numbers)

    def begin(self, graph: torch.cuda.CUDAGraph, pool: Any) -> None:
        """A capture begins, into a pool or one of its own. Raises RuntimeError where torch would."""
        if self._ledger.captured is not None:
            raise RuntimeError("a CUDA graph is captured inside of another")
        if pool is not None:
            self._take(pool, graph)
        self._ledger.captured = Counter()

    def _take(self, pool: Any, graph: torch.cuda.CUDAGraph) -> None:
        stream = torch.cuda.current_stream()
        if pool in self._graphs and not self._graphs[pool]:
            raise RuntimeError("use_count > 0 INTERNAL ASSERT FAILED: a pool that no CUDA graph has any more")
        if self._streams.setdefault(pool, stream) != stream:
            self._ledger.violate("CUDA graphs of one pool are captured on several streams: they share no memory")
        self._graphs.setdefault(pool, weakref.WeakSet()).add(graph)
