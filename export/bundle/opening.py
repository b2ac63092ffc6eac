"""Open a bundle for use.

from export import open_bundle
engine = open_bundle("bundles/sudoku", provider="onnxruntime")
engine.generate(input_ids, seed=0).sequences
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
import torch
from torch import Tensor

from export.bundle.format import Bundle, BundleError, read_bundle
from export.engine.engine import Engine
from export.engine.onnx_session import OnnxSession, Session, Tensors
from export.engine.tensorrt_session import EngineSession, cuda_device
from export.graph.inline import inline, places_in

PROVIDERS = ("onnxruntime", "tensorrt_rtx", "tensorrt", "tensorrt_llm")


def open_bundle(path: str | Path, provider: str = "onnxruntime", device: int | None = None) -> Engine:
    """The engine of a bundle, with weights loaded.

    `onnxruntime` runs the graphs of all ranks in this process on the CPU (float32 and float16). The TensorRT providers
    run this process's rank (`RANK` of torchrun or srun) on CUDA device `device`, by default its own. Raises
    `BundleError` for what is no complete bundle, `WeightsError` where its weights do not fit, `EngineError` without
    what the provider needs.
    """
    bundle = read_bundle(path)
    check_provider(bundle, provider, device)
    if provider == "onnxruntime":
        ranks, where = list(range(bundle.settings.layout.world_size)), torch.device("cpu")
        sessions = _onnx_sessions(bundle, ranks)
    else:
        ranks, where = [_own_rank(bundle)], cuda_device(provider, device)
        sessions = _engine_sessions(bundle, provider, ranks[0], where)
    settings = bundle.settings
    return Engine(
        bundle.config,
        settings.layout,
        settings.torch_dtype,
        sessions,
        settings.limits,
        bundle.assets,
        ranks,
        settings.steps,
        where,
    )


def check_provider(bundle: Bundle, provider: str, device: int | None = None) -> None:
    """Raise `BundleError` or `EngineError` where `provider` cannot run this bundle here; reads no weights."""
    if provider not in PROVIDERS:
        raise BundleError(f"provider={provider!r}; use one of {', '.join(PROVIDERS)}")
    settings = bundle.settings
    if provider != "onnxruntime":
        rank = _own_rank(bundle)
        missing = [g for g in settings.graphs if not (bundle.path / settings.file(g, rank, "engine")).is_file()]
        if missing or bundle.info["builder"] != provider:
            raise BundleError(
                f"{bundle.path} was built with builder={bundle.info['builder']} and has no engines for "
                f"provider={provider}; build it again with builder={provider}, or open it with provider=onnxruntime"
            )
        cuda_device(provider, device)
    elif settings.dtype == "bfloat16":
        raise BundleError(
            f"{bundle.path} is bfloat16, which ONNX Runtime does not compute on the CPU; run it with provider=tensorrt "
            "on a GPU, or build it again with dtype=float32"
        )
    elif settings.quantization == "nvfp4":
        raise BundleError(
            f"{bundle.path} has NVFP4 experts, which ONNX Runtime does not know; run it with provider=tensorrt on a "
            "GPU, or compare it with export/check.py, which computes them in PyTorch"
        )


def _onnx_sessions(bundle: Bundle, ranks: Sequence[int]) -> dict[str, Session]:
    weights = [dict(bundle.load_weights(rank, packed=False)) for rank in ranks]
    return {
        graph: OnnxSession([_graph(bundle, graph, rank) for rank in ranks], weights, bundle.path)
        for graph in bundle.settings.graphs
    }


def _graph(bundle: Bundle, graph: str, rank: int) -> onnx.ModelProto:
    model = onnx.load(bundle.path / bundle.settings.file(graph, rank), load_external_data=False)
    if not bundle.packed:
        return model
    # ONNX Runtime takes packed types as constants only
    return inline(model, places_in(bundle.quantized(rank), bundle.path))


def _own_rank(bundle: Bundle) -> int:
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if world != bundle.settings.layout.world_size:
        raise BundleError(
            f"{bundle.path} has {bundle.settings.layout.world_size} ranks, but {world} processes run it; start "
            f"`torchrun --nproc-per-node {bundle.settings.layout.world_size} export/run.py ...`"
        )
    return rank


class _OneRank:
    """The engine of one rank as a `Session`."""

    def __init__(
        self, provider: str, file: Path, weights: Mapping[str, Tensor], device: torch.device, world: int
    ) -> None:
        self._session = EngineSession(provider, file, device.index, world)
        self._session.bind(weights)

    def run(self, shared: Tensors, ranked: Sequence[Tensors]) -> list[dict[str, Tensor]]:
        given = {**shared, **ranked[0]}
        return [self._session.run({name: given[name] for name in self._session.inputs})]


def _engine_sessions(bundle: Bundle, provider: str, rank: int, device: torch.device) -> dict[str, Session]:
    settings, world = bundle.settings, bundle.settings.layout.world_size
    weights = {name: tensor.to(device) for name, tensor in bundle.load_weights(rank)}  # one copy for all graphs
    return {
        graph: _OneRank(provider, bundle.path / settings.file(graph, rank, "engine"), weights, device, world)
        for graph in settings.graphs
    }
