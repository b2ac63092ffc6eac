"""A set of unequal sequences in one pass gives each what it has alone: logits, samples, tokens, losses, gradients."""

from __future__ import annotations

import pytest
import torch

from nemo_diffgemma import SamplerConfig
from nemo_diffgemma.model.cache import Cache
from tests.distributed import cases
from tests.parity import generations, mixed, objectives
from tests.parity.objectives import Step, assert_same_step

ALL, EACH = [[0, 1, 2, 3, 4]], [[0], [1], [2], [3], [4]]
CALM = dict(damp=0.1, sublayers=0.2)
WEIGHTS = objectives.WEIGHTS["base"]


NAMES = ("logits", "context", "argmax", "canvas", "entropy", "soft")


def assert_same_results(ours, theirs, names=NAMES, in_another_order: bool = False) -> None:
    """`in_another_order`: sums over ranks, whose rounding is that of the largest number (states 2.8, logits 3.2)."""
    for mine, alone in zip(ours, theirs, strict=True):
        for name in names:
            is_scaled = in_another_order and alone[name].is_floating_point() and alone[name].numel() > 0
            largest = max(1.0, float(alone[name].abs().max())) if is_scaled else 1.0
            torch.testing.assert_close(mine[name], alone[name], atol=mixed.TOLERANCE * largest, rtol=0)


@pytest.fixture(scope="module")
def alone(single, checkpoint):
    """Results and gradients of each member in passes of its own, in one process."""
    path = checkpoint("base", **WEIGHTS)
    return cases.mixed_passes(path, {}, "base", EACH), Step(*cases.mixed_gradients(path, {}, "base", EACH))


@pytest.mark.parametrize("together", [ALL, [[3, 1], [4, 0, 2]]], ids=["all", "two passes, another order"])
def test_logits_states_and_samples(checkpoint, alone, together):
    results = cases.mixed_passes(checkpoint("base", **WEIGHTS), {}, "base", together)
    assert_same_results(results, alone[0], (*NAMES, "keys_values"))


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_gradients_through_new_and_cached_context(checkpoint, alone, recompute):
    step = Step(*cases.mixed_gradients(checkpoint("base", **WEIGHTS), {}, "base", ALL, recompute))
    assert_same_step(step, alone[1], mixed.TOLERANCE)


def test_in_a_layout(pool, checkpoint, alone):
    """TP2 x EP2, where each rank has the keys of its heads, and the stream is padded to a multiple of 2."""
    arguments = dict(path=checkpoint("base", **WEIGHTS), layout=dict(tensor=2, expert=2), size="base", together=ALL)
    for results in pool(2).run("tests.distributed.cases:mixed_passes", **arguments):
        assert_same_results(results, alone[0], in_another_order=True)
    gradients = pool(2).run("tests.distributed.cases:mixed_gradients", **arguments)
    assert_same_step(Step(*gradients[0]), alone[1], mixed.TOLERANCE)


def rows() -> objectives.Rows:
    """Prompts of one token to three windows, with one to four canvases."""
    prompts, canvases = [1, 5, 8, 13, 24], [4, 1, 2, 3, 1]
    lengths = [prompt + 4 * count for prompt, count in zip(prompts, canvases, strict=True)]
    tokens = torch.randint(64, (sum(lengths),), generator=torch.Generator().manual_seed(2))
    answers = [((prompt, length),) for prompt, length in zip(prompts, lengths, strict=True)]
    return objectives.Rows(tokens, answers, lengths, [7, 3, 11, 2, 5], fill_id=1)


def turns() -> objectives.Rows:
    """Rows of one to four answers, some next to each other or at the end of the row, some shorter than a canvas."""
    answers = [[(1, 3), (3, 12), (20, 21)], [(5, 9)], [(2, 12), (14, 17), (19, 28), (30, 31)], [(13, 14)], [(24, 33)]]
    lengths = [21, 11, 33, 17, 33]
    tokens = torch.randint(64, (sum(lengths),), generator=torch.Generator().manual_seed(4))
    return objectives.Rows(tokens, answers, lengths, [7, 3, 11, 2, 5], fill_id=1)


@pytest.mark.parametrize(
    ("weight", "made"),
    [(0.7, rows), (0.0, rows), (0.7, turns), (0.0, turns)],
    ids=["with the encoder's loss", "without", "turns with the encoder's loss", "turns without"],
)
def test_the_objective(pool, single, checkpoint, weight, made):
    """Of unequal rows at once, in one process and in TP2 x EP2, against one row at a time."""
    arguments = dict(
        path=checkpoint("base", **WEIGHTS),
        rows=made(),
        objective=dict(canvases_per_example=0, autoregressive_weight=weight),
    )
    each = Step(*cases.gradients(layout={}, **arguments, micro_batches=5))
    assert_same_step(Step(*cases.gradients(layout={}, **arguments)), each, mixed.TOLERANCE)
    ranks = pool(2).run("tests.distributed.cases:gradients", layout=dict(tensor=2, expert=2), **arguments)
    assert_same_step(Step(*ranks[0]), each, mixed.TOLERANCE)


def asked(lengths: list[int], chosen: list[int]) -> dict:
    """Arguments of `cases.generated` for some of the prompts, left padded to the longest of them."""
    prompts = [torch.randint(64, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]
    longest = max(lengths[index] for index in chosen)
    pad = [longest - lengths[index] for index in chosen]
    rows = zip(chosen, pad, strict=True)
    ids = torch.stack([torch.nn.functional.pad(prompts[index], (columns, 0)) for index, columns in rows])
    mask = (torch.arange(longest) >= torch.tensor(pad)[:, None]).long()
    sampler = generations.settings("stable_1") | dict(eos_token_id=None)
    return dict(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=12,
        sampler=sampler,
        seed=[11 * index + 5 for index in chosen],
    )


def test_generations(pool, single, checkpoint):
    """Of prompts of one token to three windows, in one process and in TP2 x EP2; positions are those of the columns."""
    lengths, path = [1, 5, 8, 13, 24], checkpoint("base", **CALM)
    model = cases.load(path, {})
    together = cases.generated(model, **asked(lengths, [0, 1, 2, 3, 4]))
    for index, length in enumerate(lengths):
        sequences, forwards, _ = cases.generated(model, **asked(lengths, [index]))
        # alone it has no padding: rotary positions are relative, so the same tokens at other positions
        assert torch.equal(sequences[0, length:], together[0][index, 24:])
        assert forwards[0] == together[1][index]
    arguments = dict(path=path, layout=dict(tensor=2, expert=2), asked=[asked(lengths, [0, 1, 2, 3, 4])])
    for ((sequences, forwards, _),) in pool(2).run("tests.distributed.cases:generate", **arguments):
        assert torch.equal(sequences, together[0]) and torch.equal(forwards, together[1])


def test_sequences_come_and_go(single, checkpoint):
    """As in a server: two are dropped, one is added and joins the pass that denoises the others, one pauses."""
    model, members = cases.load(checkpoint("base", **WEIGHTS), {}), mixed.members()
    with torch.no_grad():
        cache = mixed.encoded(model, members).trimmed(model.model_config)
        cache = cache.select([4, 2, 1]).add([0])
        assert cache.sequences == ((5, 22), (3, 12), (0, 5), (0, 0))
        chosen = [members[4], members[2], members[3]]  # members[1] has no part in this pass
        order = [0, 1, 3]
        places = [(order[place], start) for place, member in enumerate(chosen) for start in member.starts]
        lengths = [len(members[4].new), len(members[2].new), 0, len(members[3].new)]
        tokens = torch.cat([*(member.new for member in chosen), *(member.canvases.flatten() for member in chosen)])
        soft = torch.cat([member.soft for member in chosen])
        result = model.run(tokens, model.stream(cache.sequences, lengths, places), cache=cache, soft=soft)
        hidden = result.canvas_hidden.view(soft.shape).split([len(member.starts) for member in chosen])
        for part, member in zip(hidden, chosen, strict=True):
            (own,) = mixed.pass_of(model, [member], mixed.encoded(model, [member]).trimmed(model.model_config))
            assert part.sub(own.canvas_hidden).abs().max() < mixed.TOLERANCE
        for before, after in zip(cache.layers, result.cache.layers, strict=True):
            assert all(map(torch.equal, before.of(2), after.of(2)))  # the pausing one is as it was
        for layer, kept in zip(model.layers, result.cache.trimmed(model.model_config).layers, strict=True):
            window = layer.self_attn.window
            assert all(window is None or span.length <= window - 1 for span in kept.kept)


def test_a_cache_may_be_continued_more_than_once(single, checkpoint):
    """Nothing is written into it: a prompt is encoded once and answered twice."""
    model, members = cases.load(checkpoint("base", **WEIGHTS), {}), mixed.members()
    chosen, other = [members[2]], [mixed.dataclasses.replace(members[2], new=members[2].new.flip(0))]
    with torch.no_grad():
        cache = mixed.encoded(model, chosen)
        kept = [layer.keys.clone() for layer in cache.layers]
        before = mixed.pass_of(model, chosen, cache)[0]
        mixed.pass_of(model, other, cache)
        assert all(torch.equal(a, layer.keys) for a, layer in zip(kept, cache.layers, strict=True))
        assert torch.equal(mixed.pass_of(model, chosen, cache)[0].canvas_hidden, before.canvas_hidden)


def test_a_new_cache_holds_positions_only():
    assert Cache.empty([3, 0]).sequences == ((3, 3), (0, 0)) and Cache.empty([3]).layers == ()


def test_every_row_may_be_padded(single, checkpoint):
    """Columns that are padding in all rows move the positions, which are relative: the tokens are the same."""
    model = cases.load(checkpoint("base", **CALM), {})
    ids = torch.randint(64, (2, 7), generator=torch.Generator().manual_seed(3))
    padded, mask = torch.nn.functional.pad(ids, (2, 0)), torch.nn.functional.pad(torch.ones_like(ids), (2, 0))
    settings = SamplerConfig(**generations.settings("eos_none"))
    plain = model.generate(ids, max_new_tokens=8, sampler=settings)
    assert torch.equal(model.generate(padded, mask, 8, settings).sequences[:, 9:], plain.sequences[:, 7:])


def test_the_last_sequence_can_leave_a_cache(single, checkpoint):
    model = cases.load(checkpoint("odd_vocab"), {})
    cache = model.encode(torch.arange(12).view(2, 6)).select([])
    assert cache.sequences == () and all(len(layer.keys) == 0 for layer in cache.trimmed(model.model_config).layers)


def test_tables_that_inference_has_made_serve_a_pass_with_gradient(single, checkpoint):
    model = cases.load(checkpoint("odd_vocab"), {})
    tokens, lengths = torch.arange(17), [5, 12]
    with torch.inference_mode():
        model.encode_clean(tokens, lengths)
    model.encode_clean(tokens, lengths).context_hidden.sum().backward()
