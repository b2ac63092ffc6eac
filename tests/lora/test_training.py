"""Runs that train adapters, or some of the weights: what they keep, how they go on, and what they refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_diffgemma import DiffusionGemma
from nemo_diffgemma.errors import UserError
from tests.lora import kit
from tests.training import cases


@pytest.fixture(scope="module")
def base(single, tmp_path_factory) -> Path:
    """A checkpoint of a run, of the size that `cases` trains."""
    run = tmp_path_factory.mktemp("base")
    cases.run(str(run), steps=1)
    return run / "checkpoints" / "step-1"


def lora(base: Path, **keys) -> dict:
    return dict(model__checkpoint=str(base), model__lora=kit.group(**keys))


@pytest.fixture(scope="module")
def adapter_run(base, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("adapter")
    cases.run(str(run), steps=2, **lora(base))
    return run


def weights(path: Path) -> dict[str, torch.Tensor]:
    return {name: parameter.clone() for name, parameter in DiffusionGemma.from_checkpoint(path).named_parameters()}


def test_a_checkpoint_holds_adapters_their_state_and_which_base(adapter_run, base):
    from nemo_diffgemma.checkpoint import sharded

    checkpoint = adapter_run / "checkpoints" / "step-2"
    stored, before = weights(checkpoint), weights(base)
    adapters = stored.keys() - before.keys()
    assert all(torch.equal(stored[name], weight) for name, weight in before.items())
    assert {key.split(".", 2)[2] for key in sharded.keys(checkpoint)} == adapters
    assert any(torch.any(stored[name]) for name in adapters if name.endswith(".B"))
    config = json.loads((checkpoint / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert DiffusionGemma.from_checkpoint(checkpoint).lora.fingerprint


@pytest.mark.parametrize(
    ("world", "layout", "keys"),
    [
        (1, {}, dict(experts="each", dropout=0.1)),
        (2, dict(tensor=2, expert=2), dict(experts="each", dropout=0.1)),
        (2, dict(expert=2), dict(experts="shared")),
    ],
    ids=["one", "tp2_ep2", "dp2_ep2"],
)
def test_resume_is_exact(pool, base, tmp_path, world, layout, keys):
    settings = dict(layout=layout, **lora(base, **keys))

    def run(name: str, **more) -> list[dict]:
        arguments = dict(directory=str(tmp_path / name), **settings, **more)
        job = "interrupted_and_resumed" if name == "resumed" else "run"
        if world == 1:
            return getattr(cases, job)(**arguments)
        return pool(world).run(f"tests.training.cases:{job}", **arguments)[0]

    straight, resumed = run("straight", steps=6), run("resumed")
    assert [(a["loss"], a["grad_norm"]) for a in straight] == [(b["loss"], b["grad_norm"]) for b in resumed]
    assert len({line["loss"] for line in straight}) == 6


def test_an_adapter_is_trained_on(adapter_run, tmp_path):
    """As the base of another run: it begins where the adapter is, and its base stays the base."""
    checkpoint = adapter_run / "checkpoints" / "step-2"
    cases.run(str(tmp_path), steps=1, model__checkpoint=str(checkpoint))
    config, before = (
        json.loads((path / "adapter_config.json").read_text()) for path in (tmp_path / "checkpoints/step-1", checkpoint)
    )
    assert config == before


# -- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (dict(rank=0), "model.lora.rank=0; expected 1 or more"),
        (dict(rank=-2), "model.lora.rank=-2; expected 1 or more"),
        (dict(rank=33), "model.lora.rank=33 is more than .* has .* use model.lora.rank=8 or less"),
        (dict(targets=["atention"]), r"'atention' names no linear of this model \(did you mean attention\?\); use"),
        (dict(targets=["*.layers.9.*"]), "names no linear of this model; use attention, mlp, router"),
        (dict(targets=["experts"]), "use model.lora.experts=each or shared"),
        (dict(experts="all"), "model.lora.experts='all'; use one of none, each, shared"),
        (dict(dropout=1.0), "model.lora.dropout=1.0; expected at least 0 and below 1"),
        (dict(alpha=0.0), "model.lora.alpha=0.0; expected more than 0"),
        (dict(targets=[], experts="none"), "leave nothing to adapt"),
    ],
    ids=lambda value: "-".join(f"{k}_{v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_what_cannot_be_is_refused_before_a_step(base, tmp_path, keys, told):
    with pytest.raises(UserError, match=told):
        cases.run(str(tmp_path), steps=1, **lora(base, **keys))
    assert not list(tmp_path.rglob("step-*"))


def test_adapters_need_a_base(single, tmp_path):
    with pytest.raises(UserError, match="without model.checkpoint"):
        cases.run(str(tmp_path), steps=1, model__lora=kit.group())


@pytest.mark.parametrize("keys", [dict(rank=2), dict(alpha=1.0), dict(experts="none")])
def test_a_run_goes_on_with_its_own_adapters_alone(base, adapter_run, tmp_path, keys):
    shutil.copytree(adapter_run, tmp_path / "run")
    with pytest.raises(UserError, match=r"was started with model\.lora"):
        cases.run(str(tmp_path / "run"), steps=3, **lora(base, **keys))


def test_another_base_is_refused_by_its_weights(base, adapter_run, tmp_path):
    """Also where somebody has put other weights in the place of the base."""
    cases.run(str(tmp_path / "other"), steps=1, seed=5)
    other = tmp_path / "other" / "checkpoints" / "step-1"
    adapter = kit.with_base(adapter_run / "checkpoints" / "step-2", tmp_path / "copy", other)
    (adapter / "manifest.json").unlink()
    with pytest.raises(UserError, match="was trained on another base"):
        DiffusionGemma.from_checkpoint(adapter)
    shutil.copytree(adapter_run, tmp_path / "run")
    place = tmp_path / "base"
    shutil.copytree(base, place)
    settings = tmp_path / "run" / "config.yaml"
    settings.write_text(settings.read_text().replace(str(base), str(place)))
    shutil.rmtree(place)
    shutil.copytree(other, place)
    with pytest.raises(UserError, match="was trained on another base"):
        cases.run(str(tmp_path / "run"), steps=3, **lora(place))


def test_another_rank_than_that_of_the_adapter_is_refused(adapter_run, tmp_path):
    checkpoint = adapter_run / "checkpoints" / "step-2"
    with pytest.raises(UserError, match="model.lora.rank=2, but the adapters of model.checkpoint=.* have rank 4"):
        cases.run(str(tmp_path), steps=1, **lora(checkpoint, rank=2))


def test_a_base_that_is_gone_is_named(adapter_run, tmp_path):
    adapter = kit.with_base(adapter_run / "checkpoints" / "step-2", tmp_path / "copy", "/gone")
    (adapter / "manifest.json").unlink()
    with pytest.raises(UserError, match="/gone, does not exist; write its path into base_model_name_or_path of .*copy"):
        DiffusionGemma.from_checkpoint(adapter)


def test_a_damaged_adapter_is_named(adapter_run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(adapter_run / "checkpoints" / "step-2", copy)
    file = copy / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="damaged: adapter_model.safetensors"):
        DiffusionGemma.from_checkpoint(copy)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("use_dora", True, "use_dora=True is no plain LoRA"),
        ("modules_to_save", ["lm_head"], "modules_to_save=.* is no plain LoRA"),
        ("peft_type", "IA3", "peft_type=.*only LORA"),
        ("init_lora_weights", "pissa", "changes the weights of the base"),
        ("lora_alpha", "8", "expected a positive number"),
        ("alpha_pattern", {"(": 1}, "no regular expression"),
        ("base_model_name_or_path", None, "does not say which checkpoint"),
    ],
)
def test_what_is_no_plain_adapter_is_named(adapter_run, tmp_path, key, value, told):
    copy = tmp_path / "copy"
    shutil.copytree(adapter_run / "checkpoints" / "step-2", copy)
    (copy / "manifest.json").unlink()
    config = json.loads((copy / "adapter_config.json").read_text()) | {key: value}
    (copy / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=told):
        DiffusionGemma.from_checkpoint(copy)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda tensors: tensors.pop(next(key for key in tensors if "lora_B" in key)), "but no .*lora_B"),
        (lambda tensors: tensors.update({key: tensors[key] * torch.nan for key in tensors}), "NaN|nan"),
        (lambda tensors: tensors.update({"base_model.model.lm_head.lora_A.weight": torch.ones(4, 32)}), "lm_head"),
        (lambda tensors: tensors.update({key: tensors[key][:, :-1].contiguous() for key in tensors}), "another model"),
    ],
    ids=["half", "not_finite", "head", "shape"],
)
def test_what_the_tensors_lack_is_named(adapter_run, tmp_path, change, told):
    copy = tmp_path / "copy"
    shutil.copytree(adapter_run / "checkpoints" / "step-2", copy)
    (copy / "manifest.json").unlink()
    file = copy / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(UserError, match=told):
        DiffusionGemma.from_checkpoint(copy)
