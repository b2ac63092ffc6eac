"""Lower bounds of latency: what is counted is what a pencil counts, and a GPU is what its file says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import yaml
from onnx import ModelProto, TensorProto, helper, numpy_helper

from export.graph.cost import Cost, RooflineError, count
from export.graph.experts import capacity
from export.graph.loop import to_loop
from export.graph.weights import engine_weights
from export.quantization.qdq import quantize_graph
from export.quantization.schemes import SCHEMES, is_quantized
from export.roofline import UnsupportedType, lower_bound, table
from nemo_diffgemma import ModelConfig, ParallelLayout
from nemo_diffgemma.gpus import Gpu, Links
from nemo_diffgemma.repository import CONF
from tests.export import kit, layer
from tests.export.quantized import CONFIG

SIZES = dict(batch=3, chunk=5, context_columns=16, window_columns=7, steps=6)


def tiny(collective: bool = False) -> ModelProto:
    """Rows of `table` [100, 8] at `ids` [batch, 2], times `weight` [8, 4], summed over ranks on request."""
    nodes = [helper.make_node("Gather", ["table", "ids"], ["x"]), helper.make_node("MatMul", ["x", "weight"], ["part"])]
    if collective:
        settings = dict(collective_operation="all_reduce", reduce_op="sum", root=-1)
        nodes.append(helper.make_node("DistCollective", ["part"], ["y"], domain="trt", **settings))  # type: ignore[arg-type]
    else:
        nodes.append(helper.make_node("Identity", ["part"], ["y"]))
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "tiny",
        [
            value("ids", TensorProto.INT64, ["batch", 2]),
            value("table", TensorProto.FLOAT16, [100, 8]),
            value("weight", TensorProto.FLOAT16, [8, 4]),
        ],
        [value("y", TensorProto.FLOAT16, ["batch", 2, 4])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22), helper.make_opsetid("trt", 1)])


def test_tiny_graph_by_hand() -> None:
    cost = count(tiny(), {"batch": 3})
    assert cost.flops_by_dtype == {"float16": 2 * (3 * 2) * 8 * 4}
    read = (3 * 2) * 8 + (3 * 2) * 8 * 2 + 8 * 4 * 2  # ids (int64), rows looked up (float16), weight
    written = (3 * 2) * 4 * 2
    assert cost.bytes == read + written
    assert cost.weight_bytes == (100 * 8 + 8 * 4) * 2
    assert cost.collective_bytes == 0


def test_a_table_is_read_at_most_once() -> None:
    cost = count(tiny(), {"batch": 1000})
    assert cost.bytes == 2000 * 8 + 100 * 8 * 2 + 8 * 4 * 2 + 2000 * 4 * 2


def test_collective_sends_its_operand() -> None:
    assert count(tiny(collective=True), {"batch": 3}).collective_bytes == (3 * 2) * 4 * 2


def test_constants_count_as_inputs_do() -> None:
    inlined = tiny()
    for name in ("table", "weight"):
        value = next(v for v in inlined.graph.input if v.name == name)
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        inlined.graph.initializer.append(numpy_helper.from_array(torch.zeros(shape, dtype=torch.float16).numpy(), name))
        inlined.graph.input.remove(value)
    assert count(inlined, {"batch": 3}) == count(tiny(), {"batch": 3})


def test_an_axis_without_size_is_refused() -> None:
    with pytest.raises(RooflineError, match="axis 'batch'.*sizes give rows"):
        count(tiny(), {"rows": 3})


def products_of_a_step(config: ModelConfig, rows: int, context: int, window: int, rows_of_an_expert: int) -> int:
    """Multiplications with addition of one denoising step, from the sizes of the model alone."""
    tokens, hidden = rows * config.canvas_length, config.hidden_size
    dense = 3 * tokens * hidden * config.intermediate_size
    total = dense  # self-conditioning
    for index in range(config.num_hidden_layers):
        is_global = config.layer_kind(index) == "full_attention"
        width, groups = config.heads(index)
        queries = config.num_attention_heads * width
        projected = 2 * queries + (1 if is_global else 2) * groups * width  # q and o, k, v
        keys = (context if is_global else window) + config.canvas_length
        total += tokens * hidden * projected + 2 * tokens * keys * queries
        total += dense + tokens * hidden * config.num_experts
        total += rows_of_an_expert * config.num_experts * 3 * config.moe_intermediate_size * hidden
    return total + 2 * tokens * hidden * config.vocab_size  # logits and soft embedding


def products_of_a_round(config: ModelConfig, rows: int) -> int:
    """Of eight experts over all tokens, in every layer."""
    tokens = rows * config.canvas_length
    return config.num_hidden_layers * 8 * tokens * 3 * config.moe_intermediate_size * config.hidden_size


@pytest.mark.parametrize(("rows", "context", "window"), [(1, 16, 7), (3, 40, 7), (2, 3, 3)])
def test_flops_of_a_step_are_those_of_the_formula(rows: int, context: int, window: int) -> None:
    sizes, config = dict(batch=rows, context_columns=context, window_columns=window), kit.config("short")
    room = rows * capacity(config.canvas_length, config.top_k_experts, config.num_experts)
    cost = count(kit.graph("step"), sizes)
    assert cost.flops_by_dtype == {"float32": 2 * products_of_a_step(config, rows, context, window, room)}
    assert cost.round_flops_by_dtype == {"float32": 2 * products_of_a_round(config, rows)}
    dense, tokens = count(kit.graph("step", experts="dense"), sizes), rows * config.canvas_length
    assert dense.flops_by_dtype == {"float32": 2 * products_of_a_step(config, rows, context, window, tokens)}
    assert not dense.round_flops_by_dtype and dense.bytes == pytest.approx(cost.bytes, abs=2000)


def test_flops_of_the_released_model_are_within_what_was_promised() -> None:
    """By the same formula: 13.5e12 where every expert computes every token."""
    config = ModelConfig(**yaml.safe_load((CONF / "model/diffusiongemma_26b_a4b.yaml").read_text())["architecture"])
    room = capacity(config.canvas_length, config.top_k_experts, config.num_experts)
    dense = 2 * products_of_a_step(config, 1, 1024, 1023, config.canvas_length)
    base = 2 * products_of_a_step(config, 1, 1024, 1023, room)
    assert base <= 4.5e12 and dense == pytest.approx(13.5e12, rel=0.01)
    assert 2 * products_of_a_round(config, 1) == pytest.approx(0.73e12, rel=0.01)


def test_a_round_reads_the_weights_of_its_experts() -> None:
    """Eight of sixteen, packed or not."""
    matrices = 3 * layer.CONFIG.moe_intermediate_size * layer.CONFIG.hidden_size
    for scheme, bytes_each in ((None, 4.0), ("int4", 0.5 + 4 / 64), ("fp8", 1.0), ("nvfp4", 0.5 + 1 / 16)):
        model = layer.graph(quantized=scheme and "inputs")
        if scheme is not None:
            model = quantize_graph(model, scheme, {name: 3.0 for name in layer.weights()})
        cost = count(model, {"batch": 2})
        assert cost.round_bytes == pytest.approx(8 * matrices * bytes_each, abs=100), scheme
        twice = cost.with_rounds(2)
        assert twice.bytes == cost.bytes + 2 * cost.round_bytes
        done = sum(twice.flops_by_dtype.values()) - sum(cost.flops_by_dtype.values())
        assert (
            done == 2 * sum(cost.round_flops_by_dtype.values()) == 2 * 2 * 8 * 2 * layer.CONFIG.canvas_length * matrices
        )


def test_bytes_of_a_step_are_inputs_and_outputs_once() -> None:
    config = kit.config("short")
    positions = 3 * config.canvas_length
    context = sum(
        2 * 3 * groups * width * (16 if config.layer_kind(layer) == "full_attention" else 7) * 4
        for layer, (width, groups) in ((i, config.heads(i)) for i in range(config.num_hidden_layers))
    )
    model = kit.graph("step")
    names = {value.name for value in model.graph.input}
    weights = engine_weights(config, ParallelLayout())
    held = sum(4 * torch.Size(weight.shape).numel() for name, weight in weights.items() if name in names)
    canvas = positions * (8 + 4 + 8) + positions * config.hidden_size * 4  # ids, uniforms, replacements, soft
    outputs = positions * (8 + config.hidden_size * 4 + 8 + 4 + 1) + 3 * 8
    settings = 3 * (4 + 4 + 8 + 8)  # temperature, bound, first, past_length
    constants = count(model, SIZES, weights).weight_bytes - held  # rotary frequencies and the like
    assert 0 <= constants < 2000
    assert count(model, SIZES).bytes == pytest.approx(held + context + canvas + outputs + settings, abs=constants)


@pytest.mark.parametrize("steps", [6, None])
def test_loop_is_its_steps_and_reads_weights_in_each(steps: int | None) -> None:
    step, loop = count(kit.graph("step"), SIZES), count(to_loop(kit.graph("step"), steps), SIZES)
    assert loop.flops_by_dtype == {dtype: 6 * flops for dtype, flops in step.flops_by_dtype.items()}
    assert loop.divided(6).round_flops_by_dtype == step.round_flops_by_dtype
    assert loop.divided(6).round_bytes == step.round_bytes
    carried = (
        2 * 3 * kit.config("short").canvas_length * (8 + 8 + 4 * kit.config("short").hidden_size)
    )  # stays on the chip
    assert 6 * (step.bytes - carried) < loop.bytes <= 6 * step.bytes
    assert loop.divided(6).flops_by_dtype == step.flops_by_dtype


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantised_experts_are_read_narrow_and_multiplied_in_their_type(scheme: str) -> None:
    bfloat16_step = kit.traced("step", CONFIG, ParallelLayout(), torch.bfloat16, quantized="inputs")
    names = [v.name for v in bfloat16_step.graph.input if is_quantized(v.name)]
    whole = count(bfloat16_step, SIZES)
    plain = count(kit.traced("step", CONFIG, ParallelLayout(), torch.bfloat16), SIZES)
    assert whole.flops_by_dtype == plain.flops_by_dtype  # loops of one turn count once
    cost = count(quantize_graph(bfloat16_step, scheme, dict.fromkeys(names, 3.0)), SIZES)
    experts = 3 * CONFIG.num_experts * CONFIG.moe_intermediate_size * CONFIG.hidden_size * CONFIG.num_hidden_layers
    if scheme == "int4":  # weights only: products stay bfloat16
        assert cost.flops_by_dtype == whole.flops_by_dtype
    else:
        room = capacity(CONFIG.canvas_length, CONFIG.top_k_experts, CONFIG.num_experts)
        multiplied = 2 * 3 * room * experts
        rest = whole.flops_by_dtype["bfloat16"] - multiplied
        assert cost.flops_by_dtype == {scheme: multiplied, "bfloat16": rest}
        assert cost.round_flops_by_dtype == {scheme: 2 * products_of_a_round(CONFIG, 3)}
    bytes_each = {"fp8": 1.0, "int4": 0.5 + 2 / 64, "nvfp4": 0.5 + 1 / 16}[scheme]  # with the scales of blocks
    assert whole.bytes - cost.bytes == pytest.approx((2 - bytes_each) * experts, abs=100)


def test_every_rank_sends_the_sums_of_its_layers() -> None:
    config = kit.config("odd_vocab")
    cost = count(kit.graph("step", "odd_vocab", ParallelLayout(tensor=2)), SIZES)
    hidden = 3 * config.canvas_length * config.hidden_size * 4
    # embedding, self-conditioning, soft embedding; attention and dense MLP of each layer; and the sampler's small sums
    sampler = cost.collective_bytes - (3 + 2 * config.num_hidden_layers) * hidden
    assert 0 < sampler < hidden


# -- GPUs --------------------------------------------------------------------------------------------------------------

GPU = Gpu(
    name="test",
    compute_capability="sm_90",
    memory_gb=1,
    bandwidth_gb_s=100,
    tflops=dict(float32=1.0, tf32=8.0, bfloat16=10.0, float16=10.0, fp8=20.0, nvfp4=None, int8=20.0),
    links=Links(nvlink_gb_s=50, pcie_generation=5),
    source="none",
)


def test_bound_is_the_slowest_of_compute_memory_and_links() -> None:
    cost = Cost({"bfloat16": 10e12, "fp8": 10e12}, 100e9, 10e9, 0)
    bound = lower_bound(cost, GPU)
    assert (bound.compute, bound.memory, bound.links) == pytest.approx((1.5, 1.0, 0.4))
    assert (bound.seconds, bound.limited_by) == (pytest.approx(1.5), "compute")
    assert lower_bound(replace(cost, bytes=200e9), GPU).limited_by == "memory"
    assert lower_bound(replace(cost, collective_bytes=100e9), GPU).limited_by == "links"
    without_nvlink = replace(GPU, links=Links(None, 5))
    assert lower_bound(cost, without_nvlink).links == pytest.approx(10 / 63)


def test_float32_is_bound_by_float32_not_by_tf32() -> None:
    assert lower_bound(Cost({"float32": 8e12}, 0, 0, 0), GPU).compute == pytest.approx(8.0)


def test_table_says_what_a_gpu_cannot_run() -> None:
    costs = {"step": Cost({"nvfp4": 1e12}, 1e9, 0, 2e9), "encode": Cost({"bfloat16": 1e12}, 1e9, 0, 0.5e9)}
    with pytest.raises(UnsupportedType, match="test has no nvfp4"):
        lower_bound(costs["step"], GPU)
    shown = table(costs, [GPU], tokens_per_step=8)
    assert shown.splitlines()[1].split() == ["test", "step", "-", "no", "nvfp4", "no", "-"]
    assert shown.splitlines()[2].split() == ["test", "encode", "100", "compute", "yes", "-"]
