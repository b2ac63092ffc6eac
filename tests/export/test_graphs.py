"""The exported graphs compute what the PyTorch model computes: in ONNX Runtime, one rank and several."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from export.bundle.comparison import Differences, in_lockstep, trajectory
from export.engine.tensorrt_session import geometry
from nemo_diffgemma import ParallelLayout, SamplerConfig
from nemo_diffgemma.diffusion.noise import KeyedNoise
from nemo_diffgemma.model import fixed_step
from tests.export import kit

WINDOW = 8
CONTEXTS = (1, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW + 2)  # the last in two calls of `encode`
AROUND = CONTEXTS[1], CONTEXTS[2], CONTEXTS[4]  # below, at, above the window
LAYOUTS = {
    "tp2_ep2": ("short", ParallelLayout(tensor=2, expert=2)),
    "ep2": ("short", ParallelLayout(expert=2)),
    "tp2": ("odd_vocab", ParallelLayout(tensor=2)),  # 61 ids: the last rank has a row less
    "tp4_ep2_etp2": ("one_global_kv", ParallelLayout(tensor=4, expert=2, expert_tensor=2)),  # shared key/value heads
}
# numbers of one step, given the same canvas and signal; reductions are ordered differently in the two
TOLERANCE = 2e-5

pytestmark = pytest.mark.usefixtures("single")


def prompts(rows: int, length: int, vocabulary: int = 64) -> torch.Tensor:
    return torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(length))


def sampler(steps: int, **settings) -> SamplerConfig:
    return SamplerConfig(max_denoising_steps=steps, entropy_bound=5.0, **settings)


def assert_lockstep(found) -> None:
    assert found.keys_values < TOLERANCE
    assert found.entropy < TOLERANCE
    assert found.soft < 1e-5
    assert found.argmax == [1.0] * len(found.argmax)
    assert found.canvas == [1.0] * len(found.canvas)


@pytest.fixture(scope="module")
def engines(checkpoint):
    """`engines(loop)` -> an engine of the calm base model with that loop, or without one."""
    made = {}

    def make(loop="none"):
        if loop not in made:
            made[loop] = kit.engine(kit.calm(checkpoint), loop=loop)
        return made[loop]

    return make


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("context", CONTEXTS)
def test_every_step_of_48_equals_pytorch(checkpoint, engines, context, rows):
    network = kit.network(kit.calm(checkpoint))
    assert_lockstep(in_lockstep(engines(), trajectory(network, prompts(rows, context), sampler(48), seed=rows)))


def test_48_steps_on_the_host_give_the_tokens_of_pytorch(checkpoint, engines):
    network = kit.network(kit.calm(checkpoint))
    given = dict(max_new_tokens=8, sampler=sampler(48), seed=2)
    for rows, context in itertools.product((1, 3), AROUND):
        ids = prompts(rows, context)
        ours, theirs = network.generate(ids, **given), engines().generate(ids, **given)
        assert torch.equal(ours.sequences, theirs.sequences)
        assert torch.equal(ours.forwards, theirs.forwards)


@pytest.mark.parametrize("name", ["tp2_ep2", pytest.param("ep2", marks=pytest.mark.slow), "tp2", "tp4_ep2_etp2"])
def test_the_sum_of_the_ranks_equals_pytorch(checkpoint, name):
    size, layout = LAYOUTS[name]
    path = kit.calm(checkpoint, size)
    engine, network = kit.engine(path, size, layout), kit.network(path)
    for context in CONTEXTS:
        ids = prompts(2, context, network.model_config.vocab_size)
        assert_lockstep(in_lockstep(engine, trajectory(network, ids, sampler(12), seed=context)))
        given = dict(max_new_tokens=12, sampler=sampler(12), seed=1)
        ours, theirs = network.generate(ids, **given), engine.generate(ids, **given)
        assert torch.equal(ours.sequences, theirs.sequences)


@pytest.mark.parametrize("steps", [8, 48])
@pytest.mark.parametrize("loop", ["fixed", None])
def test_the_loop_gives_the_tokens_and_numbers_of_pytorch(checkpoint, engines, loop, steps, monkeypatch):
    engine, network = engines(steps if loop == "fixed" else None), kit.network(kit.calm(checkpoint))
    settings = sampler(steps, confidence_threshold=0.0, eos_token_id=(1, 50))
    given = dict(max_new_tokens=8, sampler=settings, seed=3)
    canvases, session = [], engine._sessions["loop"]

    def run(*inputs, plain=session.run):
        canvases.append(plain(*inputs)[0])
        return canvases[-1:]

    monkeypatch.setattr(session, "run", run)
    for rows, context in itertools.product((1, 3), AROUND):
        ids = prompts(rows, context)
        ours, theirs = network.generate(ids, **given), engine.generate(ids, **given)
        assert torch.equal(ours.sequences, theirs.sequences)
        assert torch.equal(ours.forwards, theirs.forwards)
        exact, found = trajectory(network, ids, settings, seed=3).steps, canvases[0]
        canvases.clear()
        assert torch.equal(found["next_canvas"], exact[-1].canvas)
        assert (found["next_soft"] - exact[-1].soft).abs().max() < 1e-5
        assert (found["entropy"] - torch.stack([step.entropy for step in exact])).abs().max() < TOLERANCE
        assert torch.equal(found["accepted_count"], torch.stack([step.accepted.sum(-1) for step in exact]))


@pytest.mark.parametrize("padding", [(0, 3, 10), (2, 3, 10)], ids=["some rows", "every row"])
def test_left_padding_and_stopping_are_those_of_pytorch(checkpoint, engines, padding):
    ids = prompts(3, 11)
    mask = (torch.arange(11) >= torch.tensor(padding)[:, None]).long()
    sampler = SamplerConfig(
        max_denoising_steps=12, entropy_bound=5.0, confidence_threshold=1.0, eos_token_id=(1, 50), pad_token_id=0
    )
    given = dict(attention_mask=mask, max_new_tokens=12, sampler=sampler, seed=[5, 6, 7])
    ours = kit.network(kit.calm(checkpoint)).generate(ids, **given)
    theirs = engines().generate(ids, **given)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert torch.equal(ours.forwards, theirs.forwards)
    assert torch.equal(ours.tokens_per_forward, theirs.tokens_per_forward)


def test_what_lies_in_a_buffer_before_the_context_is_not_seen(checkpoint, engines):
    """Buffers may be longer than the context: engines of fixed sizes are fed with padded ones."""
    engine = engines()
    context = engine.encode(prompts(1, 5), engine.start((0,)))
    noise = KeyedNoise.for_rows(0, 1, 4, 64)
    inputs = {
        "canvas": noise.initial(0),
        "soft": engine.no_signal(1),
        "temperature": torch.tensor([0.8]),
        "entropy_bound": torch.tensor([0.1]),
        "uniforms": noise.uniforms(0, 48),
        "replacements": noise.replacements(0, 48),
    }
    plain = engine.step(context, inputs)
    longer = {name: torch.nn.functional.pad(past, (0, 0, 6, 0), value=1e3) for name, past in context.past[0].items()}
    padded = engine.step(replace(context, past=(longer,)), inputs)
    for name in plain:
        assert torch.allclose(plain[name].float(), padded[name].float(), atol=1e-6), name


def test_buffers_of_a_gpu_keep_their_shapes_until_they_have_doubled(checkpoint, monkeypatch):
    """So what a session has recorded of one canvas serves the next. Tokens are those of buffers that are full."""
    engine, ids = kit.engine(kit.calm(checkpoint), loop="none"), prompts(2, 5)
    given = dict(attention_mask=torch.tensor([[1] * 5, [0] + [1] * 4]), max_new_tokens=60, sampler=sampler(4), seed=1)
    plain = engine.generate(ids, **given)
    session, shapes = engine._sessions["step"], []

    def run(shared, ranked, real=session.run):
        shapes.append(geometry({**shared, **ranked[0]}))
        return real(shared, ranked)

    monkeypatch.setattr(session, "run", run)
    monkeypatch.setattr(fixed_step, "FEWEST", 8)
    engine.columns_for = fixed_step.bucket
    rounded = engine.generate(ids, **given)
    assert torch.equal(plain.sequences, rounded.sequences)
    assert torch.equal(plain.forwards, rounded.forwards)
    last = max(layer for layer in range(9) if f"past_key_values.{layer}.key" in dict(shapes[0]))
    columns = [dict(shape)[f"past_key_values.{last}.key"][2] for shape in dict.fromkeys(shapes)]
    assert columns == [8, 16, 32, 64]  # of 5 to 61 columns of context


def test_float16_agrees_with_float32(checkpoint):
    path = kit.calm(checkpoint)
    engine, network = kit.engine(path, dtype=torch.float16), kit.network(path)
    found = in_lockstep(engine, trajectory(network, prompts(3, 11), sampler(12), seed=0))
    assert sum(found.argmax) / len(found.argmax) > 0.95
    assert found.soft < 0.05


def test_what_is_no_number_is_infinitely_far_away():
    found = Differences()
    found.add("soft", torch.tensor([1.0, 2.0]), torch.tensor([1.5, 2.0]))
    assert found.soft == 0.5
    for wrong in (float("nan"), float("inf")):
        found = Differences(soft=0.5)
        found.add("soft", torch.tensor([1.0, 2.0]), torch.tensor([wrong, 2.0]))
        found.add("soft", torch.tensor([1.0]), torch.tensor([1.0]))
        assert found.soft == float("inf")


@pytest.mark.parametrize(
    ("ids", "given", "says"),
    [
        (
            torch.zeros(9, 4, dtype=torch.long),
            {},
            "9 rows, but the engines were built for batches of 1 to 8; .*max_batch_size=9",
        ),
        (torch.zeros(1, 65, dtype=torch.long), {}, "need a context of 65 columns, .* at most 64; .*max_context=65"),
        (torch.zeros(1, 60, dtype=torch.long), dict(max_new_tokens=12), "need a context of 68 columns"),
        (torch.full((1, 4), 64), {}, "input_ids holds 64; token ids go from 0 to 63"),
        (torch.zeros(1, 0, dtype=torch.long), {}, "expected \\[rows, tokens\\], at least one row of one token"),
        (torch.zeros(1, 4, dtype=torch.long), dict(max_new_tokens=0), "max_new_tokens=0; expected at least 1"),
    ],
)
def test_what_an_engine_was_not_built_for_is_refused(engines, ids, given, says):
    with pytest.raises(ValueError, match=says):
        engines().generate(ids, **{"max_new_tokens": 4, **given})


def test_a_residual_stream_beyond_float16_routes_like_float32():
    """The router reads the raw stream, which float16 products must not make infinite."""
    from nemo_diffgemma.model.routing import router_logits

    generator = torch.Generator().manual_seed(0)
    x = 1e6 * torch.randn(5, 32, generator=generator)
    weight, scale = torch.randn(8, 32, generator=generator), torch.rand(32, generator=generator)
    narrow = router_logits(x, weight.half(), scale.half(), 1e-6)
    assert torch.allclose(narrow.float(), router_logits(x, weight, scale, 1e-6), atol=0.02)


def test_ranks_without_a_row_of_the_vocabulary_have_zeros(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    from export.graph.weights import TABLE, engine_weights
    from nemo_diffgemma import ModelConfig
    from tests.reference import tiny_config

    config = ModelConfig.from_huggingface(tiny_config("base", vocab_size=9).to_dict())
    table = torch.randn(9, 32)
    save_file({TABLE: table}, tmp_path / "model.safetensors")
    weight = engine_weights(config, ParallelLayout(tensor=4))[TABLE]
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        parts = [weight.of_rank(file.get_slice(TABLE), rank) for rank in range(4)]
    assert torch.equal(torch.cat(parts)[:9], table)
    assert not torch.cat(parts)[9:].any()
