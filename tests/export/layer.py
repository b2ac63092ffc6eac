"""The expert layer of a graph by itself: exported in a second, and given any routing.

The router reads `x` and the experts read `normed`, so `x` decides who computes what.
"""

from __future__ import annotations

import functools

import torch
from onnx import ModelProto
from torch import Tensor, nn
from torch.nn import functional as F

from export.graph.model import Model, Weights
from export.graph.tracing import to_onnx
from export.graph.weights import EXPERTS, engine_weights
from nemo_diffgemma.config import ModelConfig
from nemo_diffgemma.parallel.layout import ParallelLayout
from tests.reference import tiny_config

PREFIX = "model.decoder.layers.0."
ROUTINGS = ("uniform", "skewed", "fill", "halves")
ROWS = (1, 2, 5)

# capacity 6 of 16 columns, two rounds of 8 experts; contraction axes of one block of INT4
CONFIG = ModelConfig.from_huggingface(
    tiny_config(
        dict(
            hidden_size=64,
            moe_intermediate_size=64,
            num_experts=16,
            canvas_length=16,
            layer_types=("sliding_attention", "full_attention"),
        )
    ).to_dict()
)


class Layer(nn.Module):
    """`Model.mixture` of the first layer of one rank."""

    def __init__(self, form: str, dtype: torch.dtype, quantized: str | None = None) -> None:
        super().__init__()
        self._quantized = quantized
        self._model = Model(CONFIG, ParallelLayout(), dtype, form)

    def forward(self, weights: dict[str, Tensor], inputs: dict[str, Tensor]) -> Tensor:
        return self.given(Weights(weights, self._quantized), inputs)

    def given(self, weights: Weights, inputs: dict[str, Tensor]) -> Tensor:
        rank = torch.tensor(0)
        return self._model.mixture(weights, PREFIX, inputs["x"], inputs["normed"], rank, None)


@functools.cache
def graph(form: str = "sparse", dtype: torch.dtype = torch.float32, quantized: str | None = None) -> ModelProto:
    shape = (2, CONFIG.canvas_length, CONFIG.hidden_size)
    inputs = {name: torch.zeros(shape, dtype=dtype) for name in ("x", "normed")}
    needed = engine_weights(CONFIG, ParallelLayout(), form)
    return to_onnx(
        Layer(form, dtype, quantized),
        {name: weight for name, weight in needed.items() if name.startswith((PREFIX + "router", PREFIX + "experts"))},
        dtype,
        inputs,
        {name: {0: "batch"} for name in inputs},
        ["mixed"],
    )


@functools.cache
def weights() -> dict[str, Tensor]:
    """As the sparse form takes them. Scales of experts are positive, zero and negative."""
    generator = torch.Generator().manual_seed(0)
    experts, hidden, width = CONFIG.num_experts, CONFIG.hidden_size, CONFIG.moe_intermediate_size
    return {
        PREFIX + "router.proj.weight": torch.randn(experts, hidden, generator=generator),
        PREFIX + "router.scale": 1 + 0.3 * torch.randn(hidden, generator=generator),
        PREFIX + "router.per_expert_scale": torch.linspace(-0.5, 1.5, experts).roll(5),
        PREFIX + EXPERTS[0]: torch.randn(experts, 2 * width, hidden, generator=generator) * 0.15,
        PREFIX + EXPERTS[1]: torch.randn(experts, hidden, width, generator=generator) * 0.15,
    }


def inputs(routing: str, rows: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Tokens that choose at random, all alike, mostly alike, or alike in every half of a row."""
    generator = torch.Generator().manual_seed(rows)
    shape = (rows, CONFIG.canvas_length, CONFIG.hidden_size)
    x, normed = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    if routing == "skewed":
        x = x[:1, :1].expand(shape)
    elif routing == "fill":
        x[:, 5:] = x[:1, :1] + 0.01 * x[:, 5:]
    elif routing == "halves":
        x = x[:, ::8].repeat_interleave(8, 1)
    return {"x": x.to(dtype).contiguous(), "normed": normed.to(dtype)}


def loads(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    """Tokens that chose each expert in the fullest row, [E]."""
    from nemo_diffgemma.model.routing import route, router_logits

    logits = router_logits(x, tensors[PREFIX + "router.proj.weight"], tensors[PREFIX + "router.scale"], 1e-6)
    _, chosen = route(logits.flatten(0, 1), tensors[PREFIX + "router.per_expert_scale"], CONFIG.top_k_experts)
    return F.one_hot(chosen.view(x.shape[0], -1), CONFIG.num_experts).sum(1).amax(0)


def expected(tensors: dict[str, Tensor], given: dict[str, Tensor]) -> Tensor:
    """Token by token and expert by expert, float64."""
    from nemo_diffgemma.model.routing import route, router_logits

    x, normed = given["x"], given["normed"].double().flatten(0, 1)
    logits = router_logits(x, tensors[PREFIX + "router.proj.weight"], tensors[PREFIX + "router.scale"], 1e-6)
    shares, chosen = route(logits.flatten(0, 1), tensors[PREFIX + "router.per_expert_scale"], CONFIG.top_k_experts)
    out = torch.zeros_like(normed)
    for token, experts in enumerate(chosen.tolist()):
        for expert in experts:
            gate, up = (tensors[PREFIX + EXPERTS[0]][expert].double() @ normed[token]).chunk(2)
            hidden = F.gelu(gate, approximate="tanh") * up
            out[token] += shares[token, expert] * (tensors[PREFIX + EXPERTS[1]][expert].double() @ hidden)
    return out.view(x.shape)
