"""What the model is asked to generate, here, in every layout and on GPUs, and the tokens of transformers.

Tokens of a random model are chaotic: self-conditioning turns a difference of 1e-6 into another token within a few
steps. So the models are calm (self-conditioning x 0.1, sublayers x 0.2, whose canvases become stable), and compared are
the rows that the reference keeps when its own logits move by 1e-5.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.reference import RecordedNoise, generate

DAMP, SUBLAYERS = 0.1, 0.2
ROWS, PROMPT, CANVASES = 8, 11, 3
_CALM = dict(
    max_denoising_steps=12,
    entropy_bound=5.0,
    t_min=0.4,
    t_max=0.8,
    stability_threshold=1,
    confidence_threshold=1.0,
    eos_token_id=[1, 50],
    pad_token_id=0,
)
GENERATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "stable_0": ("base", dict(stability_threshold=0)),
    "stable_1": ("base", {}),
    "stable_2": ("base", dict(stability_threshold=2)),
    "eos_int": ("base", dict(eos_token_id=50)),
    "eos_many": ("base", dict(eos_token_id=list(range(1, 64, 2)), stability_threshold=2)),
    "eos_none": ("base", dict(eos_token_id=None)),
    "pad_none": ("base", dict(pad_token_id=None, eos_token_id=[1, 50, 25])),
    "neither": ("base", dict(pad_token_id=None, eos_token_id=None)),
    "tight_bound": ("base", dict(entropy_bound=0.1, max_denoising_steps=6)),  # most tokens are renoised every step
    "warm": ("base", dict(t_min=0.1, t_max=2.0, max_denoising_steps=3)),
    "one_step": ("base", dict(max_denoising_steps=1)),
    "released": ("base", dict(max_denoising_steps=8, entropy_bound=0.1, confidence_threshold=0.005)),
    "one_global_kv": ("one_global_kv", {}),
    "odd_vocab": ("odd_vocab", {}),
    "bigger_canvas": ("bigger_canvas", {}),
    "deep": ("deep", dict(max_denoising_steps=6)),
}


class Tokens(NamedTuple):
    """What `generate` gives, and the rows on which another implementation must give the same."""

    sequences: Tensor
    forwards: Tensor
    tokens_per_forward: Tensor
    robust: Tensor


def settings(name: str) -> dict[str, Any]:
    """The fields of `SamplerConfig`."""
    return _CALM | GENERATIONS[name][1]


def prompts(reference: Any, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """Ids and mask [rows, PROMPT]; row r has r pads at the left."""
    vocabulary = reference.config.text_config.vocab_size
    ids = torch.randint(vocabulary, (rows, PROMPT), generator=torch.Generator().manual_seed(4))
    return ids, (torch.arange(PROMPT) >= torch.arange(rows)[:, None]).long()


def recorded_noise(reference: Any, name: str) -> RecordedNoise:
    return RecordedNoise.draw(
        1,
        canvases=CANVASES,
        steps=settings(name)["max_denoising_steps"],
        rows=ROWS,
        canvas_length=reference.config.canvas_length,
        vocabulary=reference.config.text_config.vocab_size,
    )


def asked(reference: Any, name: str, noise: Any = None) -> dict[str, Any]:
    """Arguments of `cases.generate`; the last canvas is asked for one token only, and comes whole."""
    ids, mask = prompts(reference)
    return dict(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=(CANVASES - 1) * reference.config.canvas_length + 1,
        sampler=settings(name),
        noise=noise or recorded_noise(reference, name),
    )


@functools.cache
def tokens(reference: Any, name: str, noise: Any = None) -> Tokens:
    """By transformers, as `tests.reference.sampling` writes it out."""
    arguments = asked(reference, name, noise)
    sampler = arguments.pop("sampler")
    return Tokens(*generate(reference, **arguments, **sampler, probe=1e-5))


def assert_same_tokens(ours: tuple[Tensor, Tensor, Tensor], theirs: Tokens, at_least: int = 5) -> None:
    """Equal sequences, forwards and tokens per forward on robust rows, of which there are enough to mean something."""
    sequences, forwards, per_forward = ours
    robust = theirs.robust
    assert robust.sum() >= at_least, f"only {int(robust.sum())} rows are robust; take another seed"
    # a row that is not robust may have made one side go on for another canvas
    both = min(sequences.shape[1], theirs.sequences.shape[1])
    assert torch.equal(sequences[robust, :both], theirs.sequences[robust, :both])
    assert torch.equal(forwards[robust], theirs.forwards[robust].to(forwards.dtype))
    if sequences.shape == theirs.sequences.shape:
        assert torch.equal(per_forward[robust], theirs.tokens_per_forward[robust])
    else:
        assert not robust.all()
