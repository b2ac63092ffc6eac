"""The traced functions in PyTorch, behind the interface that every engine has: what an engine of any dtype computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from export.engine.onnx_session import Tensors
from export.graph.model import Model, Weights
from export.graph.tracing import STEP_OUTPUTS, past_names, present_names


class TorchSession:
    """One graph of a bundle of one rank."""

    def __init__(self, graph: str, model: Model, weights: Weights) -> None:
        self._graph, self._model, self._weights = graph, model, weights

    @torch.no_grad()
    def run(self, shared: Tensors, ranked: Sequence[Tensors]) -> list[dict[str, Tensor]]:
        given = {**shared, **ranked[0]}
        layers = range(self._model.config.num_hidden_layers)
        past = [tuple(given.pop(name) for name in past_names(layer)) for layer in layers]
        if self._graph == "step":
            outputs = self._model.step(self._weights, past=past, **given)  # type: ignore[arg-type]
            return [dict(zip(STEP_OUTPUTS, outputs, strict=True))]
        fresh = self._model.encode(self._weights, past=past, **given)  # type: ignore[arg-type]
        return [
            {name: tensor for layer in layers for name, tensor in zip(present_names(layer), fresh[layer], strict=True)}
        ]
