"""Steps of fixed shapes, in buffers of more columns than there is context, are the steps of the stream."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_diffgemma.diffusion.generate import Settled, StepInputs
from nemo_diffgemma.model import fixed_step
from nemo_diffgemma.model.cache import Cache
from nemo_diffgemma.model.fixed_step import KEPT, FixedSteps, bucket, geometry
from nemo_diffgemma.non_finite import NonFiniteError
from nemo_diffgemma.parallel import groups
from tests.distributed import cases
from tests.parity import generations
from tests.parity.fixed import fixed

CALM = dict(damp=generations.DAMP, sublayers=generations.SUBLAYERS)
TOLERANCE = dict(atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def model(single, checkpoint):
    loaded = cases.load(checkpoint("base"), {})
    fewest = fixed_step.FEWEST
    yield loaded
    fixed_step.FEWEST = fewest


def contexts(model, lengths: list[int], first: list[int], seed: int = 0) -> Cache:
    """The cache of random contexts of these lengths, whose first tokens have the positions `first`."""
    generator = torch.Generator().manual_seed(seed)
    start = model.start(first)
    tokens = torch.randint(model.model_config.vocab_size, (sum(lengths),), generator=generator)
    with torch.no_grad():
        return model.run(tokens, model.stream(start.sequences, lengths)).cache.trimmed(model.model_config)


def inputs(model, rows: int, seed: int, temperature: list[float] | None = None) -> StepInputs:
    """A random step; the first of a canvas has no signal."""
    generator, config = torch.Generator().manual_seed(seed), model.model_config
    shape = (rows, config.canvas_length)
    return StepInputs(
        canvas=torch.randint(config.vocab_size, shape, generator=generator),
        uniforms=torch.rand(shape, generator=generator),
        replacements=torch.randint(config.vocab_size, shape, generator=generator),
        temperature=torch.tensor(temperature, dtype=torch.float64) if temperature else 0.4 + 0.1 * (seed % 4),
        entropy_bound=5.0,
        soft=torch.randn(*shape, config.hidden_size, generator=generator) if seed % 3 else None,
    )


def assert_same(ours: Settled, theirs: Settled) -> None:
    for name in ("argmax", "canvas", "accepted"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    for name in ("entropy", "soft"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), **TOLERANCE)


@settings(max_examples=40)
@given(
    rows=st.lists(st.tuples(st.integers(1, 40), st.sampled_from([0, 3])), min_size=1, max_size=4),
    equal=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_a_step_is_that_of_the_stream(model, rows, equal, seed):
    """For contexts below, at and above window and bucket, of equal rows or not: computed, recorded and replayed."""
    lengths, first = [length for length, _ in rows], [position for _, position in rows]
    lengths = lengths[:1] * len(lengths) if equal else lengths
    cache = contexts(model, lengths, first, seed)
    before = [x.clone() for layer in cache.layers for x in (layer.keys, layer.values)]
    recorder = fixed(model)
    kept = []
    for step in range(4):
        given_ = inputs(model, len(rows), seed + step)
        kept.append((model.canvas_step(given_, cache), model.sampling_step(given_, cache)))
    for ours, theirs in kept:  # a later step leaves the results of earlier ones alone
        assert_same(ours, theirs)
        assert ours.cache is cache
    assert (recorder.recorded, recorder.replayed) == (1, 3)
    after = [x for layer in cache.layers for x in (layer.keys, layer.values)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_rows_may_be_at_different_temperatures(model):
    cache = contexts(model, [5, 9], [0, 0])
    fixed(model)
    both = inputs(model, 2, 1, temperature=[0.5, 0.8])
    together = [model.canvas_step(both, cache), model.sampling_step(both, cache)]
    for row, temperature in enumerate((0.5, 0.8)):
        fields = {name: getattr(both, name)[row : row + 1] for name in ("canvas", "uniforms", "replacements", "soft")}
        alone = model.sampling_step(
            StepInputs(**fields, temperature=temperature, entropy_bound=5.0), cache.select([row])
        )
        for step in together:
            assert_same(Settled(*(x[row : row + 1] for x in step[:5]), cache), alone)


def test_a_growing_context_is_recorded_once_a_bucket(model):
    """32 canvases of 4 behind a prompt of 5: 8, 16, 32, 64, 128 columns and 256 in all, of which KEPT are kept."""
    recorder, config = fixed(model), model.model_config
    cache, seen = contexts(model, [5, 5], [0, 0]), []
    for canvas in range(32):
        for step in range(3):
            given_ = inputs(model, 2, 3 * canvas + step)
            assert_same(model.canvas_step(given_, cache), model.sampling_step(given_, cache))
        seen.append(geometry(cache, config, config.canvas_length))
        ids = list(torch.randint(config.vocab_size, (2, 4), generator=torch.Generator().manual_seed(canvas)))
        joint = StepInputs(given_.canvas, given_.uniforms, given_.canvas, 1.0, 0.1, context=ids)
        cache = model.sampling_step(joint, cache).cache
    # sliding layers: with a mask until all of the window is filled, without one from then on
    assert recorder.recorded == len(dict.fromkeys(seen)) == 6
    assert recorder.replayed == 32 * 3 - 6
    assert len(model.fixed_steps._steps) == KEPT


@pytest.mark.parametrize(("columns", "expected"), [(0, 256), (1, 256), (256, 256), (257, 512), (5000, 8192)])
def test_buckets_are_powers_of_two(monkeypatch, columns, expected):
    monkeypatch.setattr(fixed_step, "FEWEST", 256)
    assert bucket(columns) == expected


def test_weights_that_have_moved_are_recorded_anew(single, checkpoint):
    """A recording reads them where they lay; those changed in place are read as they are."""
    model = cases.load(checkpoint("base"), {})
    cache = contexts(model, [5], [0])
    recorder = fixed(model)

    def steps() -> None:
        for seed in range(3):
            given_ = inputs(model, 1, seed)
            assert_same(model.canvas_step(given_, cache), model.sampling_step(given_, cache))

    steps()
    model.norm.weight.data.mul_(1.1)
    steps()
    assert recorder.recorded == 1
    model.float()
    steps()
    assert recorder.recorded == 2
    model.train()
    assert not model.fixed_steps._steps


def test_recordings_end_before_the_groups_in_which_they_communicate(model, monkeypatch):
    """NCCL would wait for them for ever, at the end of every command that generates on several GPUs."""
    cache, held = contexts(model, [5], [0]), []
    fixed(model)
    for seed in range(2):
        model.canvas_step(inputs(model, 1, seed), cache)
    assert model.fixed_steps._steps
    monkeypatch.setattr(groups, "_groups", list(groups._groups))
    monkeypatch.setattr(groups, "_layout", groups._layout)
    monkeypatch.setattr(groups.parallel_state, "destroy_model_parallel", lambda: held.append(len(recorded())))
    monkeypatch.setattr(groups.dist, "destroy_process_group", lambda *_: held.append(len(recorded())))

    def recorded() -> dict:
        return model.fixed_steps._steps

    groups.shutdown()
    assert held and not any(held)


def test_a_step_that_cannot_be_recorded_is_computed(model, caplog):
    cache = contexts(model, [5], [0])
    fixed(model)

    def out_of_memory(function):
        raise RuntimeError("out of memory")

    model.fixed_steps = FixedSteps(out_of_memory)
    for seed in range(4):
        assert_same(
            model.canvas_step(inputs(model, 1, seed), cache), model.sampling_step(inputs(model, 1, seed), cache)
        )
    assert [record.getMessage() for record in caplog.records] == [
        "no CUDA graph of a denoising step, steps are launched: out of memory"
    ]


@pytest.mark.parametrize("layout", [dict(tensor=2, expert=2), dict(expert=2)], ids=str)
def test_generation_in_a_layout(pool, reference, checkpoint, layout):
    """Rows of unequal lengths, three canvases of each: the same tokens as without fixed steps, replayed."""
    theirs, names = reference("base", **CALM), ("stable_1", "eos_many", "released")
    asked = [generations.asked(theirs, name) for name in names]
    arguments = dict(path=checkpoint("base", **CALM), layout=layout, asked=asked)
    for results in pool(2).run("tests.parity.fixed:generations", **arguments):
        for name, (plain, ours, replayed) in zip(names, results, strict=True):
            assert replayed > 0
            generations.assert_same_tokens(ours, generations.tokens(theirs, name))
            assert torch.equal(ours[1], plain[1])


def test_no_rank_records_what_another_cannot(pool, reference, checkpoint):
    theirs = reference("base", **CALM)
    asked = generations.asked(theirs, "stable_1")
    ranks = pool(2).run(
        "tests.parity.fixed:failing_on_one_rank", path=checkpoint("base", **CALM), layout=dict(expert=2), asked=asked
    )
    assert [recorded for _, _, recorded, _ in ranks] == [1, 0]
    for plain, ours, _, given_up in ranks:
        assert given_up
        assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))


def test_the_layer_that_overflows_is_named_though_no_module_runs_in_a_replay(single, checkpoint):
    model = cases.load(checkpoint("base"), {})
    fixed(model)
    model.layers[1].mlp.down_proj.weight.data.fill_(3e38)
    with pytest.raises(NonFiniteError, match="layers.1.mlp.down_proj is the first module"):
        model.generate(torch.arange(12).view(2, 6), max_new_tokens=8)
    assert model.fixed_steps is not None
