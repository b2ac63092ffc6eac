"""config.json: read in either spelling, written so that transformers reads it, refused where it is another model's."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from nemo_diffgemma import DiffusionGemma, ModelConfig
from nemo_diffgemma.config import GLOBAL, SLIDING, ConfigError, HeadSizes
from nemo_diffgemma.model.rotary import inverse_frequencies
from tests.reference import SIZES, save_released_layout

RELEASED = {  # text_config of google/diffusiongemma-26B-A4B-it, as far as it concerns the network
    "vocab_size": 262144,
    "hidden_size": 2816,
    "intermediate_size": 2112,
    "num_hidden_layers": 30,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "num_global_key_value_heads": 2,
    "global_head_dim": 512,
    "num_experts": 128,
    "top_k_experts": 8,
    "moe_intermediate_size": 704,
    "sliding_window": 1024,
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-6,
    "final_logit_softcapping": 30.0,
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "use_bidirectional_attention": "vision",
    "tie_word_embeddings": True,
    "layer_types": [GLOBAL if i % 6 == 5 else SLIDING for i in range(30)],
}
TOP = {"model_type": "diffusion_gemma", "canvas_length": 256, "text_config": RELEASED}


def changed(**text) -> dict:
    raw = copy.deepcopy(TOP)
    raw["text_config"] |= text
    return raw


def test_the_released_configuration_is_the_default():
    assert ModelConfig.from_huggingface(TOP) == ModelConfig()


@pytest.mark.parametrize("size", SIZES)
def test_both_spellings_of_the_global_heads_are_one_configuration(reference, tmp_path, size):
    """The released file has two fields; transformers writes per_layer_config, less what equals text_config's own."""
    read = {}
    for flat in (True, False):
        save_released_layout(reference(size), tmp_path / str(flat), flat_per_layer_config=flat)
        read[flat] = ModelConfig.from_pretrained(tmp_path / str(flat))
    assert read[True] == read[False]
    sizes = SIZES[size]
    assert read[True].heads(len(sizes["layer_types"]) - 1) == (
        sizes["global_head_dim"],
        sizes["num_global_key_value_heads"],
    )
    assert read[True].heads(0) == HeadSizes(sizes["head_dim"], sizes["num_key_value_heads"])
    for name in set(sizes) - {"layer_types"}:
        assert getattr(read[True], name) == sizes[name], name
    assert read[True].layer_types == sizes["layer_types"]


def test_per_layer_config_is_sparse():
    """A key that is left out has text_config's value."""
    text = {k: v for k, v in RELEASED.items() if k not in ("num_global_key_value_heads", "global_head_dim")}
    globals_ = [i for i in range(30) if i % 6 == 5]
    for entry, heads in (
        ({"head_dim": 512}, HeadSizes(512, 8)),
        ({"num_key_value_heads": 2}, HeadSizes(256, 2)),
        ({"head_dim": 512, "num_key_value_heads": 2}, HeadSizes(512, 2)),
    ):
        raw = dict(TOP, text_config=text | {"per_layer_config": {str(i): entry for i in globals_}})
        assert ModelConfig.from_huggingface(raw).heads(5) == heads


def test_what_was_read_is_written_back_untouched(checkpoint):
    raw = json.loads((checkpoint("base") / "config.json").read_text())
    config = ModelConfig.from_pretrained(checkpoint("base"))
    assert config.to_huggingface() == raw
    assert ModelConfig.from_huggingface(config.to_huggingface()) == config


@pytest.mark.parametrize("size", [*SIZES, "released"])
def test_a_new_configuration_means_the_same_to_transformers(reference, checkpoint, size):
    """Written from scratch: every field that shapes the network arrives, and comes back."""
    from transformers.models.diffusion_gemma import DiffusionGemmaConfig

    config = ModelConfig() if size == "released" else ModelConfig.from_pretrained(checkpoint(size))
    fresh = dataclasses.replace(config, source=None)
    written = json.loads(json.dumps(fresh.to_huggingface()))
    assert ModelConfig.from_huggingface(written) == fresh
    theirs = DiffusionGemmaConfig(**written)
    text = theirs.text_config
    for name in (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
        "num_experts top_k_experts moe_intermediate_size sliding_window rms_norm_eps pad_token_id bos_token_id"
    ).split():
        assert getattr(text, name) == getattr(fresh, name), name
    assert tuple(text.layer_types) == fresh.layer_types and theirs.canvas_length == fresh.canvas_length
    for layer in range(fresh.num_hidden_layers):
        of_layer = text.per_layer_config[layer]
        assert (of_layer.head_dim, of_layer.num_key_value_heads) == fresh.heads(layer)
    assert text.rope_parameters[GLOBAL]["partial_rotary_factor"] == fresh.global_partial_rotary_factor
    assert text.rope_parameters[GLOBAL]["rope_theta"] == fresh.global_rope_theta
    assert text.rope_parameters[SLIDING]["rope_theta"] == fresh.rope_theta


def test_the_last_layer_is_global_whatever_is_said():
    config = ModelConfig(num_hidden_layers=3, layer_types=(SLIDING, SLIDING, SLIDING))
    assert config.layer_types == (SLIDING, SLIDING, GLOBAL)


@pytest.mark.parametrize(("vocabulary", "padded"), [(61, 128), (128, 128), (129, 256), (262_144, 262_144)])
def test_the_vocabulary_is_padded_to_128_in_every_layout(vocabulary, padded):
    assert ModelConfig(vocab_size=vocabulary).padded_vocab_size == padded


def test_the_released_sizes_make_the_released_number_of_parameters(single):
    """25.25 billion, part by part, as transformers counts them on a meta device (nothing is allocated here either)."""
    with FakeTensorMode():
        model = DiffusionGemma(ModelConfig(), torch.bfloat16)
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = ".".join(name.split(".")[:2]) if name.startswith("layers.") else name.split(".")[0]
        counts[part] = counts.get(part, 0) + parameter.numel()
    assert counts["embed_tokens"] == 738_197_504
    assert counts["self_conditioning"] == 17_844_992
    assert counts["norm"] == 2816
    assert {counts[f"layers.{i}"] for i in range(30) if i % 6 != 5} == {814_094_976}
    assert {counts[f"layers.{i}"] for i in range(30) if i % 6 == 5} == {828_513_408}
    assert sum(counts.values()) == 25_250_986_752


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention_bias", True),
        ("attention_dropout", 0.1),
        ("attn_logit_softcapping", 50.0),
        ("hidden_activation", "silu"),
        ("hidden_size_per_layer_input", 256),
        ("num_kv_shared_layers", 10),
        ("tie_word_embeddings", False),
        ("use_bidirectional_attention", "all"),
        ("use_double_wide_mlp", True),
    ],
)
def test_features_of_the_rest_of_the_family(key, value):
    """In the text configuration or above it."""
    for raw in (changed(**{key: value}), TOP | {key: value}):
        with pytest.raises(ConfigError) as raised:
            ModelConfig.from_huggingface(raw)
        assert f"sets {key}={value!r}, which DiffusionGemma does not have" in str(raised.value)
        assert "another member of the Gemma 4 family" in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (dict(num_hidden_layers=29), "layer_types names 30 layers but num_hidden_layers=29; list one kind for each"),
        (
            dict(layer_types=["chunked_attention"] * 30),
            "layer_types has ['chunked_attention']; use 'sliding_attention'",
        ),
        (dict(num_key_value_heads=3), "num_key_value_heads=3 does not divide num_attention_heads=16"),
        (dict(top_k_experts=129), "top_k_experts=129 is larger than num_experts=128"),
        (dict(head_dim=255), "head_dim=255 must be even"),
        (dict(hidden_size=2815), "hidden_size=2815 must be a multiple of 8"),
        (dict(vocab_size=0), "vocab_size=0 must be a positive whole number"),
        (dict(sliding_window="1024"), "sliding_window='1024' must be a positive whole number"),
        (dict(num_experts=None), "text_config lacks num_experts; add them to config.json"),
        (
            dict(rope_parameters={GLOBAL: {"rope_type": "yarn"}}),
            "rope_parameters.full_attention.rope_type='yarn' is not supported; expected 'proportional'",
        ),
        (dict(per_layer_config={"0": {"head_dim": 64}}), "per_layer_config gives sliding layer 0 other head sizes"),
        (dict(per_layer_config={"5": {"head_dim": 512}}), "per_layer_config gives the global layers different head"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_sizes_that_cannot_be(text, message):
    with pytest.raises(ConfigError) as raised:
        ModelConfig.from_huggingface(changed(**text))
    assert message in str(raised.value) and "\n" not in str(raised.value)


# -- every key is used, or has its one value, or is refused ------------------------------------------------------------

SMALL = {
    "model_type": "diffusion_gemma",
    "canvas_length": 4,
    "vision_config": {"model_type": "gemma4_vision"},
    "text_config": RELEASED
    | {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "layer_types": [SLIDING, SLIDING, GLOBAL]}
    | {
        "rope_parameters": {
            SLIDING: {"rope_type": "default", "rope_theta": 1e4},
            GLOBAL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
        }
    },
}
DELETE = "(delete)"
ROPE = ("text_config", "rope_parameters")
KEYS = (
    *((name,) for name in ("canvas_length", "text_config", "tie_word_embeddings", "quantization_config", "model_type")),
    *(("text_config", name) for name in (*RELEASED, "rope_parameters", "per_layer_config", "pad_token_id")),
    *(("text_config", name) for name in ("eos_token_id", "bos_token_id", "initializer_range", "rope_theta")),
    *(("text_config", name) for name in ("rope_local_base_freq", "rope_scaling", "partial_rotary_factor")),
    *(("text_config", name) for name in ("attention_k_eq_v", "enable_moe_block", "num_experts_per_tok")),
    *((*ROPE, kind) for kind in (SLIDING, GLOBAL)),
    *(
        (*ROPE, kind, name)
        for kind in (SLIDING, GLOBAL)
        for name in ("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "attention_factor")
    ),
)
VALUES = (
    *(DELETE, None, True, False, 0, -1, 1, 2, 3, 8, 64, 10**30, 0.0, 0.25, 0.5, 1.0, 8.0, 1e4, 1e400, float("nan")),
    *("", "8", "linear", "yarn", "default", "proportional", "all", "vision", [], [1], [SLIDING] * 3, [[]], {}),
    *({"rope_type": "default", "rope_theta": 1e4}, {"2": {"head_dim": 16}}, {"2": {"sliding_window": 4}}, {"x": 1}),
)


def facts_of_theirs(raw: dict) -> dict:
    """What transformers makes of a configuration, as far as the text network depends on it."""
    from transformers.models.diffusion_gemma import DiffusionGemmaConfig
    from transformers.models.diffusion_gemma.modeling_diffusion_gemma import DiffusionGemmaTextRotaryEmbedding

    config = DiffusionGemmaConfig(**raw)
    text = config.text_config
    rotary = DiffusionGemmaTextRotaryEmbedding(text)
    return {
        **{name: getattr(text, name) for name in SAME_NAMES},
        "canvas_length": config.canvas_length,
        "layer_types": tuple(text.layer_types),
        "heads": [
            (text.per_layer_config[i].head_dim, text.per_layer_config[i].num_key_value_heads)
            for i in range(text.num_hidden_layers)
        ],
        "frequencies": {kind: getattr(rotary, f"{kind}_inv_freq").tolist() for kind in set(text.layer_types)},
    }


SAME_NAMES = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_experts top_k_experts "
    "moe_intermediate_size sliding_window rms_norm_eps final_logit_softcapping pad_token_id eos_token_id"
).split()


def facts_of_ours(config: ModelConfig) -> dict:
    return {
        **{name: getattr(config, name) for name in SAME_NAMES},
        "eos_token_id": list(config.eos_token_id) if isinstance(config.eos_token_id, tuple) else config.eos_token_id,
        "canvas_length": config.canvas_length,
        "layer_types": config.layer_types,
        "heads": [tuple(config.heads(i)) for i in range(config.num_hidden_layers)],
        "frequencies": {
            kind: inverse_frequencies(config, kind, torch.device("cpu")).tolist() for kind in set(config.layer_types)
        },
    }


@settings(max_examples=150)
@given(changes=st.lists(st.tuples(st.sampled_from(KEYS), st.sampled_from(VALUES)), min_size=1, max_size=2))
@example([((*ROPE, GLOBAL, "factor"), 8.0)])
@example([((*ROPE, GLOBAL, "partial_rotary_factor"), DELETE)])
@example([(("text_config", "rope_parameters"), DELETE)])
@example([(("text_config", "rope_parameters"), DELETE), (("text_config", "rope_theta"), 1e4)])
@example([(("text_config", "rope_parameters"), {"rope_type": "default", "rope_theta": 1e4})])
@example([(("canvas_length",), 0)])
@example([(("text_config", "per_layer_config"), {"2": {"head_dim": 16}})])
def test_a_changed_key_means_what_it_means_to_transformers_or_is_refused(changes):
    raw = copy.deepcopy(SMALL)
    for path, value in changes:
        at = raw
        for key in path[:-1]:
            at = at.get(key) if isinstance(at, dict) else None
        if not isinstance(at, dict):
            continue
        if value == DELETE:
            at.pop(path[-1], None)
        else:
            at[path[-1]] = copy.deepcopy(value)
    try:
        ours = ModelConfig.from_huggingface(copy.deepcopy(raw))
    except ConfigError as error:
        assert "\n" not in str(error) and len(str(error)) < 600
        return
    try:
        theirs = facts_of_theirs(copy.deepcopy(raw))
    except Exception:  # stricter than we are: `rms_norm_eps: 1` is no float
        return
    assert json.dumps(facts_of_ours(ours)) == json.dumps(theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(rope_theta=5e5), "text_config sets rope_theta=500000.0, which DiffusionGemma does not read"),
        (dict(rope_local_base_freq=1e5), "text_config sets rope_local_base_freq=100000.0"),
        (dict(rope_scaling={"factor": 8.0, "rope_type": "linear"}), "text_config sets rope_scaling={'factor': 8.0"),
        (dict(rope_parameters={"rope_type": "default"}), "is not nested by layer kind; write one entry each"),
        (
            dict(rope_parameters={GLOBAL: {"rope_type": "proportional", "rope_theta": 1e6, "factor": 8.0}}),
            "rope_parameters.full_attention.factor=8.0 is not supported; expected 1.0 or no such key",
        ),
        (dict(final_logit_softcapping=None), "final_logit_softcapping=None must be a positive number"),
        (dict(quantization_config={"quant_method": "fp8"}), "this checkpoint is quantised, and only float32"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_is_not_honoured_is_refused_by_name(change, message):
    with pytest.raises(ConfigError) as raised:
        ModelConfig.from_huggingface(changed(**change))
    assert message in str(raised.value)


def test_gemma_3s_keys_that_say_the_same_are_read():
    same = ModelConfig.from_huggingface(changed(rope_theta=1e6, rope_local_base_freq=1e4, rope_scaling=None))
    assert same == ModelConfig()


BROKEN = {
    "cut off": (b'{"model_type": "diffusion_gemma", "text_conf', "is not valid JSON"),
    "empty": (b"", "is not valid JSON"),
    "latin-1": ('{"model_type": "caf\u00e9"}'.encode("latin-1"), "is not UTF-8 text"),
    "a list": (b"[1, 2]", "is damaged: it holds [1, 2], expected a JSON object"),
    "null": (b"null", "is damaged: it holds None"),
    "a number of 5000 digits": (b'{"model_type": ' + b"9" * 5000 + b"}", "is not valid JSON"),
    "100000 brackets": (b"[" * 100_000, "is not valid JSON"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_damaged_config_is_named(tmp_path, name):
    content, message = BROKEN[name]
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError) as raised:
        ModelConfig.from_pretrained(tmp_path)
    assert str(raised.value).startswith(f"{tmp_path / 'config.json'} {message}")
    assert "copy it again from the checkpoint" in str(raised.value) and len(str(raised.value)) < 500


def test_a_wrong_value_is_named_with_its_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(changed(sliding_window="1024")))
    with pytest.raises(ConfigError) as raised:
        ModelConfig.from_pretrained(tmp_path)
    assert str(raised.value) == f"{tmp_path / 'config.json'}: sliding_window='1024' must be a positive whole number"


def test_another_architecture():
    with pytest.raises(ConfigError, match="describes model_type='gemma4' with a text_config; expected model_type"):
        ModelConfig.from_huggingface(dict(TOP, model_type="gemma4"))
    with pytest.raises(ConfigError, match="describes model_type='llama' without a text_config"):
        ModelConfig.from_huggingface({"model_type": "llama"})


def test_no_file_or_a_broken_one(tmp_path):
    with pytest.raises(ConfigError, match="has no config.json; give a directory in the released Hugging Face format"):
        ModelConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(ConfigError, match="config.json is not valid JSON .*; copy it again from the checkpoint"):
        ModelConfig.from_pretrained(tmp_path)
