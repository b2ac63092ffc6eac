"""The least time that a graph can take on a GPU, so that a measured latency can be judged.

    python export/roofline.py bundle=bundles/mine batch=1 context=1024
    python export/roofline.py bundle=bundles/mine batch=4 context=8192 tokens_per_forward=20

Counted from the ONNX as built, for given sizes of its dynamic axes:

- FLOPs: matrix products (MatMul, Gemm), two for each multiplication with addition, by the type they are computed in:
  a product of two dequantised operands in their stored type.
- Bytes: every input (weights, context, canvas) read once and every output written once. A loop reads what lies outside
  of it once an iteration; of a table that is only looked up, the rows looked up count.
- Loops over overloaded experts (see `export/graph/experts.py`) run `rounds=` rounds in every layer, none unless told:
  what a round costs stands beside the rest.
- `encode` takes the first chunk, before which there is no context: a later one reads its context too.
- Collectives: the bytes that each rank sends, each sum once (a sum inside of the switch; a ring of n ranks sends
  2 (n - 1) / n times as much).

Everything else counts as nothing, as if all intermediate tensors stayed on the chip and no weight did; the times are
lower bounds where the weights exceed the cache. GPUs are in conf/gpu. The last line is JSON: graphs (FLOPs, bytes) and
times (milliseconds by graph and GPU).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from onnx import ModelProto

from export.graph.cost import Cost, RooflineError, count
from nemo_diffgemma.cli.output import Results
from nemo_diffgemma.cli.output import table as columns
from nemo_diffgemma.gpus import Gpu, gpu_names, load_gpu

# -- bound -------------------------------------------------------------------------------------------------------------


class UnsupportedType(RooflineError):
    """A graph multiplies in a type that a GPU has no unit for."""

    def __init__(self, gpu: str, dtype: str) -> None:
        super().__init__(f"{gpu} has no {dtype} products; build the bundle with another quantization=")
        self.dtype = dtype


@dataclass(frozen=True)
class Bound:
    """Seconds that products, memory and links each need at least; they may overlap, so the longest is the bound."""

    compute: float
    memory: float
    links: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory, self.links)

    @property
    def limited_by(self) -> str:
        """`compute`, `memory` or `links`."""
        return max(("compute", "memory", "links"), key=lambda limit: getattr(self, limit))


def lower_bound(cost: Cost, gpu: Gpu) -> Bound:
    """Raises `UnsupportedType` where the GPU has no unit for a type of the graph."""
    compute = 0.0
    for dtype, flops in cost.flops_by_dtype.items():
        peak = gpu.peak(dtype)
        if peak is None:
            raise UnsupportedType(gpu.name, dtype)
        compute += flops / peak
    return Bound(compute, cost.bytes / (gpu.bandwidth_gb_s * 1e9), cost.collective_bytes / gpu.links.bytes_per_second)


def table(costs: Mapping[str, Cost], gpus: Sequence[Gpu], tokens_per_step: float) -> str:
    """A row for each GPU and graph: least milliseconds (for `loop` of one step), what limits, tokens a second.

    `tokens_per_step` is that of all rows of the batch together.
    """
    rows = []
    for gpu in gpus:
        for graph, cost in costs.items():
            fits = "yes" if cost.weight_bytes <= gpu.memory_gb * 1e9 else "no"
            try:
                bound = lower_bound(cost, gpu)
            except UnsupportedType as error:
                rows.append([gpu.name, graph, "-", f"no {error.dtype}", fits, "-"])
                continue
            tokens = "-" if graph == "encode" else f"{tokens_per_step / bound.seconds:,.0f}"
            rows.append([gpu.name, graph, f"{bound.seconds * 1e3:.4g}", bound.limited_by, fits, tokens])
    return columns(["GPU", "graph", "ms", "limited by", "weights fit", "tokens/s"], rows)


# -- a bundle ----------------------------------------------------------------------------------------------------------


@dataclass
class RooflineConfig:
    """Configuration of `export/roofline.py`."""

    bundle: str = "???"
    batch: int = 1
    context: int | None = None  # tokens before the canvas, of which encode takes the first chunk; null: 1024 or less
    tokens_per_forward: float | None = None  # tokens that a row gains by a step; null: all steps are run
    rounds: float = 0.0  # of overloaded experts, on average over layers


def roofline(config: RooflineConfig, results: Results) -> dict[str, Any]:
    """Bounds of every graph of a bundle (of one rank) on every GPU of conf/gpu."""
    import onnx

    from export.bundle.format import Bundle, read_bundle

    bundle: Bundle = read_bundle(config.bundle)
    settings = bundle.settings
    context = min(1024, settings.limits.context) if config.context is None else config.context
    sizes = _sizes(config, bundle, context)
    # a buffer of no context has one column, as engines have no empty axes
    first_chunk = {**sizes, "context_columns": 1, "window_columns": 1}
    costs = {}
    for graph in settings.graphs:
        model: ModelProto = onnx.load(bundle.path / settings.file(graph, 0), load_external_data=False)
        costs[graph] = count(model, first_chunk if graph == "encode" else sizes, bundle.weight_inputs)
    if "loop" in costs:
        costs["loop"] = costs["loop"].divided(sizes["steps"])
    gain = config.tokens_per_forward or bundle.config.canvas_length / sizes["steps"]
    gpus = [load_gpu(name) for name in gpu_names()]
    results.show(f"{config.bundle}, one rank: batch {config.batch}, context {context}, {settings.dtype}")
    results.show(f"encode takes a first chunk of {sizes['chunk']} tokens; a step gains {gain:.4g} tokens a row\n")
    for graph, cost in costs.items():
        flops = ", ".join(f"{n / 1e9:.4g} GFLOP {dtype}" for dtype, n in cost.flops_by_dtype.items())
        sent = f", {cost.collective_bytes / 1e6:.4g} MB over links" if cost.collective_bytes else ""
        results.show(f"  {graph}: {flops}, {cost.bytes / 1e9:.4g} GB{sent}")
        if cost.round_flops_by_dtype:
            more = ", ".join(f"{n / 1e9:.4g} GFLOP {dtype}" for dtype, n in cost.round_flops_by_dtype.items())
            results.show(f"    and for each round of overloaded experts: {more}, {cost.round_bytes / 1e9:.4g} GB")
    graphs = {graph: vars(cost) for graph, cost in costs.items()}
    costs = {graph: cost.with_rounds(config.rounds) for graph, cost in costs.items()}
    results.show(f"\nwith {config.rounds:g} rounds of overloaded experts in every layer:")
    results.show(table(costs, gpus, gain * config.batch))
    return {
        "graphs": graphs,
        "times": {graph: {gpu.name: _milliseconds(cost, gpu) for gpu in gpus} for graph, cost in costs.items()},
    }


def _milliseconds(cost: Cost, gpu: Gpu) -> float | None:
    try:
        return lower_bound(cost, gpu).seconds * 1e3
    except UnsupportedType:
        return None


def _sizes(config: RooflineConfig, bundle: Any, context: int) -> dict[str, int]:
    """Sizes of the dynamic axes. Raises `RooflineError` for what the bundle was not built for."""
    limits, steps = bundle.settings.limits, bundle.settings.steps
    for name, given, most in (("batch", config.batch, limits.batch), ("context", context, limits.context)):
        if not 1 <= given <= most:
            raise RooflineError(f"{name}={given}; {config.bundle} was built for 1 to {most}")
    if config.tokens_per_forward is not None and config.tokens_per_forward <= 0:
        raise RooflineError(f"tokens_per_forward={config.tokens_per_forward}; expected a number above 0")
    if not 0 <= config.rounds < math.inf:
        raise RooflineError(f"rounds={config.rounds}; expected 0 or a positive number of rounds")
    return {
        "batch": config.batch,
        "context_columns": context,
        "window_columns": min(context, max(1, bundle.config.sliding_window - 1)),
        "chunk": min(context, limits.chunk),
        "steps": steps or 48,
    }


if __name__ == "__main__":
    from nemo_diffgemma.cli.start import start

    start(roofline, RooflineConfig, "export_roofline")
