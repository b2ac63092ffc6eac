"""The sparse form of the experts computes what every expert for every token would, whatever the router decides."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from export.build import BuildConfig, _settings
from export.bundle.building import check_request
from export.bundle.format import Settings
from export.engine.engine import Limits
from export.engine.onnx_session import OnnxSession
from export.graph.experts import Choice, capacity, experts_of_a_round, is_less_work, sparse
from export.graph.model import Weights
from export.quantization.calibration import SimulatedWeights
from export.quantization.qdq import quantize_graph
from export.quantization.schemes import is_quantized, quantize_weight
from nemo_diffgemma.config import ModelConfig
from nemo_diffgemma.repository import CONF
from nemo_diffgemma.schema import ModelGroup, ParallelGroup
from tests.export import layer
from tests.export.quantized import inlined

NAMES = "gate_up", "down"


# -- any routing -------------------------------------------------------------------------------------------------------


class Case:
    """Random experts and a random choice: each token takes the K best of `logits`, some of which are equal in a row."""

    def __init__(self, rows: int, columns: int, experts: int, top_k: int, alike: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.rows, self.columns, self.top_k = rows, columns, top_k
        self.weights = {"gate_up": normal(experts, 6, 4), "down": normal(experts, 4, 3)}
        self.x = normal(rows, columns, 4)
        logits = torch.where(torch.rand(rows, columns, 1, generator=generator) < alike, normal(rows, 1, experts),
                             normal(rows, columns, experts))  # fmt: skip
        self.chosen = logits.flatten(0, 1).topk(top_k).indices
        mask = torch.zeros(rows * columns, experts).scatter(1, self.chosen, 1.0)
        self.shares = mask * normal(rows * columns, experts).round(decimals=1)  # some are zero, many negative

    def expected(self, shares: Tensor) -> Tensor:
        gate, up = torch.einsum("th,enh->ten", self.x.flatten(0, 1), self.weights["gate_up"]).chunk(2, -1)
        hidden = F.gelu(gate, approximate="tanh") * up * shares[..., None]
        return torch.einsum("tew,ehw->th", hidden, self.weights["down"])

    def found(self, choice: Choice, most: int | None, weights: dict[str, Tensor] | None = None) -> Tensor:
        return sparse(Weights(weights or self.weights), NAMES, self.x, choice, most)


cases = st.builds(
    Case,
    rows=st.integers(1, 4),
    columns=st.integers(1, 12),
    experts=st.integers(3, 17),
    top_k=st.integers(1, 3),
    alike=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 1000),
)


@settings(max_examples=60, deadline=None)
@given(case=cases, most=st.integers(0, 12))
def test_every_routing_gives_the_sum_of_the_chosen_experts(case: Case, most: int) -> None:
    """Also capacities that nobody asks for: 1 of 12 columns, or all of them."""
    choice = Choice.of(case.shares, case.chosen)
    found = case.found(choice, min(most, case.columns) or None)
    torch.testing.assert_close(found, case.expected(case.shares), rtol=1e-4, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(case=cases, parts=st.integers(1, 4))
def test_parts_of_the_experts_add_up_to_the_whole(case: Case, parts: int) -> None:
    """Expert parallelism: other ranks' experts are masked, and slots are counted from a rank's own first expert."""
    experts = case.shares.shape[1] // parts * parts
    if experts < max(case.top_k, 1):
        return
    chosen = case.chosen % experts  # a token may then have an expert twice, which no router does
    chosen = (chosen[:, :1] + torch.arange(case.top_k)) % experts
    shares = torch.zeros(len(chosen), experts).scatter(1, chosen, torch.linspace(-1, 1, case.top_k).expand_as(chosen))
    total = torch.zeros(len(chosen), 4)
    for part in range(parts):
        choice = Choice.of(shares, chosen).of_part(torch.tensor(part), parts)
        own = slice(part * experts // parts, (part + 1) * experts // parts)
        total += case.found(choice, min(2, case.columns), {name: w[own] for name, w in case.weights.items()})
    full = F.pad(shares, (0, case.shares.shape[1] - experts))
    torch.testing.assert_close(total, case.expected(full), rtol=1e-4, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(case=cases, padding=st.integers(0, 12))
def test_padding_takes_no_room_and_gets_nothing(case: Case, padding: int) -> None:
    """All padding routes alike: it would fill the experts that it chooses."""
    real = (torch.arange(case.columns) >= padding).repeat(case.rows)
    choice = Choice.of(case.shares, case.chosen).among(real)
    assert choice.mask_TE.sum() == real.sum() * case.top_k
    found = case.found(choice, min(3, case.columns))
    torch.testing.assert_close(found, case.expected(case.shares) * real[:, None], rtol=1e-4, atol=1e-4)


def test_a_token_that_no_expert_can_bear_spoils_no_other() -> None:
    """Those that did not choose an expert still go through it, in its empty places and in the loop."""
    case = Case(1, 6, 8, 1, 1.0, seed=1)  # all choose one expert
    case.x[0, 2] = float("inf")
    found = case.found(Choice.of(case.shares, case.chosen), 2)
    assert found[[0, 1, 3, 4, 5]].isfinite().all() and not found[2].isfinite().all()


def test_sizes_of_the_released_model() -> None:
    assert capacity(256, 8, 128) == 48 and capacity(1, 8, 128) == 1
    assert [experts_of_a_round(n) for n in (128, 16, 12, 10, 9, 7, 11, 1)] == [8, 8, 6, 5, 3, 7, 1, 1]
    assert is_less_work(8, 128, 128) and is_less_work(8, 128, 16) and not is_less_work(2, 8, 8)


# -- ONNX Runtime ------------------------------------------------------------------------------------------------------


def _run(model, tensors: dict[str, Tensor], inputs: dict[str, Tensor]) -> Tensor:
    return OnnxSession([model], [tensors]).run(inputs, [{}])[0]["mixed"]


@pytest.fixture(scope="module")
def session():
    return OnnxSession([layer.graph()], [layer.weights()])


@pytest.mark.parametrize("rows", layer.ROWS)
@pytest.mark.parametrize("routing", layer.ROUTINGS)
def test_onnx_runtime_computes_what_pytorch_does(session, routing: str, rows: int) -> None:
    given = layer.inputs(routing, rows)
    found = session.run(given, [{}])[0]["mixed"]
    torch.testing.assert_close(found.double(), layer.expected(layer.weights(), given), rtol=1e-5, atol=1e-5)


def test_the_routings_are_what_they_are_called() -> None:
    """Without rounds, with one and with two, or the tests above say little."""
    most = capacity(layer.CONFIG.canvas_length, layer.CONFIG.top_k_experts, layer.CONFIG.num_experts)
    overloaded = {
        routing: int((layer.loads(layer.weights(), layer.inputs(routing, 5)["x"]) > most).sum())
        for routing in layer.ROUTINGS
    }
    single = int((layer.loads(layer.weights(), layer.inputs("uniform", 1)["x"]) > most).sum())
    assert single == 0 and overloaded["skewed"] == 2 and overloaded["fill"] >= 2 and overloaded["halves"] > 8


@pytest.mark.parametrize("scheme", [None, "fp8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_precision_of_onnx_runtime_is_that_of_the_traced_functions(
    dtype: torch.dtype, scheme: str | None
) -> None:
    if dtype == torch.float32 and scheme is None:
        pytest.skip("above")
    tensors = {name: tensor.to(dtype) for name, tensor in layer.weights().items()}
    model, weights, kept = layer.graph("sparse", dtype, scheme and "inputs"), Weights(tensors), tensors
    if scheme is not None:
        kept = {name: tensor for name, tensor in tensors.items() if not is_quantized(name)}
        packed = {
            key: tensor
            for name in filter(is_quantized, tensors)
            for key, tensor in quantize_weight(name, tensors[name], scheme, 8.0).items()
        }
        model = inlined(quantize_graph(model, scheme), packed)
        weights = SimulatedWeights({**kept, **packed}, scheme)
    session = OnnxSession([model], [kept])
    # of the norm. A float16 whose last bit (2^-10) differs is rounded to another FP8 number, an eighth away, in one of
    # 64 cases: sqrt(1/64) / 8 in front of each of two products. In float32, where none differs, FP8 is held to 1e-6.
    tolerance = 1e-6 if dtype == torch.float32 else 1e-3 if scheme != "fp8" else 2.2e-2
    for routing in layer.ROUTINGS:
        for rows in layer.ROWS:
            given = layer.inputs(routing, rows, dtype)
            found = session.run(given, [{}])[0]["mixed"]
            expected = layer.Layer("sparse", dtype).given(weights, given)
            error = (found.double() - expected.double()).norm() / expected.double().norm()
            assert error < tolerance, (routing, rows)


# -- which form a model gets -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "parallel", "quantization", "weights", "form"),
    [
        ("diffusiongemma_26b_a4b", ParallelGroup(), None, "inputs", "sparse"),
        ("diffusiongemma_26b_a4b", ParallelGroup(tensor=8, expert=8), None, "inline", "sparse"),
        ("diffusiongemma_26b_a4b", ParallelGroup(), "int4", "inputs", "sparse"),
        ("diffusiongemma_26b_a4b", ParallelGroup(), "int4", "inline", "dense"),  # once in an engine, and fused
        # 88 columns: no block
        ("diffusiongemma_26b_a4b", ParallelGroup(tensor=8, expert_tensor=8), "int4", "inputs", "dense"),
        ("diffusiongemma_26b_a4b", ParallelGroup(tensor=8, expert_tensor=8), "fp8", "inputs", "sparse"),
        ("diffusiongemma_26b_a4b", ParallelGroup(tensor=8, expert=8), "nvfp4", "inputs", "sparse"),
        ("sudoku", ParallelGroup(), None, "inputs", "dense"),  # one round is all its experts
    ],
)
def test_the_form_of_the_experts_suits_the_model(model, parallel, quantization, weights, form):
    architecture = yaml.safe_load((CONF / "model" / f"{model}.yaml").read_text())["architecture"]
    group = ModelGroup(architecture=architecture)
    config = BuildConfig(model=group, out="out", parallel=parallel, quantization=quantization, weights=weights)
    chosen = _settings(config, ModelConfig(**architecture))
    assert chosen.experts == form
    assert ("loop" in chosen.graphs) == (model == "sudoku")
    assert _settings(replace(config, experts="dense"), ModelConfig(**architecture)).experts == "dense"
    check_request(ModelConfig(**architecture), chosen, config.builder, (), ())


def test_a_chunk_beyond_the_top_k_of_tensorrt_is_refused():
    model = ModelConfig()
    settings = Settings(experts="sparse", limits=Limits(batch=1, context=65536, chunk=20_481))
    with pytest.raises(
        ValueError, match="room for 3841 tokens of a row, .* use max_chunk=20480 or less, or exp.*dense"
    ):
        check_request(model, settings, "tensorrt_rtx", (), ())
    check_request(model, settings, "onnx", (), ())
    check_request(model, replace(settings, experts="dense"), "tensorrt_rtx", (), ())
