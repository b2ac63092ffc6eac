"""A run is a function of (seed, data, configuration): not of the layout, and not of how often it was interrupted."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from nemo_diffgemma.checkpoint.tensor_files import CheckpointError
from tests.training import cases

LAYOUTS = [{}, {"tensor": 2}, {"expert": 2}, {"tensor": 2, "expert": 2}, {"tensor": 2, "expert_tensor": 2}]


def _name(layout: object) -> str:
    return (
        ",".join(f"{axis}{size}" for axis, size in layout.items()) or "dp2" if isinstance(layout, dict) else str(layout)
    )


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[float, float]]:
    return cases.losses(str(tmp_path_factory.mktemp("single")), steps=6)


@pytest.mark.parametrize(
    ("layout", "distributed"),
    [
        pytest.param(
            layout,
            distributed,
            id=f"{_name(layout)}-{'distributed' if distributed else 'replicated'}",
            marks=[] if distributed or layout in ({}, {"tensor": 2, "expert": 2}) else [pytest.mark.slow],
        )
        for layout in LAYOUTS
        for distributed in (True, False)
    ],
)
def test_resume_is_exact_and_losses_are_those_of_one_process(pool, one_process, tmp_path, layout, distributed):
    settings = {"layout": layout, "optim__distributed": distributed}
    straight = pool(2).run("tests.training.cases:run", directory=str(tmp_path / "a"), steps=6, **settings)[0]
    resumed = pool(2).run("tests.training.cases:interrupted_and_resumed", directory=str(tmp_path / "b"), **settings)[0]
    assert [line["step"] for line in resumed] == [1, 2, 3, 4, 5, 6]
    for name in ("loss", "grad_norm", "lr"):
        assert [line[name] for line in resumed] == [line[name] for line in straight]
    for line, (loss, grad_norm) in zip(straight, one_process, strict=True):
        assert line["loss"] == pytest.approx(loss, abs=1e-5)
        assert line["grad_norm"] == pytest.approx(grad_norm, abs=5e-5)


@pytest.mark.parametrize(
    ("layout", "distributed"),
    [
        pytest.param({"tensor": 2, "expert": 2}, True, id="tensor2,expert2-distributed"),
        pytest.param({}, False, id="dp2-replicated"),
        pytest.param({"tensor": 2, "expert": 2}, False, id="tensor2,expert2-replicated", marks=pytest.mark.slow),
        pytest.param({}, True, id="dp2-distributed", marks=pytest.mark.slow),
    ],
)
def test_bfloat16_resumes_from_its_float32_weights(pool, tmp_path, layout, distributed):
    settings = {"layout": layout, "optim__distributed": distributed, "model__dtype": "bfloat16"}
    straight = pool(2).run("tests.training.cases:losses", directory=str(tmp_path / "a"), steps=6, **settings)[0]
    resumed = pool(2).run("tests.training.cases:interrupted_and_resumed", directory=str(tmp_path / "b"), **settings)[0]
    assert [(line["loss"], line["grad_norm"]) for line in resumed] == straight


@pytest.mark.parametrize(
    "before, after",
    [
        ({"layout": {"tensor": 2, "expert": 2}}, {"layout": {}}),
        ({"layout": {"expert": 2}, "optim__distributed": True}, {"layout": {"tensor": 2}, "optim__distributed": False}),
        ({"layout": {}, "optim__distributed": False}, {"layout": {"tensor": 2, "expert_tensor": 2}}),
    ],
    ids=["tp2ep2-to-dp2", "ep2-to-tp2-replicated", "dp2-replicated-to-tp2etp2"],
)
def test_a_run_goes_on_in_another_layout(pool, one_process, tmp_path, before, after):
    """Optimizer state included: with fresh moments the losses after step 3 would differ in the second digit."""
    lines = pool(2).run("tests.training.cases:resumed_elsewhere", directory=str(tmp_path), before=before, after=after)[
        0
    ]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in lines] == pytest.approx([loss for loss, _ in one_process], abs=2e-5)


def test_micro_batches_add_up_to_the_batch(one_process, tmp_path):
    split = cases.losses(str(tmp_path), steps=6, data__micro_batch_size=2)
    for (loss, norm), (expected, expected_norm) in zip(split, one_process, strict=True):
        assert loss == pytest.approx(expected, abs=1e-5)
        assert norm == pytest.approx(expected_norm, abs=5e-5)


def test_token_mean_weighs_tokens_over_all_replicas(pool, tmp_path):
    settings = {"steps": 2, "model__objective__reduction": "token"}
    alone = cases.losses(str(tmp_path / "a"), **settings)
    two = pool(2).run("tests.training.cases:losses", directory=str(tmp_path / "b"), **settings)[0]
    assert [loss for loss, _ in two] == pytest.approx([loss for loss, _ in alone], abs=1e-5)


def test_recomputation_changes_nothing(one_process, tmp_path):
    full = cases.losses(str(tmp_path), steps=2, model__recompute="full")
    assert [loss for loss, _ in full] == pytest.approx([loss for loss, _ in one_process[:1]] + [full[1][0]], abs=1e-5)


def test_the_seed_chooses_weights_and_data(one_process, tmp_path):
    other = cases.losses(str(tmp_path), steps=1, seed=1)
    assert abs(other[0][0] - one_process[0][0]) > 1e-3


def test_a_half_written_checkpoint_is_not_resumed(tmp_path):
    cases.run(str(tmp_path), steps=4, every=2)
    (tmp_path / "checkpoints" / "step-4" / ".metadata").unlink()
    (tmp_path / "checkpoints" / ".step-5.x.partial").mkdir()
    from nemo_diffgemma.training.run_directory import last_checkpoint

    found = last_checkpoint(tmp_path)
    assert found is not None and found.name == "step-2"


def test_what_a_killed_save_left_is_removed(tmp_path):
    left = tmp_path / "checkpoints" / ".step-5.x.partial"
    left.mkdir(parents=True)
    cases.run(str(tmp_path), steps=1)
    assert not left.exists()


def test_a_run_directory_that_cannot_be_made_is_told_on_every_rank(pool, tmp_path):
    (tmp_path / "file").write_text("")
    messages = pool(2).run("tests.training.cases:message", directory=str(tmp_path / "file" / "run"))
    assert all("name another exp_manager.exp_dir" in message for message in messages), messages
    assert messages[0].startswith("ConfigurationError")


def test_gradients_that_are_no_numbers_end_the_run_before_its_metrics_tell_them(tmp_path, monkeypatch):
    from nemo_diffgemma.training import optimizer

    update = optimizer.update
    monkeypatch.setattr(optimizer, "update", lambda megatron: update(megatron) * math.inf)
    said = cases.message(str(tmp_path), steps=1)
    assert said.startswith("TrainingError: the gradient norm of step 1 is inf")
    assert not (tmp_path / "metrics.jsonl").exists() and not list((tmp_path / "checkpoints").iterdir())


def test_without_clipping_there_is_a_gradient_norm_too(one_process, tmp_path):
    free = cases.losses(str(tmp_path), steps=1, optim__clip_grad=0.0)
    assert free[0] == pytest.approx(one_process[0], abs=1e-5)


def test_validation_loss_is_that_of_one_process_whatever_the_micro_batch(pool):
    alone = cases.validation_losses(0)
    assert len(alone) == 1
    parts = pool(2).run("tests.training.cases:validation_losses", micro_batch_size=4)[0]  # 4 rows, then 2
    assert len(parts) == 2
    assert (4 * parts[0] + 2 * parts[1]) / 6 == pytest.approx(alone[0], abs=1e-5)


def test_a_finished_run_started_again_changes_nothing(tmp_path):
    first = cases.run(str(tmp_path), steps=2)
    assert cases.run(str(tmp_path), steps=2) == first


def test_validation_has_its_own_file(tmp_path):
    cases.run(str(tmp_path), steps=2, trainer__validate_every=1, trainer__validation_examples=4)
    lines = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(math.isfinite(loss) for line in lines for loss in line["canvas_loss"].values())
    assert all(0.0 <= line["solve_rate"] <= 1.0 for line in lines)


def test_a_checkpoint_takes_text_prompts(tmp_path):
    from transformers import AutoTokenizer

    from nemo_diffgemma.data import encode_puzzle

    cases.run(str(tmp_path), steps=1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "checkpoints" / "step-1" / "assets")
    assert tokenizer("1..4 ..3. 2... ...1").input_ids == encode_puzzle([1, 0, 0, 4, 0, 0, 3, 0, 2, 0, 0, 0, 0, 0, 0, 1])


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"data__global_batch_size": 7}, "data.global_batch_size=7"),
        ({"data__micro_batch_size": 3}, "data.micro_batch_size=3"),
        ({"data__kind": "chess"}, "data.kind='chess'"),
        ({"model__dtype": "float8"}, "model.dtype='float8'"),
        ({"model__checkpoint": "/nowhere"}, "/nowhere does not exist"),
        ({"model__architecture": {"hidden": 3}}, "model.architecture"),
        ({"optim__decay": "step"}, "optim.decay='step'"),
        ({"layout": {"tensor": 2, "expert": 3}}, "6 processes"),
        ({"layout": {"expert_tensor": 2, "tensor": 1}, "model__architecture": {**cases.ARCHITECTURE, "vocab_size": 32}},
         "vocab_size=32"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value.split("=")[0].split("/")[0],
)  # fmt: skip
def test_bad_input_is_told_on_every_rank(pool, tmp_path, settings, said):
    messages = pool(2).run("tests.training.cases:message", directory=str(tmp_path), **settings)
    assert all(said in message and "\n" not in message for message in messages), messages


def test_an_earlier_run_is_not_overwritten(tmp_path):
    cases.run(str(tmp_path), steps=1)
    assert "exp_manager.version" in cases.message(str(tmp_path), steps=1, exp_manager__resume=False)
    assert len(Path(tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_directory_in_which_a_run_works_is_refused_on_every_rank_and_left_alone(pool, tmp_path):
    messages = pool(2).run("tests.training.cases:message_while_another_works", directory=str(tmp_path))
    assert all(f"works in {tmp_path}" in message and "OtherRankFailure" not in message for message in messages)
    assert messages[0].startswith("ConfigurationError") and messages[1].startswith("OtherRankError")
    assert not (tmp_path / "status.json").exists() and not (tmp_path / "config.yaml").exists()
    assert pool(2).run("tests.training.cases:message", directory=str(tmp_path), steps=1) == ["no error"] * 2


def test_a_resumed_run_is_the_same_run(pool, tmp_path):
    run = {"directory": str(tmp_path), "every": 2}
    assert pool(2).run("tests.training.cases:message", steps=2, **run) == ["no error"] * 2
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    for changed in ({"seed": 1}, {"data__global_batch_size": 16}, {"model__checkpoint": "/elsewhere"}):
        messages = pool(2).run("tests.training.cases:message", steps=4, **run, **changed)
        assert all(f"the run in {tmp_path} was started with" in message for message in messages), messages
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()} == before
    assert pool(2).run("tests.training.cases:message", steps=4, optim__lr=1e-3, **run) == ["no error"] * 2
    (line,) = map(json.loads, (tmp_path / "changes.jsonl").read_text().splitlines())
    assert line["step"] == 3
    assert line["changed"] == {"optim.lr": [1e-2, 1e-3], "trainer.max_steps": [2, 4]}
    assert "max_steps: 2\n" in (tmp_path / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("error", "elsewhere"),
    [
        (OSError(28, "No space left on device"), "OtherRankFailure: rank 0 stopped: OSError: [Errno 28]"),
        (KeyError("shape"), "OtherRankFailure: rank 0 stopped: KeyError: 'shape'"),
        (CheckpointError("no such tensor"), "OtherRankError: rank 0 stopped: no such tensor"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_an_error_of_rank_0_keeps_its_kind(pool, tmp_path, error, elsewhere):
    job = "tests.training.cases:message_when_rank_0_cannot_write"
    messages = pool(2).run(job, directory=str(tmp_path), error=error)
    assert messages[0] == f"{type(error).__name__}: {error}"
    assert messages[1].startswith(elsewhere)


@pytest.mark.parametrize("layout", [{}, {"tensor": 2, "expert": 2}], ids=_name)
def test_what_is_not_finite_is_named_on_every_rank(pool, tmp_path, layout):
    job = "tests.training.cases:messages_of_what_is_not_finite"
    ranks = pool(2).run(job, directory=str(tmp_path), layout=layout)
    assert ranks[0] == ranks[1]
    weight, output, gradient = ranks[0]
    assert weight.startswith("TrainingError: the loss of step 1 is nan; what is not finite first is the weight ")
    assert "layers.1.mlp.down_proj" in weight
    assert "is the output of layers.0.mlp;" in output
    assert gradient.startswith("TrainingError: the gradient norm of step 1 is ")
    assert "is the gradient of layers.0.mlp.down_proj" in gradient
