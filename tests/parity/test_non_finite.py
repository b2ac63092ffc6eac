"""NaN and infinity in weights or activations end in an error that names tensor and layer, wherever they are."""

from __future__ import annotations

import re

import pytest
import torch

from nemo_diffgemma import SamplerConfig
from nemo_diffgemma.checkpoint.names import released_name, text_tensors
from nemo_diffgemma.diffusion.rows import Rows
from nemo_diffgemma.evaluation.measures import canvas_losses
from nemo_diffgemma.non_finite import NonFiniteError, first_non_finite
from tests.distributed import cases
from tests.distributed.layouts import LAYOUTS

IDS = torch.arange(12).view(2, 6)
SAMPLER = SamplerConfig(max_denoising_steps=2, eos_token_id=None, pad_token_id=None)


@pytest.fixture(scope="module")
def model(single, checkpoint):
    return cases.load(checkpoint("odd_vocab"), {})


@pytest.mark.parametrize(
    "name", ["o_proj.weight", "down_proj.weight", "input_layernorm.weight", "layers.0.layer_scalar"]
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_has_become_nan_since_it_was_loaded_is_named(model, name, value):
    ours, tensor = next((full, tensor) for full, tensor in text_tensors(model) if full.endswith(name))
    before = tensor.detach().clone()
    try:
        tensor.data.view(-1)[-1] = value
        with pytest.raises(NonFiniteError, match=re.escape(f"{released_name(ours)} holds NaN or infinity in 1 of its")):
            model.generate(IDS, max_new_tokens=8, sampler=SAMPLER)
    finally:
        tensor.data.copy_(before)


def test_activations_that_overflow_are_named_by_their_layer(model):
    weight = model.layers[1].mlp.down_proj.weight
    before = weight.detach().clone()
    try:
        weight.data.fill_(3e38)  # finite, but no sum of two of them is
        with pytest.raises(NonFiniteError, match="layers.1.mlp.down_proj is the first module.*use dtype=float32"):
            model.generate(IDS, max_new_tokens=8, sampler=SAMPLER)
    finally:
        weight.data.copy_(before)


def test_an_evaluation_that_is_not_finite_is_computed_again_once(model, monkeypatch):
    rows = Rows(torch.arange(12), [((4, 12),)], [12], [0], fill_id=1)
    calls = []
    plain = model.canvas_hidden
    monkeypatch.setattr(model, "canvas_hidden", lambda *given: calls.append(1) or plain(*given) * torch.nan)
    with pytest.raises(NonFiniteError, match="neither weights nor outputs of layers are"):
        canvas_losses(model, rows, [0.5], seed=0)
    assert len(calls) == 2


def test_every_rank_names_what_one_rank_has(pool, checkpoint):
    errors = pool(2).run(
        "tests.distributed.cases:error_of",
        case="generate_with_nan_on_the_last_rank",
        path=checkpoint("base"),
        layout=LAYOUTS["tp2_ep2"][1],
    )
    assert len(set(errors)) == 1 and "holds NaN or infinity in 1 of its" in errors[0]


def test_the_first_of_several_is_named():
    tensors = {"a": torch.ones(3), "ids": torch.tensor([1]), "b": torch.tensor([1.0, torch.nan, torch.inf])}
    assert first_non_finite(tensors.items()) == "b holds NaN or infinity in 2 of its 3 entries"
    assert first_non_finite({"a": torch.ones(3)}.items()) is None
