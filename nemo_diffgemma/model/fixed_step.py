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
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nemo_diffgemma.config import SLIDING, ModelConfig
from nemo_diffgemma.diffusion.generate import Settled, StepInputs
from nemo_diffgemma.model.cache import Cache, KeyValue
from nemo_diffgemma.model.segments import FixedStream, Kind, Segment, Span
from nemo_diffgemma.parallel.agreement import all_ranks
from nemo_diffgemma.transfer import to_device

FEWEST = 256  # columns of the smallest bucket
KEPT = 4  # geometries: buffers, and a recording each

Results = tuple[Tensor, ...]
Compute = Callable[[StepInputs, FixedStream, Cache], Settled]
Recorder = Callable[[Callable[[], Results]], tuple[Any, Results]]


class Columns(NamedTuple):
    """Columns of the context in the layers of one kind, and whether some row fills less than all."""

    count: int
    masked: bool


class Geometry(NamedTuple):
    """What buffers and a recording are made for."""

    rows: int
    columns: tuple[tuple[str, Columns], ...]  # of each kind of layer


def bucket(columns: int) -> int:
    """`columns` rounded up: the next power of two, at least `FEWEST`."""
    return max(FEWEST, 1 << (columns - 1).bit_length())


def geometry(cache: Cache, config: ModelConfig) -> Geometry:
    """The geometry in which the contexts of `cache` lie."""
    columns = {}
    for kind, layer in _layers_by_kind(config).items():
        lengths = [span.length for span in cache.layers[layer].kept]
        most = bucket(max(lengths))
        if kind == SLIDING:
            most = min(most, config.sliding_window - 1)
        # buckets that happen to be full keep their mask: the next canvas needs it
        columns[kind] = Columns(most, kind != SLIDING or min(lengths) < config.sliding_window - 1)
    return Geometry(len(cache.sequences), tuple(columns.items()))


def _layers_by_kind(config: ModelConfig) -> dict[str, int]:
    """The first layer of each kind."""
    return {kind: config.layer_types.index(kind) for kind in dict.fromkeys(config.layer_types)}


class CudaGraphs:
    """Records calls as CUDA graphs. They share memory: one runs at a time, and its results are copied at once."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, function: Callable[[], Results]) -> tuple[Any, Results]:
        """(graph, what it fills). `function` has run before, so that nothing is initialised while recording."""
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        recording = torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local")
        with torch.cuda.stream(stream), recording:  # the outer one restores the caller's stream after errors as well
            return graph, function()


class FixedSteps:
    """The steps of one network: buffers and recordings of the last few geometries.

    The first step of a geometry is computed, the second recorded, all others replayed. Without a `recorder`, or once
    recording has failed on some rank, every step is computed from the buffers.
    """

    def __init__(self, recorder: Recorder | None) -> None:
        self.recorder = recorder
        self._steps: OrderedDict[Geometry, _FixedStep] = OrderedDict()
        self._weights: tuple[int, ...] = ()

    def clear(self) -> None:
        """Give all buffers and recordings back."""
        self._steps.clear()

    def run(self, compute: Compute, inputs: StepInputs, cache: Cache, model: torch.nn.Module) -> Settled:
        """One step of canvases behind the contexts of `cache`; `compute` computes it, with the weights of `model`."""
        key = geometry(cache, model.model_config)
        if key not in self._steps:
            while len(self._steps) >= KEPT:
                self._steps.popitem(last=False)  # its memory first
            self._steps[key] = _FixedStep(key, inputs, cache, model)
        self._steps.move_to_end(key)
        step = self._steps[key]
        if not step.has(cache):
            self._forget_recordings_of_other_weights(model)
            step.load(cache)
        step.fill(inputs)
        if step.recording is None and step.was_computed and self.recorder is not None:
            self._record(step, compute)
        results = step.replayed() if step.recording is not None else step.computed(compute)
        return Settled(*results, cache=cache)

    def _record(self, step: _FixedStep, compute: Compute) -> None:
        """Record a step, on all ranks or none: one that computes and others that replay are in step all the same."""
        assert self.recorder is not None
        try:
            step.recording = self.recorder(lambda: step.computed(compute))
        except RuntimeError as error:  # out of memory is one
            logging.getLogger(__name__).warning("no CUDA graph of a denoising step, steps are launched: %s", error)
        if not all_ranks(step.recording is not None, step.device):
            step.recording = self.recorder = None

    def _forget_recordings_of_other_weights(self, model: torch.nn.Module) -> None:
        """A recording reads weights where they lay: `model.to(...)` and the like move them."""
        if self.recorder is None:
            return
        weights = tuple(tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers()))
        if weights != self._weights:
            for step in self._steps.values():
                step.recording = None
        self._weights = weights


class _FixedStep:
    """Buffers of one geometry, and the recording of a step that reads and writes them."""

    recording: tuple[Any, Results] | None = None
    was_computed = False

    def __init__(self, shape: Geometry, inputs: StepInputs, cache: Cache, model: torch.nn.Module) -> None:
        config: ModelConfig = model.model_config
        length, columns = config.canvas_length, dict(shape.columns)
        self.device, self._first_layers = inputs.canvas.device, _layers_by_kind(config)
        self._kinds = config.layer_types
        self._cache: Callable[[], Cache | None] = lambda: None
        segments = tuple(Segment(row, Kind.CANVAS, 1, length) for row in range(shape.rows))
        multiple = model.groups.tp.size()
        with torch.inference_mode(False):  # buffers are written in later passes of either mode

            def buffer(*sizes: int, dtype: torch.dtype) -> Tensor:
                return torch.zeros(sizes, dtype=dtype, device=self.device)

            tokens = shape.rows * length
            self._positions_T = buffer(tokens + -tokens % multiple, dtype=torch.long)
            self._masks = {
                kind: buffer(shape.rows, 1, 1, count + length, dtype=model.dtype) if masked else None
                for kind, (count, masked) in columns.items()
            }
            self._layers = tuple(
                KeyValue(
                    *(
                        buffer(shape.rows, columns[kind].count + length, *x.shape[1:], dtype=x.dtype)
                        for x in (past.keys, past.values)
                    ),
                    kept=(),
                )
                for kind, past in zip(config.layer_types, cache.layers, strict=True)
            )
            self._inputs = StepInputs(
                canvas=buffer(shape.rows, length, dtype=torch.long),
                uniforms=buffer(shape.rows, length, dtype=torch.float32),
                replacements=buffer(shape.rows, length, dtype=torch.long),
                temperature=buffer(shape.rows, dtype=torch.float64),
                entropy_bound=buffer(dtype=torch.float64),
                soft=buffer(shape.rows, length, config.hidden_size, dtype=model.dtype),
            )
        windows = {None if kind != SLIDING else config.sliding_window: mask for kind, mask in self._masks.items()}
        self._stream = FixedStream(
            (Span(0, 1),) * shape.rows, segments, multiple, positions_T=self._positions_T, masks=windows
        )

    def has(self, cache: Cache) -> bool:
        """Whether the contexts in the buffers are those of `cache`."""
        return self._cache() is cache

    def load(self, cache: Cache) -> None:
        """Copy the contexts into the buffers, without waiting for the device."""
        ends = [span.end for span in cache.sequences]
        rows = [_rows(cache.layers[layer].kept) for layer in self._first_layers.values()]
        numbers = to_device(torch.tensor([ends, *(part for pair in rows for part in pair)]), self.device)
        count, length = self._inputs.canvas.shape
        tokens = numbers[0][:, None] + torch.arange(length, device=self.device)
        self._positions_T[: count * length] = tokens.flatten()
        indices = {}
        for kind, offset_B, length_B in zip(self._first_layers, numbers[1::2], numbers[2::2], strict=True):
            columns = self._layers[self._first_layers[kind]].keys.shape[1] - length
            column, mask = torch.arange(columns, device=self.device), self._masks[kind]
            # what no row fills repeats its last key: finite, whatever the mask does with it
            indices[kind] = (offset_B[:, None] + column.minimum(length_B[:, None] - 1)).flatten()
            if mask is not None:
                mask[:, 0, 0, :columns] = torch.where(column < length_B[:, None], 0.0, -torch.inf)
        for kind, past, own in zip(self._kinds, cache.layers, self._layers, strict=True):
            for given, kept in ((past.keys, own.keys), (past.values, own.values)):
                columns = kept.shape[1] - length
                kept[:, :columns] = given.index_select(0, indices[kind]).view(count, columns, *given.shape[1:])
        self._cache = weakref.ref(cache)

    def fill(self, inputs: StepInputs) -> None:
        """Copy the inputs of a step into the buffers; no signal is one of zeros, which adds exactly nothing."""
        for name in ("canvas", "uniforms", "replacements", "temperature", "entropy_bound", "soft"):
            buffer, given = getattr(self._inputs, name), getattr(inputs, name)
            if isinstance(given, Tensor):
                buffer.copy_(given)
            else:
                buffer.fill_(0.0 if given is None else given)

    def computed(self, compute: Compute) -> Results:
        """The results of one step, in memory of their own: canvas, arg-max, entropy, accepted, signal."""
        self.was_computed = True
        return tuple(compute(self._inputs, self._stream, Cache(self._stream.sequences, self._layers))[:5])

    def replayed(self) -> Results:
        """The same from the recording, copied: the next replay fills them anew."""
        assert self.recording is not None
        graph, results = self.recording
        graph.replay()
        return tuple(result.clone() for result in results)


def _rows(kept: Sequence[Span]) -> tuple[list[int], list[int]]:
    """Where the kept positions of each sequence begin among the keys of a layer, and how many these are."""
    lengths = [span.length for span in kept]
    return list(itertools.accumulate(lengths[:-1], initial=0)), lengths
