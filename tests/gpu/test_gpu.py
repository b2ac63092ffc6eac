"""On GPUs, over nccl, the same claims as on the CPU: the questions, cases and tolerances are those of `tests/parity`.

float32 products are done in float32 (torch's default; TF32 would cost three digits). With one GPU the one-process
claims run; layouts run where there are as many GPUs as they have ranks.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.layouts import LAYOUTS, SIZE_AND_LAYOUT
from tests.parity import generations, objectives, questions
from tests.parity.generations import GENERATIONS, assert_same_tokens
from tests.parity.objectives import OBJECTIVES, Step, assert_same_step
from tests.reference import SIZES

WORLDS = {"single": (1, {}), **LAYOUTS}
SIZE_AND_WORLD = [*((size, "single") for size in SIZES), *SIZE_AND_LAYOUT]


def asked_of(size: str, theirs) -> list[questions.Question]:
    return [
        questions.question(theirs, kind, context)
        for kind in questions.KINDS
        for context in questions.contexts(size)
        if context > 1
    ]


@pytest.mark.parametrize(("size", "layout"), SIZE_AND_WORLD)
def test_logits(gpu_pool, reference, checkpoint, size, layout):
    world, axes = WORLDS[layout]
    weights = dict(sublayers=questions.SUBLAYERS[size])
    theirs = reference(size, **weights)
    asked = asked_of(size, theirs)
    ranks = gpu_pool(world).run(
        "tests.distributed.cases:logits",
        path=checkpoint(size, **weights),
        layout=axes,
        questions=[question.asked() for question in asked],
    )
    for question, *answers in zip(asked, *ranks, strict=True):
        truth = questions.answer(theirs, question)
        assert max(answer.sub(truth).abs().max() for answer in answers) < questions.TOLERANCE


@pytest.mark.parametrize(("size", "layout"), SIZE_AND_WORLD)
def test_bfloat16_is_no_less_exact_than_transformers(gpu_pool, reference, checkpoint, size, layout):
    """Distance to float32 of either, root mean square over all questions: ours at most 1.5 times theirs."""
    from transformers.models.diffusion_gemma import DiffusionGemmaForBlockDiffusion

    world, axes = WORLDS[layout]
    weights = dict(sublayers=questions.SUBLAYERS[size])
    path, exact = checkpoint(size, **weights), reference(size, **weights)
    theirs = DiffusionGemmaForBlockDiffusion.from_pretrained(path, dtype=torch.bfloat16).eval()
    theirs.set_experts_implementation("eager")
    asked = asked_of(size, exact)
    ranks = gpu_pool(world).run(
        "tests.distributed.cases:logits",
        path=path,
        layout=axes,
        questions=[question.asked() for question in asked],
        dtype="bfloat16",
    )
    truth = torch.stack([questions.answer(exact, question) for question in asked])
    their_error = torch.stack([questions.answer(theirs, question) for question in asked]).sub(truth).square().mean()
    for answers in ranks:
        assert torch.stack(answers).sub(truth).square().mean().sqrt() < 1.5 * their_error.sqrt()


@pytest.mark.parametrize(
    ("name", "layout"),
    [*((name, "single") for name in GENERATIONS), *(("stable_1", layout) for layout in LAYOUTS)],
)
def test_tokens(gpu_pool, reference, checkpoint, name, layout):
    world, axes = WORLDS[layout]
    size, weights = GENERATIONS[name][0], dict(damp=generations.DAMP, sublayers=generations.SUBLAYERS)
    theirs = reference(size, **weights)
    ranks = gpu_pool(world).run(
        "tests.distributed.cases:generate",
        path=checkpoint(size, **weights),
        layout=axes,
        asked=[generations.asked(theirs, name)],
    )
    for (ours,) in ranks:
        assert_same_tokens(ours, generations.tokens(theirs, name))


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("layout", WORLDS)
def test_loss_and_gradients(gpu_pool, reference, checkpoint, layout, name, recompute):
    """Against transformers on the CPU; one process is among the layouts."""
    world, axes = WORLDS[layout]
    weights = objectives.WEIGHTS["base"]
    ranks = gpu_pool(world).run(
        "tests.distributed.cases:gradients",
        path=checkpoint("base", **weights),
        layout=axes,
        **objectives.asked("base", name),
        recompute=recompute,
    )
    truth = objectives.by_transformers(reference("base", **weights), "base", name)
    assert_same_step(Step(*ranks[0]), truth, 5e-6)


@pytest.mark.parametrize("layout", ["single", "tp2_ep2", "tp2_etp2_ep2"])
def test_what_was_read_is_written_back(gpu_pool, checkpoint, tmp_path, layout):
    world, axes = WORLDS[layout]
    source, target = checkpoint("base"), tmp_path / "written"
    gpu_pool(world).run("tests.distributed.cases:round_trip", path=source, layout=axes, target=target)
    before, after = (
        {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for path in (source, target)
    )
    assert set(before) == set(after) and all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((target / "config.json").read_text()) == json.loads((source / "config.json").read_text())


def test_initial_weights_are_those_of_the_cpu(single, gpu_pool, checkpoint):
    """Bit for bit: they are drawn on the CPU, whatever computes with them."""
    from tests.distributed import cases

    ours = cases.initial_weights(checkpoint("base"), {}, seed=3)
    theirs = gpu_pool(1).run("tests.distributed.cases:initial_weights", path=checkpoint("base"), layout={}, seed=3)[0]
    assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
