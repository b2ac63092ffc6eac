"""`model.freeze`: weights by name get no gradient, no state of the optimizer and no change."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nemo_diffgemma import DiffusionGemma, ModelConfig
from nemo_diffgemma.checkpoint import sharded
from nemo_diffgemma.checkpoint.names import released_name
from nemo_diffgemma.errors import UserError
from nemo_diffgemma.lora.targets import frozen_tensors
from tests.training import cases

CONFIG = ModelConfig(**cases.ARCHITECTURE)
GATED = ("gate", "up", "down")


@pytest.mark.parametrize(
    ("patterns", "named"),
    [
        (["router"], {f"layers.{i}.router.{n}" for i in (0, 1) for n in ("proj.weight", "scale", "per_expert_scale")}),
        (["embeddings"], {"embed_tokens.weight"}),
        (["lm_head.weight"], {"embed_tokens.weight"}),
        (["experts"], {f"layers.{i}.experts.{n}_proj" for i in (0, 1) for n in ("gate_up", "down")}),
        (["model.encoder.language_model.layers.1.mlp.*"], {f"layers.1.mlp.{n}_proj.weight" for n in GATED}),
        (["norm.weight", "layers.0.router.scale"], {"norm.weight", "layers.0.router.scale"}),
    ],
)  # fmt: skip
def test_names(patterns, named):
    """Of tied weights any name will do, and they are frozen once."""
    assert frozen_tensors(CONFIG, patterns) == {f"model.decoder.{name}" for name in named}


@pytest.mark.parametrize(
    ("patterns", "told"),
    [
        (["ruoter"], r"'ruoter' names no weight of this model \(did you mean router\?\); use attention, mlp, router"),
        (["*.layers.9.*"], "names no weight of this model"),
        (["router", "layer_scalar"], "'layer_scalar' names no weight"),
        (["*"], "freezes every weight"),
    ],
)
def test_a_pattern_that_names_nothing_is_refused(patterns, told):
    with pytest.raises(UserError, match=told):
        frozen_tensors(CONFIG, patterns)


@pytest.mark.parametrize(
    ("patterns", "layout"),
    [
        (["router", "embeddings"], {}),
        (["experts", "norm.weight"], dict(tensor=2, expert=2)),
        (["layers", "layers.*", "embeddings", "norm.weight"], {}),  # only self-conditioning is trained
    ],
    ids=["router_embeddings", "experts-tp2_ep2", "all_but_self_conditioning"],
)
def test_frozen_weights_stay_and_have_no_state(pool, single, tmp_path, patterns, layout):
    patterns = [pattern for pattern in patterns if pattern != "layers"]
    settings = dict(steps=4, every=2, layout=layout, model__freeze=patterns)
    if layout:
        pool(2).run("tests.training.cases:run", directory=str(tmp_path / "run"), **settings)
    else:
        cases.run(str(tmp_path / "run"), **settings)
    first, last = (weights(tmp_path / "run" / "checkpoints" / f"step-{step}") for step in (2, 4))
    frozen = frozen_tensors(CONFIG, patterns)
    assert {released_name(name) for name in first if torch.equal(first[name], last[name])} == frozen
    keys = sharded.keys(tmp_path / "run" / "checkpoints" / "step-4")
    with_state = {key.split(".", 2)[2] for key in keys if key.startswith("optimizer.")}
    assert with_state == {name for name in first if released_name(name) not in frozen}


def weights(path: Path) -> dict[str, torch.Tensor]:
    return {name: parameter.clone() for name, parameter in DiffusionGemma.from_checkpoint(path).named_parameters()}


def test_frozen_weights_have_no_gradient_buffer(single):
    from nemo_diffgemma.schema import OptimGroup
    from nemo_diffgemma.training import optimizer
    from nemo_diffgemma.training.nemo_model import build_network

    sizes = []
    for patterns in ([], ["experts", "embeddings"]):
        network = build_network(cases.config(model__freeze=patterns).model, seed=0)
        wrapped = optimizer.data_parallel(network, OptimGroup(distributed=False))
        sizes.append(sum(b.grad_data.numel() for b in (*wrapped.buffers, *wrapped.expert_parallel_buffers)))
    frozen = sum(p.numel() for p in network.parameters() if not p.requires_grad)
    assert frozen and sizes[0] - sizes[1] == pytest.approx(frozen, abs=256)  # Megatron pads its buffers


def test_a_frozen_run_is_resumed_exactly(single, tmp_path):
    settings = dict(model__freeze=["embeddings", "experts"])
    straight = cases.run(str(tmp_path / "a"), steps=6, **settings)
    resumed = cases.interrupted_and_resumed(str(tmp_path / "b"), **settings)
    assert [line["loss"] for line in straight] == [line["loss"] for line in resumed]
