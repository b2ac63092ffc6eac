"""Input that means nothing is refused before anything is computed, in one paragraph that says what to give instead."""

from __future__ import annotations

import re

import pytest
import torch

from nemo_diffgemma import SamplerConfig
from nemo_diffgemma.errors import UserError
from tests.distributed import cases

IDS = torch.arange(12).view(2, 6)
CANVAS = torch.arange(8).view(2, 4)


@pytest.fixture(scope="module")
def model(single, checkpoint):
    return cases.load(checkpoint("odd_vocab"), {})


VOCABULARY = r"token ids range from .*, but this model has 61 ids \(0 to 60\); was the prompt made with another"
LEFT = "attention_mask must be zeros at the left of a row and then ones, at least one of them; pad prompts on the left"
BAD = {
    "an id above the vocabulary": (lambda m: m.encode(IDS + 50), VOCABULARY),
    "an id in the padding of the table": (lambda m: m.generate(torch.tensor([[61]])), VOCABULARY),
    "a negative id": (lambda m: m.encode(IDS - 1), VOCABULARY),
    "an empty prompt": (
        lambda m: m.generate(IDS[:, :0]),
        r"input_ids has shape \[2, 0\].* needs at least the <bos> token, id 2",
    ),
    "no rows": (lambda m: m.encode(IDS[:0]), r"input_ids has shape \[0, 6\]; expected \[rows, tokens\]"),
    "one row without its axis": (lambda m: m.encode(IDS[0]), r"input_ids has shape \[6\]; expected \[rows, tokens\]"),
    "padding on the right": (lambda m: m.encode(IDS, torch.tensor([[1] * 6, [1] * 5 + [0]])), LEFT),
    "a hole in the mask": (lambda m: m.encode(IDS, torch.tensor([[1] * 6, [0, 1, 0, 1, 1, 1]])), LEFT),
    "a row of padding alone": (lambda m: m.generate(IDS, torch.tensor([[1] * 6, [0] * 6])), LEFT),
    "a mask of twos": (lambda m: m.encode(IDS, torch.tensor([[1] * 6, [0, 1, 2, 2, 2, 2]])), LEFT),
    "an additive mask": (lambda m: m.encode(IDS, torch.tensor([[0.0] * 6, [-torch.inf] + [0.0] * 5])), LEFT),
    "a mask of another length": (
        lambda m: m.encode(IDS, torch.ones(2, 10)),
        r"attention_mask has shape \[2, 10\] but input_ids has \[2, 6\]; give one mask entry for each token",
    ),
    "a short canvas": (
        lambda m: m.denoise(CANVAS[:, :3], m.encode(IDS)),
        r"canvas has shape \[2, 3\]; expected \[2, 4\], that is one canvas of canvas_length=4 tokens",
    ),
    "a canvas for one row of two": (lambda m: m.denoise(CANVAS[:1], m.encode(IDS)), r"canvas has shape \[1, 4\]"),
    "a canvas outside the vocabulary": (lambda m: m.denoise(CANVAS + 60, m.encode(IDS)), VOCABULARY),
    "no new tokens": (lambda m: m.generate(IDS, max_new_tokens=0), "max_new_tokens=0; expected at least 1"),
    "padding that is no token": (
        lambda m: m.generate(IDS, sampler=SamplerConfig(pad_token_id=61)),
        r"sampler.pad_token_id=61 is outside the vocabulary; expected an id from 0 to 60",
    ),
    "an end that never comes": (
        lambda m: m.generate(IDS, sampler=SamplerConfig(eos_token_id=61)),
        r"sampler.eos_token_id=61 is outside the vocabulary",
    ),
    "a seed of 67 bits": (lambda m: m.generate(IDS, seed=10**20), "seed=100000000000000000000; expected an integer"),
    "initial weights of such a seed": (lambda m: m.init_weights(-(10**20)), "seed=-100000000000000000000; expected an"),
    "too few seeds": (lambda m: m.generate(IDS, seed=[1]), "1 seeds for 2 rows; give one int, or one int for each row"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(model, name):
    call, message = BAD[name]
    with pytest.raises(UserError) as raised:
        call(model)
    assert re.search(message, str(raised.value)), str(raised.value)
    assert "\n" not in str(raised.value)
