"""What a step logs is what happened, in every layout; FLOPs are those of a count by hand."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from nemo_diffgemma.config import GLOBAL
from nemo_diffgemma.gpus import gpu_of_device
from nemo_diffgemma.training import flops
from nemo_diffgemma.training.step_result import balance
from tests.dry_run.figures import CASES, EXPECTED
from tests.training import cases, weight_cases

LAYOUTS = [{}, {"tensor": 2}, {"expert": 2}, {"tensor": 2, "expert": 2}]
FIRST = ["step", "loss", "grad_norm"]
COUNTED = ("loss_by_level", "accuracy_by_level", "canvas_accuracy", "expert_load", "unused_experts")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return cases.run(str(tmp_path_factory.mktemp("alone")), steps=2)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_line_is_the_same_in_every_layout(pool, alone, tmp_path, layout):
    lines = pool(2).run("tests.training.cases:run", directory=str(tmp_path), steps=2, layout=layout)[0]
    for line, expected in zip(lines, alone, strict=True):
        assert list(line)[:3] == FIRST
        for name in COUNTED:
            assert line[name] == pytest.approx(expected[name], rel=1e-5), name
        assert line["model_tflops"] * line["seconds"] * 2 == pytest.approx(
            expected["model_tflops"] * expected["seconds"], rel=1e-9
        )
        assert "mfu" not in line  # of a CPU


def test_levels_accuracy_and_loads_are_those_of_the_passes(single, alone):
    """Of the first step, from the same batch: dense logits and what every router chose, on its own."""
    found = weight_cases.first_step()
    line = alone[0]
    assert line["loss_by_level"] == pytest.approx(found["loss_by_level"], rel=1e-4)
    assert line["accuracy_by_level"] == pytest.approx(found["accuracy_by_level"])
    assert line["canvas_accuracy"] == pytest.approx(found["canvas_accuracy"])
    assert (line["expert_load"], line["unused_experts"]) == pytest.approx(balance(found["loads"]))


def test_loggers_get_one_number_a_name(single, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines = cases.run(str(tmp_path), steps=2, exp_manager__tensorboard=True, trainer__validate_every=1,
                      trainer__validation_examples=4)  # fmt: skip
    (folder,) = {file.parent for file in tmp_path.rglob("events.out*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    for name in ("loss", "expert_load", *(f"loss_by_level/{level}" for level in lines[0]["loss_by_level"])):
        first = events.Scalars(name)[0]
        value = lines[0]
        for part in name.split("/"):
            value = value[part]
        assert (first.step, first.value) == (1, pytest.approx(value, rel=1e-6))
    validation = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in validation] == [1, 2]
    assert events.Scalars("validation/bits_per_token")[1].value == pytest.approx(validation[1]["bits_per_token"])


# -- FLOPs -------------------------------------------------------------------------------------------------------------


def test_flops_are_counted_by_hand(single):
    """Weights by their own shapes, pairs one by one."""
    from nemo_diffgemma.training.nemo_model import build_network

    network = build_network(cases.config().model, seed=0)
    model, contexts, canvases, next_tokens = network.model_config, [34, 20], [18, 2, 9], 31
    length, window, queries = model.canvas_length, model.sliding_window, model.num_attention_heads

    def of(layer: torch.nn.Module) -> int:
        """Weights that a token is multiplied with."""
        part = model.top_k_experts / model.num_experts
        return sum(
            int(parameter.numel() * (part if ".experts." in name else 1))
            for name, parameter in layer.named_parameters()
            if parameter.ndim > 1
        )

    met = sum(map(of, network.layers))
    forward_context = forward_canvases = 0.0
    positions = length * len(canvases)
    for index, layer in enumerate(network.layers):
        whole = model.layer_kind(index) == GLOBAL
        width = model.global_head_dim if whole else model.head_dim
        pairs = sum(1 for tokens in contexts for q in range(tokens) for k in range(q + 1) if whole or q - k < window)
        seen = sum(
            sum(1 for k in range(start) if whole or start - k < window) + length
            for start in canvases
            for _ in range(length)
        )
        forward_context += 2 * of(layer) * sum(contexts) + 4 * queries * width * pairs
        forward_canvases += 2 * of(layer) * positions + 4 * queries * width * seen
    head = 2 * 64 * model.hidden_size
    signal = 2 * sum(p.numel() for p in network.self_conditioning.parameters() if p.ndim > 1) * positions
    expected = 3 * (forward_context + forward_canvases) + 3 * head * (positions + next_tokens)
    assert flops.of_pass(model, contexts, canvases, next_tokens, 0.0) == pytest.approx(expected, rel=1e-12)
    shown = forward_canvases + head * positions + 2 * head * positions + 3 * signal
    assert flops.of_pass(model, contexts, canvases, next_tokens, 0.5) == pytest.approx(expected + shown / 2, rel=1e-12)
    assert flops.trained_share(network) == 1.0
    products = 2 * met * (sum(contexts) + positions) + head * (positions + next_tokens)
    frozen = flops.of_pass(model, contexts, canvases, next_tokens, 0.0, weight_gradients=0.0)
    assert expected - frozen == pytest.approx(products, rel=1e-12)


def test_a_dry_run_multiplies_more_than_is_useful_but_not_much_more():
    """Of the released network: recomputation, masked pairs and logits that are made again are not useful."""
    name = "train, one GPU, full recompute"
    case, figures = CASES["h100"][name], yaml.safe_load(EXPECTED.read_text())["h100"][name]
    played = sum(phase["tflop"] for phase in figures["phases"].values())
    recomputed = figures["phases"]["encode"]["tflop"] + figures["phases"]["canvas"]["tflop"] / 2
    useful = flops.of_pass(case.config, [1024], [512], 1023, self_conditioning=1.0) / 1e12
    assert 0.93 < useful / (played - recomputed) < 1.0


def test_balance_is_that_of_the_worst_layer():
    assert balance([[4, 4, 4, 4], [8, 8, 0, 0], [1, 2, 3, 2]]) == (2.0, 2)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100 SXM 80 GB"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200", "NVIDIA H200"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA GeForce RTX 5090", "RTX 5090"),
        ("NVIDIA GB10", "DGX Spark"),
        ("NVIDIA A100-SXM4-80GB", None),
    ],
)
def test_a_device_is_found_by_the_name_that_torch_has_for_it(name, file):
    gpu = gpu_of_device(name)
    assert (gpu is None) == (file is None)
    if gpu is not None:
        assert file in gpu.name


def test_accuracy_is_where_the_label_has_the_largest_logit(single):
    from tests.model import cases as vocabulary
    from tests.model.cases import problem

    asked = problem(3, 40, 61, 24, 3.0)
    table, shard = vocabulary.cut(asked["table_VH"], 1)
    labels = (asked["hidden_NH"] @ asked["table_VH"].T).argmax(1)
    labels[::3] = 0
    from nemo_diffgemma.model.loss import linear_cross_entropy_gradient

    parameter = torch.nn.Parameter(table)
    found = linear_cross_entropy_gradient(asked["hidden_NH"], parameter, labels, torch.ones(40), shard, 30.0)
    expected = (asked["hidden_NH"] @ asked["table_VH"].T).argmax(1) == labels
    assert torch.equal(found.correct_N, expected) and 0 < expected.sum() < 40
