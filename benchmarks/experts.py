"""The expert layer of the exported graphs in ONNX Runtime: what was chosen against every expert for every token.

    python benchmarks/experts.py                      # 128 experts top-8, 256 tokens, one thread

One layer with its router, as `export.graph.model.Model.mixture` is traced, in float32 on the CPU; hidden 512, width
176; milliseconds are the least of interleaved runs. "random": every token routes by itself. "fill": 156 of the 256
tokens are nearly alike, as on a canvas that is mostly fill, and choose the same experts. The two forms must agree to
1e-5 of the largest number.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from export.engine.onnx_session import OnnxSession
from export.graph.experts import FORMS
from export.graph.model import Model, Weights
from export.graph.tracing import to_onnx
from export.graph.weights import EXPERTS, Weight, engine_weights
from nemo_diffgemma import ModelConfig, ParallelLayout

LAYER = "model.decoder.layers.0."
COLUMNS, FILL = 256, 156  # tokens of a canvas, and those that are alike


class Layer(nn.Module):
    """The experts of one layer and their router."""

    def __init__(self, config: ModelConfig, form: str) -> None:
        super().__init__()
        self._model = Model(config, ParallelLayout(), torch.float32, form)

    def forward(self, weights: dict[str, Tensor], inputs: dict[str, Tensor]) -> Tensor:
        x = inputs["x"]
        return self._model.mixture(Weights(weights), LAYER, x, x, torch.tensor(0), None)


def needed(config: ModelConfig, form: str) -> dict[str, Weight]:
    """The weights of the layer."""
    weights = engine_weights(config, ParallelLayout(), form)
    return {name: weight for name, weight in weights.items() if name.startswith((LAYER + "router", LAYER + "experts"))}


def session(config: ModelConfig, form: str, stored: dict[str, Tensor]) -> OnnxSession:
    """The layer in ONNX Runtime."""
    weights = needed(config, form)
    example = {"x": torch.zeros(2, COLUMNS, config.hidden_size)}
    model = to_onnx(Layer(config, form), weights, torch.float32, example, {"x": {0: "batch"}}, ["mixed"])
    return OnnxSession([model], [{name: weight.of_rank(stored[name], 0) for name, weight in weights.items()}])


def random_weights(config: ModelConfig) -> dict[str, Tensor]:
    """Tensors as they lie in a checkpoint."""
    generator = torch.Generator().manual_seed(0)
    stored = {}
    for name, weight in needed(config, "sparse").items():
        if name.endswith((*EXPERTS, "proj.weight")):
            stored[name] = torch.randn(weight.stored, generator=generator) * weight.stored[-1] ** -0.5
        else:
            stored[name] = torch.ones(weight.stored)
    return stored


def tokens(config: ModelConfig, rows: int, routing: str) -> Tensor:
    """[B, 256, H]."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, COLUMNS, config.hidden_size, generator=generator)
    if routing == "fill":
        x[:, :FILL] = x[:1, :1] + 0.01 * x[:, :FILL]
    return x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--runs", type=int, default=12)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = ModelConfig(
        vocab_size=64,
        hidden_size=512,
        intermediate_size=512,
        num_hidden_layers=2,
        layer_types=("sliding_attention", "full_attention"),
        num_experts=128,
        top_k_experts=8,
        moe_intermediate_size=176,
        canvas_length=COLUMNS,
    )
    stored = random_weights(config)
    sessions = {form: session(config, form, stored) for form in FORMS}
    print(f"{options.rows} rows of {COLUMNS} tokens, float32, {options.threads} threads, least of {options.runs} runs")
    print("| routing | dense, ms | sparse, ms | ratio | difference |\n|---|---|---|---|---|")
    for routing in ("random", "fill"):
        given = {"x": tokens(config, options.rows, routing)}
        times: dict[str, list[float]] = {form: [] for form in FORMS}
        mixed = {}
        for _ in range(options.runs + 1):
            for form, engine in sessions.items():
                start = time.perf_counter()
                mixed[form] = engine.run(given, [{}])[0]["mixed"]
                times[form].append(time.perf_counter() - start)
        least = {form: min(measured[1:]) * 1e3 for form, measured in times.items()}
        gap = float((mixed["sparse"] - mixed["dense"]).abs().max() / mixed["dense"].abs().max())
        ratio = least["dense"] / least["sparse"]
        print(f"| {routing} | {least['dense']:.0f} | {least['sparse']:.0f} | {ratio:.1f} | {gap:.1e} |")
        if not gap < 1e-5:
            raise SystemExit(f"{routing}: the forms differ by {gap}")


if __name__ == "__main__":
    main()
