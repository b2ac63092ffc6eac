"""Denoising steps of fixed shapes at fixed addresses, recorded once as CUDA graphs and replayed.

All steps of a canvas but its first have the same tokens, those of the canvases, behind the same contexts. So the keys
and values of the contexts are copied, once a canvas, into buffers [B, P + C, G, D] of each layer: P columns for the
context of a row, and behind them C into which each step writes the keys of its own canvas. A row may fill only the
first of the P columns; a mask hides the others.

P is rounded up to a bucket, a power of two from `FEWEST` on, so that a context that grows by a canvas at a time asks
for new buffers and a new recording only when it has doubled. Sliding layers have at most the `window - 1` columns that
a canvas sees; with all of them filled, as soon as a context is that long, there is no mask and flash attention runs.

What a step computes is a function of `StepInputs` and a cache, here as elsewhere: nobody else sees the buffers.

Shapes: B rows, C canvas positions, P columns of context, G key/value heads and D head width of a layer, T tokens.
"""

from __future__ import annotations

import itertools
import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from nemo_diffgemma.config import SLIDING, ModelConfig
from nemo_diffgemma.diffusion.constraint import Allowed, StepConstraint
from nemo_diffgemma.diffusion.generate import Settled, StepInputs
from nemo_diffgemma.model.cache import Cache, KeyValue
from nemo_diffgemma.model.row_products import multiple_of_tokens
from nemo_diffgemma.model.segments import FixedStream, Kind, Segment, Span
from nemo_diffgemma.parallel.agreement import all_ranks
from nemo_diffgemma.parallel.groups import end_with_groups
from nemo_diffgemma.transfer import to_device

FEWEST = 256  # columns of the smallest bucket
KEPT = 4  # geometries: buffers, and a recording each

if TYPE_CHECKING:
    from nemo_diffgemma.model.network import Network

Results = tuple[Tensor, ...]
Compute = Callable[[StepInputs, FixedStream, Cache], Settled]
Recorder = Callable[[Callable[[], Results]], tuple[Any, Results]]


class Columns(NamedTuple):
    """Columns for the context in the layers of one kind, and whether some row fills less than all."""

    most: int
    masked: bool


class Geometry(NamedTuple):
    """What buffers and a recording are made for."""

    rows: int
    length: int  # of a canvas
    columns: tuple[tuple[str, Columns], ...]  # of each kind of layer
    constraint: Hashable = None  # its own geometry, where there is one
    locked: bool = False  # whether there are ids that stand in the canvases


def bucket(columns: int) -> int:
    """`columns` rounded up: the next power of two, at least `FEWEST`."""
    return max(FEWEST, 1 << (columns - 1).bit_length())


def geometry(cache: Cache, config: ModelConfig, length: int) -> Geometry:
    """The geometry in which canvases of this length stand behind the contexts of `cache`."""
    columns = {}
    for kind, layer in _layers_by_kind(config).items():
        lengths = [span.length for span in cache.layers[layer].kept]
        most = bucket(max(lengths))
        if kind == SLIDING:
            most = min(most, config.sliding_window - 1)
        # buckets that happen to be full keep their mask: the next canvas needs it
        columns[kind] = Columns(most, kind != SLIDING or min(lengths) < config.sliding_window - 1)
    return Geometry(len(cache.sequences), length, tuple(columns.items()))


def _layers_by_kind(config: ModelConfig) -> dict[str, int]:
    """The first layer of each kind."""
    return {kind: config.layer_types.index(kind) for kind in dict.fromkeys(config.layer_types)}


class CudaGraphs:
    """Records calls as CUDA graphs. They share memory: one runs at a time, and its results are copied at once.

    torch keeps memory apart by stream, so all are recorded on one. A pool that no graph has any more is gone: torch
    refuses to record into it.
    """

    def __init__(self) -> None:
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    def __call__(self, function: Callable[[], Results]) -> tuple[Any, Results]:
        """(graph, what it fills). `function` has run before, so that nothing is initialised while recording."""
        self._stream = self._stream or torch.cuda.Stream()
        if not self._graphs:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        recording = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
        with torch.cuda.stream(self._stream), recording:  # the outer one restores the caller's stream after errors too
            results = function()
        self._graphs.add(graph)
        return graph, results


class FixedSteps:
    """The steps of one network: buffers and recordings of the last few geometries.

    The first step of a geometry is computed, the second recorded, all others replayed. Without a `recorder`, or once
    recording has failed on some rank, every step is computed from the buffers.
    """

    def __init__(self, recorder: Recorder | None) -> None:
        self.recorder = recorder
        self._steps: OrderedDict[Geometry, _FixedStep] = OrderedDict()
        end_with_groups(self)

    def clear(self) -> None:
        """Give all buffers and recordings back, for memory or because weights have moved: replays read the old ones."""
        self._steps.clear()

    def run(self, compute: Compute, inputs: StepInputs, cache: Cache, network: Network) -> Settled:
        """One step of canvases behind the contexts of `cache`; `compute` computes it, with the weights of `network`."""
        key = geometry(cache, network.model_config, inputs.canvas.shape[1])._replace(locked=inputs.locked is not None)
        if inputs.constraint is not None:
            key = key._replace(constraint=inputs.constraint.geometry)
        if key not in self._steps:
            while len(self._steps) >= KEPT:
                self._steps.popitem(last=False)  # its memory first
            self._steps[key] = _FixedStep(key, cache, network, inputs.constraint)
        self._steps.move_to_end(key)
        step = self._steps[key]
        if not step.has(cache):
            step.load(cache)
        step.fill(inputs)
        if step.recording is None and step.was_computed and self.recorder is not None:
            self._record(step, compute)
        canvas, argmax, entropy, accepted, soft, *allowed = step.results(compute)
        return Settled(canvas, argmax, entropy, accepted, soft, cache, Allowed(*allowed) if allowed else None)

    def _record(self, step: _FixedStep, compute: Compute) -> None:
        """Record a step, on all ranks or none: NCCL wants a collective to be captured everywhere or nowhere."""
        assert self.recorder is not None
        try:
            step.recording = self.recorder(lambda: step.computed(compute))
        except RuntimeError as error:  # out of memory is one
            logging.getLogger(__name__).warning("no CUDA graph of a denoising step, steps are launched: %s", error)
        if not all_ranks(step.recording is not None, step.device):
            step.recording = self.recorder = None


class _FixedStep:
    """Buffers of one geometry, and the recording of a step that reads and writes them."""

    def __init__(
        self, shape: Geometry, cache: Cache, network: Network, constraint: StepConstraint | None = None
    ) -> None:
        config, columns = network.model_config, dict(shape.columns)
        self.recording: tuple[Any, Results] | None = None
        self.was_computed = False
        self.device = cache.layers[0].keys.device
        self._length, self._kinds = shape.length, config.layer_types
        self._first_layers = _layers_by_kind(config)
        self._cache: Callable[[], Cache | None] = lambda: None
        self._constraint = constraint  # the one that the buffers hold
        multiple = multiple_of_tokens(self.device, network.groups.tp.size())  # of this mode
        with torch.inference_mode(False):  # buffers are written in later passes of either mode
            self._inputs = self._input_buffers(shape, network)
            if constraint is not None:
                self._inputs = replace(self._inputs, constraint=constraint.buffer())
            self._layers = tuple(
                self._context_buffers(past, shape.rows, columns[kind].most)
                for kind, past in zip(self._kinds, cache.layers, strict=True)
            )
            self._stream = self._fixed_stream(shape, network, multiple)

    def _buffer(self, *sizes: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(sizes, dtype=dtype, device=self.device)

    def _input_buffers(self, shape: Geometry, network: Network) -> StepInputs:
        rows = shape.rows
        return StepInputs(
            canvas=self._buffer(rows, self._length, dtype=torch.long),
            uniforms=self._buffer(rows, self._length, dtype=torch.float32),
            replacements=self._buffer(rows, self._length, dtype=torch.long),
            temperature=self._buffer(rows, dtype=torch.float64),
            entropy_bound=self._buffer(dtype=torch.float64),
            soft=self._buffer(rows, self._length, network.model_config.hidden_size, dtype=network.dtype),
            locked=self._buffer(rows, self._length, dtype=torch.long) if shape.locked else None,
        )

    def _context_buffers(self, past: KeyValue, rows: int, columns: int) -> KeyValue:
        keys, values = (
            self._buffer(rows, columns + self._length, *x.shape[1:], dtype=x.dtype) for x in (past.keys, past.values)
        )
        return KeyValue(keys, values, kept=())

    def _fixed_stream(self, shape: Geometry, network: Network, multiple: int) -> FixedStream:
        """Canvases whose positions, and the columns that they see, are written by `load`."""
        tokens = shape.rows * self._length
        self._positions_T = self._buffer(tokens + -tokens % multiple, dtype=torch.long)
        self._masks = {
            kind: self._buffer(shape.rows, 1, 1, most + self._length, dtype=network.dtype) if masked else None
            for kind, (most, masked) in shape.columns
        }
        window = network.model_config.sliding_window
        return FixedStream(
            (Span(0, 1),) * shape.rows,
            tuple(Segment(row, Kind.CANVAS, 1, self._length) for row in range(shape.rows)),
            multiple,
            positions_T=self._positions_T,
            masks={window if kind == SLIDING else None: mask for kind, mask in self._masks.items()},
        )

    def has(self, cache: Cache) -> bool:
        """Whether the contexts in the buffers are those of `cache`."""
        return self._cache() is cache

    def load(self, cache: Cache) -> None:
        """Copy the contexts into the buffers, without waiting for the device."""
        ends = [span.end for span in cache.sequences]
        places = [_places(cache.layers[layer].kept) for layer in self._first_layers.values()]
        numbers = to_device(torch.tensor([ends, *(part for pair in places for part in pair)]), self.device)
        tokens = numbers[0][:, None] + torch.arange(self._length, device=self.device)
        self._positions_T[: tokens.numel()] = tokens.flatten()
        indices = {}
        for kind, offset_B, length_B in zip(self._first_layers, numbers[1::2], numbers[2::2], strict=True):
            columns = self._layers[self._first_layers[kind]].keys.shape[1] - self._length
            column, mask = torch.arange(columns, device=self.device), self._masks[kind]
            # columns that a row does not fill repeat its last key: finite, whatever a kernel does with what is masked
            indices[kind] = (offset_B[:, None] + column.minimum(length_B[:, None] - 1)).flatten()
            if mask is not None:
                mask[:, 0, 0, :columns] = torch.where(column < length_B[:, None], 0.0, -torch.inf)
        for kind, past, own in zip(self._kinds, cache.layers, self._layers, strict=True):
            for given, buffer in ((past.keys, own.keys), (past.values, own.values)):
                context = buffer[:, : buffer.shape[1] - self._length]
                context.copy_(given.index_select(0, indices[kind]).view(context.shape))
        self._cache = weakref.ref(cache)

    def fill(self, inputs: StepInputs) -> None:
        """Copy the inputs of a step into the buffers; no signal is one of zeros, which adds exactly nothing."""
        names = ("canvas", "uniforms", "replacements", "temperature", "entropy_bound", "soft", "locked")
        for name in names if inputs.locked is not None else names[:-1]:
            buffer, given = getattr(self._inputs, name), getattr(inputs, name)
            if isinstance(given, Tensor):
                buffer.copy_(given)
            else:
                buffer.fill_(0.0 if given is None else given)
        if inputs.constraint is not None and inputs.constraint is not self._constraint:
            assert self._inputs.constraint is not None
            self._inputs.constraint.copy_(inputs.constraint)
            self._constraint = inputs.constraint

    def computed(self, compute: Compute) -> Results:
        """The results of one step, in memory of their own: canvas, arg-max, entropy, accepted, signal, `Allowed`."""
        self.was_computed = True
        settled = compute(self._inputs, self._stream, Cache(self._stream.sequences, self._layers))
        return (*settled[:5], *(settled.allowed or ()))

    def results(self, compute: Compute) -> Results:
        """The same from the recording where there is one, copied: the next replay fills them anew."""
        if self.recording is None:
            return self.computed(compute)
        graph, results = self.recording
        graph.replay()
        return tuple(result.clone() for result in results)


def _places(kept: Sequence[Span]) -> tuple[list[int], list[int]]:
    """Where the kept positions of each sequence begin among the keys of a layer, and how many these are."""
    lengths = [span.length for span in kept]
    return list(itertools.accumulate(lengths[:-1], initial=0)), lengths
