"""The reference is what transformers does: each claim against the real thing.

`pytest tests/reference`, under a minute on one thread.
"""

import json
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers.models.diffusion_gemma import DiffusionGemmaForBlockDiffusion
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    DiffusionGemmaGenerationConfig,
    EntropyBoundSamplerConfig,
)

from tests.reference import (
    SIZES,
    RecordedNoise,
    denoise,
    encode,
    encode_and_denoise,
    encoder_states,
    generate,
    head,
    inverse_cdf,
    multi_canvas,
    objective,
    randomised_model,
    save_released_layout,
    tiny_config,
)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ids_of(model, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(model.config.text_config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


class InDouble(TorchFunctionMode):
    """Every float32 that the model asks for becomes float64, which tells an error from rounding."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        double = [torch.float64 if value is torch.float32 else value for value in args]
        named = {key: torch.float64 if value is torch.float32 else value for key, value in (kwargs or {}).items()}
        return (torch.Tensor.double if function is torch.Tensor.float else function)(*double, **named)


# -- models ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_every_size_splits_four_ways_and_nothing_keeps_its_initial_value(size):
    model = randomised_model(tiny_config(size), seed=0)
    text = model.config.text_config
    for divided in (text.num_attention_heads, text.intermediate_size, text.moe_intermediate_size, text.num_experts):
        assert divided % 4 == 0
    for name, parameter in model.named_parameters():
        assert parameter.std() > 0.05, name
        if parameter.ndim == 1:
            assert (parameter != 1).all(), name
    scalars = [float(tensor) for name, tensor in model.named_buffers() if name.endswith("layer_scalar")]
    assert len(set(scalars)) == 2 * text.num_hidden_layers and 1 not in scalars  # encoder and decoder copies differ


def test_a_model_depends_on_its_seed_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = randomised_model(tiny_config(), seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again, other = randomised_model(tiny_config(), seed=3), randomised_model(tiny_config(), seed=4)
    ids, canvas = ids_of(first, 1, 9), ids_of(first, 1, 4, seed=1)
    assert torch.equal(encode_and_denoise(first, ids, canvas), encode_and_denoise(again, ids, canvas))
    assert not torch.equal(encode_and_denoise(first, ids, canvas), encode_and_denoise(other, ids, canvas))


@pytest.mark.parametrize("flat", [True, False], ids=["flat", "per_layer_config"])
@pytest.mark.parametrize(("size", "shards"), [("base", 1), ("one_global_kv", 3), ("odd_vocab", 2), ("deep", 5)])
def test_transformers_loads_the_released_layout_in_both_spellings(tmp_path, size, shards, flat):
    model = randomised_model(tiny_config(size), seed=0)
    save_released_layout(model, tmp_path, shards=shards, flat_per_layer_config=flat)

    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert ("per_layer_config" in text) != flat and ("global_head_dim" in text) == flat
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert files == sorted(set(weight_map.values())) and len(files) == shards
    for file in files:
        with safe_open(tmp_path / file, "pt") as stored:
            assert {name for name in weight_map if weight_map[name] == file} == set(stored.keys())

    loaded = DiffusionGemmaForBlockDiffusion.from_pretrained(tmp_path).eval()
    saved = model.state_dict()
    assert saved.keys() == loaded.state_dict().keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in loaded.state_dict().items())
    assert loaded.generation_config.eos_token_id == [1, 3, 5]
    assert loaded.generation_config.sampler_config.entropy_bound == 0.1
    ids, canvas = ids_of(model, 1, 9), ids_of(model, 1, model.config.canvas_length, seed=1)
    loaded.set_experts_implementation("eager")
    for parameter in loaded.parameters():  # off the mapped file, whose addresses let matrix products round differently
        parameter.data = parameter.data.clone()
    assert torch.equal(encode_and_denoise(model, ids, canvas), encode_and_denoise(loaded, ids, canvas))


def test_on_disk_are_one_text_stack_and_the_encoders_scalars(tmp_path):
    """The names of reference/model.md 2.1: 22 tensors per sliding layer, 21 per global one, 6 around them."""
    save_released_layout(randomised_model(tiny_config(), seed=0), tmp_path, shards=2)
    names = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    decoder = [name for name in names if name.startswith("model.decoder.")]
    encoder = [name for name in names if name.startswith("model.encoder.language_model.")]
    assert len(decoder) == 22 * 2 + 21 + 6
    assert encoder == [f"model.encoder.language_model.layers.{i}.layer_scalar" for i in range(3)]
    rest = set(names) - set(decoder) - set(encoder)
    assert all(name.startswith(("model.encoder.vision_tower.", "model.encoder.embed_vision.")) for name in rest)


# -- forward -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_encode_and_denoise_is_the_models_forward(size):
    model = randomised_model(tiny_config(size), seed=0)
    canvas = ids_of(model, 2, model.config.canvas_length, seed=1)
    signal = encode_and_denoise(model, ids_of(model, 2, 3), canvas)
    for length in (3, 7, 8, 9, 20):
        ids = ids_of(model, 2, length)
        mask = torch.ones(2, length, dtype=torch.long)
        mask[1, :2] = 0
        with torch.no_grad():
            want = model(
                input_ids=ids,
                attention_mask=mask,
                decoder_input_ids=canvas,
                decoder_attention_mask=torch.nn.functional.pad(mask, (0, canvas.shape[1]), value=1),
                self_conditioning_logits=signal,
            )
        assert torch.equal(encode_and_denoise(model, ids, canvas, mask, signal), want.logits)
        assert torch.equal(encoder_states(model, ids, mask), want.encoder_last_hidden_state)
        assert want.logits.dtype == torch.float32


@pytest.mark.parametrize("size", ["base", "bigger_canvas"])
def test_left_padding_changes_nothing_if_both_sides_are_told(size):
    with InDouble(), torch.no_grad():
        model = randomised_model(tiny_config(size), seed=0).double()
        ids, canvas = ids_of(model, 1, 13), ids_of(model, 1, model.config.canvas_length, seed=1)
        padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], -1)
        mask = torch.arange(18)[None] >= 5
        want = encode_and_denoise(model, ids, canvas)
        torch.testing.assert_close(encode_and_denoise(model, padded, canvas, mask), want, atol=1e-9, rtol=0)
        cache, _ = encode(model, padded, attention_mask=mask)
        assert (denoise(model, canvas, cache) - want).abs().max() > 0.1  # a decoder without the mask


@pytest.mark.parametrize("size", ["base", "deep", "bigger_canvas"])
def test_appending_canvases_equals_one_prefill(size):
    with InDouble():
        model = randomised_model(tiny_config(size), seed=0).double()
        length = model.config.canvas_length
        ids, canvas = ids_of(model, 2, 11), ids_of(model, 2, length, seed=4)
        finished = [ids_of(model, 2, length, seed=i) for i in (1, 2, 3)]
        mask = torch.arange(11) >= torch.tensor([[3], [0]])
        mask_of_all = torch.nn.functional.pad(mask, (0, 3 * length), value=True)
        appended = multi_canvas(model, ids, finished, canvas, mask)
        at_once = encode_and_denoise(model, torch.cat([ids, *finished], -1), canvas, mask_of_all)
        torch.testing.assert_close(appended, at_once, atol=1e-9, rtol=0)


# -- sampling ----------------------------------------------------------------------------------------------------------


@contextmanager
def random_numbers_from(noise: RecordedNoise, steps: int, monkeypatch):
    """Within, transformers' generation draws from `noise`: its candidates by torch.multinomial, its ids by
    torch.randint.

    Order in HF: per canvas randint for its start, then per step multinomial for the candidates and randint for the
    rest.
    """
    at = {"canvas": -1, "step": 0, "candidates drawn": False}

    def randint(low, high, size, device=None):
        if at["candidates drawn"]:
            drawn = noise.replacements(at["canvas"], at["step"])
            at["step"] -= 1
        else:
            at["canvas"], at["step"] = at["canvas"] + 1, steps
            drawn = noise.initial(at["canvas"])
        at["candidates drawn"] = False
        assert low == 0 and tuple(size) == tuple(drawn.shape)
        return drawn.clone()

    def multinomial(probabilities, num_samples):
        uniforms = noise.uniforms(at["canvas"], at["step"])
        assert not at["candidates drawn"] and num_samples == 1 and len(probabilities) == uniforms.numel()
        at["candidates drawn"] = True
        return inverse_cdf(probabilities, uniforms.reshape(-1))[:, None]

    with monkeypatch.context() as patch:
        patch.setattr(torch, "randint", randint)
        patch.setattr(torch, "multinomial", multinomial)
        yield


@dataclass
class Case:
    """One comparison with `generate()`. Three rows, the second with four pads in front."""

    size: str = "base"
    seed: int = 0
    self_conditioning: float = 1.0
    sublayers: float = 1.0
    sharpen: float = 1.0
    prompt: int = 11
    settings: dict = field(default_factory=dict)

    def run(self, monkeypatch, probe=None):
        model = randomised_model(tiny_config(self.size), self.seed, self.self_conditioning, self.sublayers)
        with torch.no_grad():
            model.model.decoder.norm.weight.mul_(self.sharpen)
        length, vocabulary = model.config.canvas_length, model.config.text_config.vocab_size
        settings = dict(
            max_new_tokens=3 * length - 1,
            max_denoising_steps=7,
            entropy_bound=0.7,
            t_min=0.4,
            t_max=0.8,
            stability_threshold=1,
            confidence_threshold=0.005,
            eos_token_id=[1, 50],
            pad_token_id=0,
        )
        settings |= self.settings
        steps = settings["max_denoising_steps"]
        noise = RecordedNoise.draw(
            self.seed, canvases=3, steps=steps, rows=3, canvas_length=length, vocabulary=vocabulary
        )
        ids = torch.randint(2, 60, (3, self.prompt), generator=torch.Generator().manual_seed(self.seed))
        mask = torch.ones_like(ids)
        mask[1, :4] = 0
        ours = generate(model, ids, mask, noise=noise, **settings, probe=probe)

        bound = EntropyBoundSamplerConfig(entropy_bound=settings["entropy_bound"])
        of_hf = {key: value for key, value in settings.items() if key != "entropy_bound"} | {"sampler_config": bound}
        with random_numbers_from(noise, steps, monkeypatch):
            theirs = model.generate(
                ids.clone(), attention_mask=mask, generation_config=DiffusionGemmaGenerationConfig(**of_hf)
            )
        return ours, theirs, settings


def calm(size: str = "base", seed: int = 0, **settings) -> Case:
    """Canvases mostly predict themselves and so become stable, each row at its own step."""
    given = dict(entropy_bound=5.0, confidence_threshold=1.0, max_denoising_steps=12)
    return Case(size, seed, 0.1, 0.2, settings=given | settings)


def wild(size: str = "base", seed: int = 0, sharpen: float = 1.0, prompt: int = 11, **settings) -> Case:
    return Case(size, seed, 1.0, 1.0, sharpen, prompt, settings=settings)


CASES = {
    "calm-stable1": calm(),
    "calm-stable2": calm(stability_threshold=2),
    "calm-stable3": calm("odd_vocab", 1, stability_threshold=3),
    "calm-stable0": calm(stability_threshold=0),
    "calm-odd_vocab": calm("odd_vocab", entropy_bound=0.7),
    "calm-odd_vocab-stable2": calm("odd_vocab", 2, stability_threshold=2),
    "calm-bigger_canvas": calm("bigger_canvas"),
    "calm-one_global_kv": calm("one_global_kv", 3),
    "calm-deep": calm("deep", max_denoising_steps=6),
    "eos-int": calm(eos_token_id=50),
    "eos-none": calm(eos_token_id=None),
    "eos-many": calm(eos_token_id=list(range(1, 64, 6)), stability_threshold=2),
    "pad-none": calm(pad_token_id=None, eos_token_id=[1, 50, 25]),
    "pad-is-eos": calm("odd_vocab", pad_token_id=1),
    "neither": calm(pad_token_id=None, eos_token_id=None),
    "wild-released": wild(entropy_bound=0.1),
    "wild-sharp-stable2": wild(sharpen=2, stability_threshold=2, confidence_threshold=3.0),
    "wild-stable0": wild("one_global_kv", stability_threshold=0, confidence_threshold=2.0),
    "wild-odd_vocab": wild("odd_vocab", 1, confidence_threshold=1.5),
    "wild-deep": wild("deep", confidence_threshold=1.5),
    "wild-bigger_canvas": wild("bigger_canvas", 2, sharpen=2),
    "wild-short-prompt": wild(prompt=5, stability_threshold=0, confidence_threshold=2.0, eos_token_id=1),
    "wild-warm": wild(seed=5, t_min=0.1, t_max=2.0, entropy_bound=3.0, max_denoising_steps=3),
    "wild-one-step": wild(seed=6, max_denoising_steps=1, max_new_tokens=1),
}
seen: dict[str, tuple[list[int], int, list[bool]]] = {}  # of each case: forwards, canvases, rows with an eos


@pytest.mark.parametrize("name", CASES)
def test_generate_equals_transformers_token_for_token(name, monkeypatch):
    (sequences, forwards, per_forward), theirs, settings = CASES[name].run(monkeypatch)
    assert torch.equal(sequences, theirs.sequences)
    assert torch.equal(per_forward, theirs.tokens_per_forward)
    eos = settings["eos_token_id"]
    eos = [] if eos is None else [eos] if isinstance(eos, int) else eos
    new = sequences[:, CASES[name].prompt :]
    length = tiny_config(CASES[name].size).canvas_length
    ended = torch.isin(new, torch.tensor(eos, dtype=torch.long)).any(-1)
    seen[name] = (forwards.tolist(), new.shape[1] // length, ended.tolist())


def test_the_cases_cover_what_they_are_for():
    """Runs after the cases: rows stop at different steps, and before the last; eos ends some rows, or all of them
    early.
    """
    if set(seen) != set(CASES):
        pytest.skip("needs all cases of test_generate_equals_transformers_token_for_token in this run")
    for name in ("calm-stable1", "calm-stable2", "calm-stable3", "calm-stable0"):
        assert len(set(seen[name][0])) > 1 and min(seen[name][0]) < 3 * 12, name
    assert all(len(set(seen[name][0])) > 1 for name in ("eos-none", "neither"))  # not by eos, but by becoming stable
    assert any(any(ended) and not all(ended) for _, _, ended in seen.values())
    assert any(all(ended) and canvases < 3 for _, canvases, ended in seen.values())
    assert seen["wild-one-step"][:2] == ([1, 1, 1], 1)  # one new token is a whole canvas


def test_inverse_cdf_takes_the_smallest_id_whose_cumulative_probability_exceeds_the_uniform():
    probabilities = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    uniforms = torch.tensor([0.0, 0.249, 0.25, 0.749, 0.75, 1 - 2**-24])
    assert inverse_cdf(probabilities.expand(6, 6), uniforms).tolist() == [1, 1, 3, 3, 4, 4]
    short = torch.full((1, 7), 1 / 7) * (1 - 1e-6)  # sums to less than the uniform
    assert inverse_cdf(short, torch.tensor([1 - 2**-24])).tolist() == [6]


def test_recorded_noise_counts_steps_down_and_selects_rows():
    noise = RecordedNoise.draw(0, canvases=2, steps=5, rows=3, canvas_length=4, vocabulary=9)
    assert torch.equal(noise.uniforms(1, 5), noise.uniforms_KNBC[1, 0])
    assert torch.equal(noise.replacements(1, 1), noise.replacements_KNBC[1, 4])
    some = noise.select([2, 0])
    assert torch.equal(some.initial(1), noise.initial(1)[[2, 0]])
    assert torch.equal(some.uniforms(0, 3), noise.uniforms(0, 3)[[2, 0]])
    assert torch.equal(some.replacements(0, 3), noise.replacements(0, 3)[[2, 0]])


def test_robust_rows_are_those_that_other_kernels_and_other_batches_reproduce():
    """grouped_mm for the experts, and each row alone without its padding, round differently; robust rows don't mind."""
    settings = CASES["calm-stable1"].settings | dict(
        max_new_tokens=11, t_min=0.4, t_max=0.8, stability_threshold=1, eos_token_id=[1, 50], pad_token_id=0
    )
    kept = []
    for damp in (0.1, 1.0):
        model = randomised_model(tiny_config(), 0, damp, 0.2 if damp == 0.1 else 1.0)
        noise = RecordedNoise.draw(
            1, canvases=3, steps=settings["max_denoising_steps"], rows=8, canvas_length=4, vocabulary=64
        )
        ids = ids_of(model, 8, 11)
        mask = torch.arange(11) >= torch.arange(8)[:, None]  # 0 to 7 pads
        sequences, forwards, _, robust = generate(model, ids, mask, noise=noise, **settings, probe=1e-5)
        kept.append(int(robust.sum()))

        model.set_experts_implementation("grouped_mm")
        other, other_forwards, _ = generate(model, ids, mask, noise=noise, **settings)
        assert torch.equal(other[robust], sequences[robust])
        assert torch.equal(other_forwards[robust], forwards[robust])
        for row in robust.nonzero()[:, 0].tolist():
            alone, steps, _ = generate(model, ids[row : row + 1, row:], noise=noise.select([row]), **settings)
            both = min(alone.shape[1], sequences.shape[1] - row)  # alone it stops when it is finished
            assert torch.equal(alone[0, :both], sequences[row, row : row + both])
            assert steps == forwards[row]
    assert kept[0] >= 6  # a damped model leaves enough to compare
    assert kept[1] < kept[0]  # and the probe does find chaos where there is some


# -- objective ---------------------------------------------------------------------------------------------------------


def example(model, rows: int = 2, canvases: int = 2, prompt: int = 6) -> dict:
    """Rows with prompts and responses of different lengths; row 0 scores two canvases, the others one."""
    length = model.config.canvas_length
    lowest = 1  # id 0 has no gradient through HF's lookup
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.text_config.vocab_size
    tokens = torch.randint(lowest, vocabulary, (rows, prompt + rows + canvases * length), generator=generator)
    prompts = [prompt + row for row in range(rows)]
    lengths = [prompts[row] + (canvases - row % 2) * length for row in range(rows)]
    noised = []
    for row in range(rows):
        chosen = range(canvases) if row == 0 else [0]
        noised.append([(c, torch.randint(lowest, vocabulary, (length,), generator=generator)) for c in chosen])
    return dict(tokens=tokens, prompt_lengths=prompts, lengths=lengths, noised=noised)


@pytest.mark.parametrize(
    ("size", "coins", "reduction"),
    [
        ("base", [True, False], "example"),
        ("one_global_kv", [False, True], "token"),
        ("odd_vocab", [False, False], "example"),
    ],
)
def test_gradient_of_the_objective_is_its_finite_difference(size, coins, reduction):
    """For every kind of parameter of the text stack, along a random direction, in float64; first passes held."""
    with InDouble():
        model = randomised_model(tiny_config(size), seed=0).double()
        given = example(model)
        settings = dict(self_conditioning_mask_B=coins, autoregressive_weight=0.7, reduction=reduction)
        loss, parts = objective(model, **given, **settings)
        loss.backward()
        assert loss.dtype == torch.float64

        def value() -> Tensor:
            with torch.no_grad():
                return objective(model, **given, **settings, first_pass=parts["first_pass"])[0]

        generator = torch.Generator().manual_seed(1)
        kinds: dict[str, list[torch.nn.Parameter]] = {}
        for name, parameter in model.model.decoder.named_parameters():
            kind = ".".join(part for part in name.split(".") if not part.isdigit())
            kinds.setdefault(kind, []).append(parameter)
        assert len(kinds) == 21 + 6
        for kind, parameters in kinds.items():
            directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
            if kind.startswith("self_conditioning") and not any(coins):
                assert all((p.grad == 0).all() for p in parameters), kind
                continue
            slope = sum((p.grad * d).sum() for p, d in zip(parameters, directions, strict=True))
            step, ends = 1e-6, []
            for sign in (1, -1):
                with torch.no_grad():
                    for p, d in zip(parameters, directions, strict=True):
                        p.add_(sign * step * d)
                    ends.append(value())
                    for p, d in zip(parameters, directions, strict=True):
                        p.sub_(sign * step * d)
            torch.testing.assert_close(
                slope, (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-8, msg=lambda m, kind=kind: kind + m
            )


def test_id_0_has_no_gradient_through_the_lookup_unless_padding_idx_is_taken_away():
    """HF's embedding is built with padding_idx 0, although id 0 is a noise token like any other."""

    def gradient_of_row_0(with_0: bool, padding: int | None) -> Tensor:
        model = randomised_model(tiny_config(), seed=0)
        model.model.decoder.embed_tokens.padding_idx = padding
        model.model.encoder.language_model.embed_tokens.padding_idx = padding
        states = model.model.decoder.embed_tokens(torch.tensor([[0 if with_0 else 5, 7]]))
        states.sum().backward()
        return model.model.decoder.embed_tokens.weight.grad[0]

    assert (gradient_of_row_0(True, 0) == 0).all()
    assert (gradient_of_row_0(True, None) != 0).all()
    assert (gradient_of_row_0(False, None) == 0).all()


def test_with_all_coins_false_there_might_as_well_be_no_first_pass():
    model = randomised_model(tiny_config(), seed=0)
    given = example(model)
    loss, parts = objective(model, **given, self_conditioning_mask_B=[False, False], autoregressive_weight=1.0)
    for row, canvases in enumerate(given["noised"]):
        for position in range(len(canvases)):  # the second pass is the first
            assert torch.equal(parts["first_pass"][row][position], parts["logits"][row][position])
    nonsense = [[torch.full_like(logits, torch.nan) for logits in row] for row in parts["first_pass"]]
    without, _ = objective(
        model, **given, self_conditioning_mask_B=[False, False], autoregressive_weight=1.0, first_pass=nonsense
    )
    assert torch.equal(loss, without)
    signalled, _ = objective(model, **given, self_conditioning_mask_B=[True, False], autoregressive_weight=1.0)
    assert abs(signalled - loss) > 1e-3


def test_the_diffusion_part_alone_trains_keys_and_values_of_the_clean_prefix():
    """HF's cache is no detach: the gradient at the prefix's embeddings is there, and zero from the canvas on."""
    model = randomised_model(tiny_config(), seed=0)
    given = example(model, rows=1)
    prefix_end = given["prompt_lengths"][0] + model.config.canvas_length
    seen_embeddings = []
    handle = model.model.encoder.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: (output.retain_grad(), seen_embeddings.append(output))[-1]
    )
    given["noised"] = [given["noised"][0][1:]]  # canvas 1
    loss, _ = objective(model, **given, self_conditioning_mask_B=[True], autoregressive_weight=0.0)
    loss.backward()
    handle.remove()
    of_prefix, of_whole_row = seen_embeddings
    assert of_prefix.shape[1] == prefix_end
    assert (of_prefix.grad.abs().sum(-1) > 0).all()
    assert (of_whole_row.grad == 0).all()  # the autoregressive pass, weight 0


def test_the_reductions_weigh_rows_and_tokens():
    model = randomised_model(tiny_config(), seed=0)
    given = example(model, rows=2)
    length = model.config.canvas_length
    settings = dict(self_conditioning_mask_B=[False, True], autoregressive_weight=0.5, vocabulary=64)
    by_example, parts = objective(model, **given, **settings)
    by_token, totals = objective(model, **given, **settings, reduction="token")
    assert (parts["diffusion_tokens"], parts["autoregressive_tokens"]) == (3 * length, sum(given["lengths"]) - 2)
    torch.testing.assert_close(
        by_example.detach(), (parts["diffusion_B"] + 0.5 * parts["autoregressive_B"]).mean(), rtol=1e-6, atol=0
    )
    pairs = torch.tensor(given["lengths"]) - 1
    torch.testing.assert_close(
        by_token.detach(),
        (parts["diffusion_B"] * torch.tensor([2.0, 1.0])).sum() / 3
        + 0.5 * (parts["autoregressive_B"] * pairs).sum() / pairs.sum(),
        rtol=1e-6,
        atol=0,
    )
    assert totals["diffusion_tokens"] == parts["diffusion_tokens"]
    assert abs(by_token - by_example) > 1e-3


def test_the_next_token_part_of_four_tokens_by_hand():
    model = randomised_model(tiny_config(), seed=0)
    tokens = torch.tensor([[9, 4, 33, 17, 60, 2]])
    with torch.no_grad():
        _, parts = objective(model, tokens, [1], [5], [[(0, tokens[0, :4])]], [False], autoregressive_weight=1.0)
        states = encoder_states(model, tokens[:, :4])
        capped = 30 * torch.tanh(states @ model.model.decoder.embed_tokens.weight.T / 30)
        chances = capped.softmax(-1)[0]
    by_hand = -torch.stack([chances[i, tokens[0, i + 1]] for i in range(4)]).log().mean()
    torch.testing.assert_close(parts["autoregressive"], by_hand)
    torch.testing.assert_close(head(model, states), capped)


@pytest.mark.parametrize(
    "change",
    [{"reduction": "mean"}, {"vocabulary": 63}, {"lengths": [9, 9]}],
    ids=["unknown reduction", "padded vocabulary", "canvas beyond its row"],
)
def test_what_cannot_be_meant_raises(change):
    model = randomised_model(tiny_config(), seed=0)
    given = example(model) | dict(self_conditioning_mask_B=[False, False], autoregressive_weight=1.0)
    with pytest.raises(ValueError):
        objective(model, **(given | change))
