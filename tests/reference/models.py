"""Tiny DiffusionGemma models of transformers with nothing left at its initial value, and the released layout on disk.

A fresh transformers model has every norm weight, router scale, expert scale and layer scalar equal to 1, where a wrong
norm convention or a dropped scale cannot be seen; `randomised_model` moves all of them, and the two layer-scalar copies
apart.

    model = randomised_model(tiny_config("deep"), seed=0)
    save_released_layout(model, path, shards=3)
"""

import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers.models.diffusion_gemma import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    DiffusionGemmaGenerationConfig,
    EntropyBoundSamplerConfig,
)

SLIDING, FULL = "sliding_attention", "full_attention"

_BASE = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    layer_types=(SLIDING, SLIDING, FULL),
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_global_key_value_heads=2,
    global_head_dim=32,
    sliding_window=8,
    num_experts=8,
    top_k_experts=2,
    moe_intermediate_size=24,
    canvas_length=4,
)

SIZES: dict[str, dict] = {
    "base": _BASE,
    "short": _BASE | dict(layer_types=(SLIDING, FULL)),
    "one_global_kv": _BASE | dict(num_global_key_value_heads=1, layer_types=(SLIDING, FULL)),
    "odd_vocab": _BASE | dict(vocab_size=61, layer_types=(SLIDING, FULL), num_attention_heads=8),
    "deep": _BASE
    | dict(
        layer_types=(SLIDING, SLIDING, FULL, SLIDING, SLIDING, SLIDING, FULL),
        num_attention_heads=8,
        num_key_value_heads=4,
        num_experts=16,
        top_k_experts=4,
        moe_intermediate_size=20,
    ),
    "bigger_canvas": _BASE | dict(sliding_window=12, canvas_length=16),
}
"""Query heads, widths and experts divide by 4, so that every size can be split four ways."""


def tiny_config(size: str | dict = "base", **overrides) -> DiffusionGemmaConfig:
    """A size by name, or "base" with some of its keys replaced: `tiny_config("deep")`, `tiny_config({"sliding_window":
    5})`.

    The keys are those of `text_config`, and `canvas_length`; the number of layers follows `layer_types`.
    """
    keys = (SIZES[size] if isinstance(size, str) else SIZES["base"] | size) | overrides
    text = {key: value for key, value in keys.items() if key != "canvas_length"}
    text["layer_types"] = list(text["layer_types"])
    text |= dict(
        num_hidden_layers=len(text["layer_types"]),
        use_bidirectional_attention="vision",
        max_position_embeddings=512,
        final_logit_softcapping=30.0,
        rope_parameters={
            SLIDING: {"rope_type": "default", "rope_theta": 1e4},
            FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
        },
    )
    vision = dict(
        model_type="gemma4_vision",
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        patch_size=4,
        pooling_kernel_size=3,
        position_embedding_size=16,
    )
    vocabulary = text["vocab_size"]
    config = DiffusionGemmaConfig(
        text_config=text,
        vision_config=vision,
        canvas_length=keys["canvas_length"],
        boi_token_id=vocabulary - 4,
        eoi_token_id=vocabulary - 3,
        image_token_id=vocabulary - 2,
    )
    config._attn_implementation = "sdpa"  # eager attention cannot `generate` with padding in 5.23.0
    return config


@torch.no_grad()
def randomised_model(
    config: DiffusionGemmaConfig, seed: int, damp_self_conditioning: float = 1.0, damp_sublayers: float = 1.0
) -> DiffusionGemmaForBlockDiffusion:
    """A model in eval mode whose weights depend on `seed` alone; torch's global generator is left as it was.

    Matrices and experts: normal with standard deviation fan_in^-1/2. Vectors: 1 + 0.3 normal. Layer scalars: 0.7 + 0.04
    i in the encoder and 0.72 + 0.04 i in the decoder. `damp_self_conditioning` scales `self_conditioning.down_proj`: at
    1 a random model amplifies a rounding error from step to step until tokens flip, at 0.1 it mostly does not.
    `damp_sublayers` scales the norms behind attention and feed-forward: the smaller, the more a canvas predicts itself,
    so that canvases become stable and stop.
    """
    with torch.random.fork_rng(devices=[]):
        model = DiffusionGemmaForBlockDiffusion(config).eval()
    model.set_experts_implementation("eager")  # the plain loop over experts; the default is grouped_mm
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1 + 0.3 * noise if parameter.ndim == 1 else noise * parameter.shape[-1] ** -0.5)
    decoder = model.model.decoder
    decoder.self_conditioning.down_proj.weight.mul_(damp_self_conditioning)
    for i, (encoding, denoising) in enumerate(
        zip(model.model.encoder.language_model.layers, decoder.layers, strict=True)
    ):
        denoising.post_attention_layernorm.weight.mul_(damp_sublayers)  # shared with the encoder
        denoising.post_feedforward_layernorm.weight.mul_(damp_sublayers)
        encoding.layer_scalar.fill_(0.7 + 0.04 * i)
        denoising.layer_scalar.fill_(0.72 + 0.04 * i)
    return model


def save_released_layout(
    model: DiffusionGemmaForBlockDiffusion, path: str | Path, shards: int = 1, flat_per_layer_config: bool = True
) -> None:
    """Write `path` as the released checkpoint lies on disk; tensor names are those of `save_pretrained`.

    config.json, generation_config.json, model-0000i-of-0000n.safetensors and model.safetensors.index.json. With
    `flat_per_layer_config` the global layers' sizes are `num_global_key_value_heads` and `global_head_dim` in
    text_config, as in the released file; without it they are the `per_layer_config` that `save_pretrained` writes
    instead.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch, max_shard_size="100GB")
        tensors = load_file(Path(scratch) / "model.safetensors")
        shutil.copy(Path(scratch) / "config.json", path / "config.json")

    names, weight_map = list(tensors), {}
    if not 1 <= shards <= len(names):
        raise ValueError(f"shards={shards} for {len(names)} tensors; use 1 to {len(names)}")
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        save_file({name: tensors[name] for name in part}, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))

    if flat_per_layer_config:
        config = json.loads((path / "config.json").read_text())
        text = config["text_config"]
        layers = text.pop("per_layer_config")
        (of_global,) = {json.dumps(layer, sort_keys=True) for layer in layers.values()}  # all global layers are alike
        of_global = json.loads(of_global)
        text["global_head_dim"] = of_global["head_dim"]
        # transformers leaves out of a layer's entry what equals the field of text_config
        text["num_global_key_value_heads"] = of_global.get("num_key_value_heads", text["num_key_value_heads"])
        (path / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True))

    DiffusionGemmaGenerationConfig(  # the released values; 3 and 5 stand in for end-of-turn and tool-response
        max_new_tokens=256,
        max_denoising_steps=48,
        sampler_config=EntropyBoundSamplerConfig(entropy_bound=0.1),
        t_min=0.4,
        t_max=0.8,
        stability_threshold=1,
        confidence_threshold=0.005,
        bos_token_id=2,
        eos_token_id=[1, 3, 5],
        pad_token_id=0,
    ).save_pretrained(path)
