"""The parts where a small error hides behind a random model: norms, rotations, scales, in float32 and in bfloat16."""

from __future__ import annotations

import pytest
import torch

from nemo_diffgemma import ModelConfig
from nemo_diffgemma.config import GLOBAL, SLIDING
from nemo_diffgemma.model.embedding import TokenTable
from nemo_diffgemma.model.network import transformer_config
from nemo_diffgemma.model.norm import rms_norm
from nemo_diffgemma.model.rotary import cosine_and_sine, inverse_frequencies, rotate
from nemo_diffgemma.parallel import ParallelLayout, process_groups
from tests.distributed import cases
from tests.parity.questions import SUBLAYERS, answer, question

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "weightless"])
def test_the_norm_is_transformers_norm(dtype, weighted):
    """In float32, times w and not 1 + w, then cast: bit for bit."""
    from transformers.models.diffusion_gemma.modeling_diffusion_gemma import DiffusionGemmaRMSNorm

    theirs = DiffusionGemmaRMSNorm(32, eps=1e-6, with_scale=weighted).to(dtype)
    generator = torch.Generator().manual_seed(0)
    weight = None
    if weighted:
        with torch.no_grad():
            theirs.weight.copy_(1 + 0.3 * torch.randn(32, generator=generator))
        weight = theirs.weight.detach()
    x = (torch.randn(50, 32, generator=generator) * torch.logspace(-6, 3, 50)[:, None]).to(dtype)
    tolerance = dict(atol=0, rtol=0) if dtype == torch.bfloat16 else dict(atol=0, rtol=1e-6)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), theirs(x).detach(), **tolerance)


@pytest.mark.parametrize("kind", [SLIDING, GLOBAL])
def test_frequencies_are_transformers_tables(reference, checkpoint, kind):
    model = reference("base")
    config = ModelConfig.from_pretrained(checkpoint("base"))
    theirs = getattr(model.model.decoder.rotary_emb, f"{kind}_inv_freq")
    torch.testing.assert_close(inverse_frequencies(config, kind, CPU), theirs, atol=0, rtol=1e-6)


def test_global_layers_rotate_the_first_quarter_of_the_pairs():
    """At the released width of 512 dimensions 0..63 and 256..319 turn, with exponents over 512; all others stand."""
    frequencies = inverse_frequencies(ModelConfig(), GLOBAL, CPU)
    x = torch.ones(1, 1, 512)
    turned = rotate(x, cosine_and_sine(torch.tensor([3]), frequencies, torch.float32))[0, 0] != 1
    assert turned.nonzero()[:, 0].tolist() == [*range(64), *range(256, 320)]
    exponents = -torch.log(frequencies[:64]) / torch.log(torch.tensor(1e6))
    torch.testing.assert_close(exponents, torch.arange(64) * 2 / 512, atol=1e-6, rtol=0)


def test_a_position_far_out_is_rotated_as_exactly_as_a_near_one():
    """Angles in float32, whatever dtype the tables are cast to."""
    frequencies = inverse_frequencies(ModelConfig(), SLIDING, CPU)
    positions = torch.tensor([0, 1, 5000, 200_000])
    cosine, _ = cosine_and_sine(positions, frequencies, torch.bfloat16)
    truth = torch.cos(positions.float()[:, None] * frequencies).to(torch.bfloat16).repeat(1, 2)
    assert cosine.dtype == torch.bfloat16 and torch.equal(cosine[:, 0], truth)


@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.float32, 53.06599807739258), (torch.bfloat16, 53.0)], ids=["float32", "bfloat16"]
)
def test_the_embedding_scale_is_rounded_to_the_weights_dtype(single, dtype, scale):
    """At the released hidden size of 2816."""
    small = ModelConfig(vocab_size=7, num_hidden_layers=1)
    table = TokenTable(small, transformer_config(small, ParallelLayout(), dtype), process_groups())
    torch.nn.init.normal_(table.weight, generator=torch.Generator().manual_seed(0))
    looked_up = table.look_up(torch.tensor([1, 6]))
    assert torch.equal(looked_up, table.weight[[1, 6]] * torch.tensor(scale, dtype=dtype))


def test_loading_in_bfloat16_keeps_frequencies_in_float32(single, checkpoint):
    exact = cases.load(checkpoint("base"), {})
    rounded = cases.load(checkpoint("base"), {}, torch.bfloat16)
    assert {p.dtype for p in rounded.parameters()} == {torch.bfloat16}
    for kind in (SLIDING, GLOBAL):
        assert rounded._frequencies[kind].dtype == torch.float32
        assert torch.equal(rounded._frequencies[kind], exact._frequencies[kind])
    assert torch.equal(rounded.bfloat16()._frequencies[SLIDING], exact._frequencies[SLIDING])


@pytest.mark.parametrize("size", ["base", "deep", "bigger_canvas"])
def test_bfloat16_is_no_less_exact_than_transformers(single, reference, checkpoint, size):
    """Distance of either to float32 over 36 rows: ours at most 1.5 times theirs; and the same tokens are the best.

    Single logits may differ more: a router that is rounded otherwise chooses another expert. Which ones is chance, and
    another processor's: shares of best tokens are compared to within three standard errors of their difference.
    """
    from transformers.models.diffusion_gemma import DiffusionGemmaForBlockDiffusion

    path = checkpoint(size, sublayers=SUBLAYERS[size])
    theirs = DiffusionGemmaForBlockDiffusion.from_pretrained(path, dtype=torch.bfloat16).eval()
    theirs.set_experts_implementation("eager")  # its grouped kernel refuses experts 20 wide
    exact, ours = reference(size, sublayers=SUBLAYERS[size]), cases.load(path, {}, torch.bfloat16)
    asked = [
        question(exact, kind, 9, seed=seed) for kind in ("signal", "padded", "after_1_canvas") for seed in range(4)
    ]
    truth = torch.stack([answer(exact, one) for one in asked])
    of_theirs = torch.stack([answer(theirs, one) for one in asked])
    of_ours = torch.stack([cases.answer(ours, **one.asked()) for one in asked])
    assert of_ours.dtype == torch.float32
    their_error, our_error = (x.sub(truth).square().mean().sqrt() for x in (of_theirs, of_ours))
    assert our_error < 1.5 * their_error
    agreement = [(x.argmax(-1) == truth.argmax(-1)).float().mean() for x in (of_theirs, of_ours)]
    error = (2 * agreement[0] * (1 - agreement[0]) / truth.argmax(-1).numel()).sqrt()
    assert agreement[1] > agreement[0] - 3 * error
