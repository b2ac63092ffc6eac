"""Every layout computes what one process computes: logits, tokens, loss and gradients.

The questions and answers are those of `tests/parity`; every rank must have the whole result.
"""

from __future__ import annotations

import pytest

from tests.distributed import cases
from tests.distributed.layouts import LAYOUTS, SIZE_AND_LAYOUT
from tests.parity import generations, objectives, questions
from tests.parity.generations import GENERATIONS, assert_same_tokens
from tests.parity.objectives import Step, assert_same_step

SLOW_LOGITS = [("deep", "tp2_ep4"), ("deep", "tp4")]  # the layouts with "base", "deep" in two others
SLOW_TOKENS = ["tp2", "tp4"]  # which two other sizes have


def _slow_if(slow: bool) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow] if slow else []


@pytest.mark.parametrize(
    ("size", "layout"),
    [pytest.param(*c, id="-".join(c), marks=_slow_if(c in SLOW_LOGITS)) for c in SIZE_AND_LAYOUT],
)
def test_logits(pool, reference, checkpoint, size, layout):
    """Contexts that no tensor-parallel size divides, at and around the window, padded, after finished canvases."""
    weights = dict(sublayers=questions.SUBLAYERS[size])
    theirs = reference(size, **weights)
    window = questions.contexts(size)[3]
    kinds = [("plain", 1), ("signal", 5), ("padded", 20), ("after_1_canvas", window - 1), ("after_1_canvas", window)]
    asked = [questions.question(theirs, kind, context) for kind, context in (*kinds, ("after_3_canvases", 5))]
    world, axes = LAYOUTS[layout]
    ranks = pool(world).run(
        "tests.distributed.cases:logits",
        path=checkpoint(size, **weights),
        layout=axes,
        questions=[question.asked() for question in asked],
    )
    for question, *answers in zip(asked, *ranks, strict=True):
        truth = questions.answer(theirs, question)
        assert max(answer.sub(truth).abs().max() for answer in answers) < questions.TOLERANCE


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *[pytest.param("stable_1", layout, marks=_slow_if(layout in SLOW_TOKENS)) for layout in LAYOUTS],
        ("pad_none", "dp2_ep2"),
        *[(name, layout) for name in ("one_global_kv", "odd_vocab") for layout in ("tp2", "tp4")],
    ],
)
def test_tokens(pool, reference, checkpoint, name, layout):
    weights = dict(damp=generations.DAMP, sublayers=generations.SUBLAYERS)
    size = GENERATIONS[name][0]
    theirs = reference(size, **weights)
    world, axes = LAYOUTS[layout]
    ranks = pool(world).run(
        "tests.distributed.cases:generate",
        path=checkpoint(size, **weights),
        layout=axes,
        asked=[generations.asked(theirs, name)],
    )
    for (ours,) in ranks:
        assert_same_tokens(ours, generations.tokens(theirs, name))


@pytest.fixture(scope="module")
def one_process(single, checkpoint):
    """`one_process(size, objective)` -> loss and gradients of one process."""
    found: dict[tuple[str, str], Step] = {}

    def get(size: str, name: str) -> Step:
        if (size, name) not in found:
            path = checkpoint(size, **objectives.WEIGHTS[size])
            found[size, name] = Step(*cases.gradients(path, {}, **objectives.asked(size, name)))
        return found[size, name]

    return get


GRADIENTS = [
    *[("base", layout, name, "none", 1) for layout in LAYOUTS for name in ("two_canvases", "all_canvases_by_token")],
    *[("base", layout, "no_coin", "none", 1) for layout in ("tp2_ep2", "dp2_ep2")],
    *[("one_global_kv", layout, "two_canvases", "none", 1) for layout in ("tp2", "tp4")],
    *[("odd_vocab", layout, "two_canvases", "none", 1) for layout in ("tp2_ep2", "tp4")],
    *[("base", "tp2_ep2", "two_canvases", recompute, 1) for recompute in ("selective", "full")],
    *[("one_global_kv", "tp4", "two_canvases", recompute, 1) for recompute in ("selective", "full")],
    *[("base", layout, "all_canvases_by_token", "none", 2) for layout in ("ep2", "tp2_ep2")],
    ("base", "tp2_ep2", "two_canvases", "full", 2),
]


@pytest.mark.parametrize(
    ("size", "layout", "name", "recompute", "micro_batches"),
    [pytest.param(*c, id=f"{c[0]}-{c[1]}-{c[2]}-recompute_{c[3]}-{c[4]}_micro_batch") for c in GRADIENTS],
)
def test_loss_and_gradients(pool, reference, checkpoint, one_process, size, layout, name, recompute, micro_batches):
    """Replicas hold different rows, whose coins differ: no rank may leave a pass out, or the experts wait for it."""
    world, axes = LAYOUTS[layout]
    path = checkpoint(size, **objectives.WEIGHTS[size])
    ranks = pool(world).run(
        "tests.distributed.cases:gradients",
        path=path,
        layout=axes,
        **objectives.asked(size, name),
        recompute=recompute,
        micro_batches=micro_batches,
    )
    step = Step(*ranks[0])
    assert all(loss == pytest.approx(step.loss, abs=1e-6) for loss, _ in ranks)
    assert_same_step(step, one_process(size, name), 2e-6)
    theirs = reference(size, **objectives.WEIGHTS[size])
    assert_same_step(step, objectives.by_transformers(theirs, size, name), 5e-6)


def test_a_trained_model_does_not_keep_its_process_groups(pool, checkpoint):
    """Each group has threads, which look for work as long as it lives."""
    path, asked = checkpoint("base", **objectives.WEIGHTS["base"]), objectives.asked("base", "two_canvases")
    counts = []
    for _ in range(3):  # the first time also starts threads that stay
        pool(2).run("tests.distributed.cases:gradients", path=path, layout=dict(tensor=2), **asked)
        counts.append(pool(2).run("tests.distributed.cases:threads", layout=dict(expert=2)))
    assert counts[0] == counts[1] == counts[2]


@pytest.fixture(scope="module")
def drawn(single, checkpoint):
    return cases.initial_weights(checkpoint("base"), {}, seed=3)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_initial_weights_are_the_same_in_every_layout(pool, checkpoint, drawn, layout):
    """Bit for bit, whoever holds which part."""
    world, axes = LAYOUTS[layout]
    whole = pool(world).run("tests.distributed.cases:initial_weights", path=checkpoint("base"), layout=axes, seed=3)[0]
    assert set(whole) == set(drawn)
    assert all((whole[name] == drawn[name]).all() for name in drawn)


def test_initial_weights_depend_on_seed_and_name(single, checkpoint, drawn):
    """Another seed gives others, and no two matrices, experts included, are drawn alike."""
    again, other = (cases.initial_weights(checkpoint("base"), {}, seed=seed) for seed in (3, 4))
    matrices = {name: tensor for name, tensor in drawn.items() if tensor.ndim > 1}
    assert all((again[name] == drawn[name]).all() for name in drawn)
    assert all((other[name] != matrices[name]).any() for name in matrices)
    drawings = [
        drawing for name, tensor in matrices.items() for drawing in (tensor if ".experts." in name else [tensor])
    ]
    assert len({tuple(drawing.flatten()[:8].tolist()) for drawing in drawings}) == len(drawings)
    for name, tensor in matrices.items():
        spread = tensor.std() / 0.02
        assert abs(spread - 1) < 5 / (2 * tensor.numel()) ** 0.5, name  # five standard errors
