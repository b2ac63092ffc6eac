"""The average of weights: by its definition, in every layout, over a resume bit for bit, evaluated and exported."""

from __future__ import annotations

import pytest
import torch

from nemo_diffgemma.training.average import decay_at
from tests.training import cases

LAYOUTS = [({}, True), ({}, False), ({"tensor": 2, "expert": 2}, True)]


def test_the_decay_grows_to_the_one_that_is_asked_for():
    assert decay_at(0.999, 1) == pytest.approx(2 / 11)
    assert decay_at(0.999, 10**6) == 0.999
    decays = [decay_at(0.9, step) for step in range(1, 200)]
    assert decays == sorted(decays) and decays[-1] == 0.9


@pytest.mark.parametrize(("layout", "distributed"), LAYOUTS, ids=str)
def test_the_average_is_that_of_the_weights_after_each_update(pool, tmp_path, layout, distributed):
    """From checkpoints of every step; and a run that was stopped has the same average, to the bit."""
    settings = dict(layout=layout, optim__ema=0.6, optim__distributed=distributed)
    found = pool(2).run("tests.training.weight_cases:averages", directory=str(tmp_path / "a"), **settings)[0]
    for name, average in found["expected"].items():
        torch.testing.assert_close(torch.tensor(found["average"][name]), torch.tensor(average), rtol=1e-6, atol=1e-7)
    assert any((found["average"][name] != found["weights"][name]).any() for name in found["average"])
    resumed = pool(2).run("tests.training.weight_cases:resumed_average", directory=str(tmp_path / "b"), **settings)[0]
    for name, average in found["average"].items():
        assert (resumed[name] == average).all(), name


def test_the_average_is_evaluated_and_exported(single, tmp_path):
    from nemo_diffgemma import DiffusionGemma
    from nemo_diffgemma.checkpoint import average, streaming
    from nemo_diffgemma.checkpoint.tensor_files import CheckpointError

    cases.run(str(tmp_path / "run"), steps=2, optim__ema=0.5)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-2"
    streaming.convert(checkpoint, tmp_path / "out", "huggingface", "ema")
    exported = DiffusionGemma.from_checkpoint(tmp_path / "out")
    loaded = DiffusionGemma.from_checkpoint(checkpoint)
    trained = {name: parameter.detach().clone() for name, parameter in loaded.named_parameters()}
    average.fill(loaded, checkpoint)
    for name, parameter in loaded.named_parameters():
        ids = 64 if name.startswith("embed") else len(parameter)  # the others pad the vocabulary
        assert torch.equal(parameter[:ids], exported.get_parameter(name)[:ids]), name
    assert any(not torch.equal(parameter, trained[name]) for name, parameter in loaded.named_parameters())
    cases.run(str(tmp_path / "without"), steps=1)
    for refused in (
        lambda: average.fill(loaded, tmp_path / "without" / "checkpoints" / "step-1"),
        lambda: streaming.convert(tmp_path / "without" / "checkpoints" / "step-1", tmp_path / "no", "sharded", "ema"),
    ):
        with pytest.raises(CheckpointError, match="no average of weights.*optim.ema"):
            refused()
    assert not (tmp_path / "no").exists()
