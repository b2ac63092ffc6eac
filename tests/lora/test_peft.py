"""PEFT's files: the installed peft reads ours onto transformers' model, and we read what it writes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from nemo_diffgemma import DiffusionGemma
from nemo_diffgemma.errors import UserError
from tests.distributed.cases import answer
from tests.distributed.layouts import LAYOUTS
from tests.lora import kit
from tests.parity import questions

WEIGHTS = dict(damp=0.1, sublayers=0.5)


@pytest.fixture(scope="module")
def theirs(reference):
    return reference("base", **WEIGHTS)


@pytest.fixture(scope="module")
def base(checkpoint):
    return checkpoint("base", **WEIGHTS)


def differences(theirs, adapted, ours) -> list[float]:
    """Largest differences of logits, of prompts encoded and canvases denoised, with a signal, and after a canvas."""
    asked = [questions.question(theirs, kind, 9) for kind in ("plain", "signal", "after_1_canvas")]
    with torch.no_grad():
        return [
            float((answer(ours, **one.asked()) - questions.answer(adapted.get_base_model(), one)).abs().max())
            for one in asked
        ]


@pytest.mark.parametrize(
    "keys",
    [
        dict(),
        dict(experts="shared", rslora=True, alpha=3.0),
        dict(experts="none", targets=["q_proj", "*.layers.1.mlp.down_proj"]),
        dict(targets=[], rank=3),
    ],
    ids=["everything", "shared", "some", "experts_alone"],
)
def test_peft_loads_ours_with_equal_logits(single, theirs, base, tmp_path, keys):
    network = kit.adapted(base, kit.group(**keys))
    directory = kit.save(network, tmp_path)
    adapted = kit.by_peft(theirs, directory)
    moved = differences(theirs, adapted, DiffusionGemma.from_checkpoint(base))
    assert max(differences(theirs, adapted, network)) < questions.TOLERANCE < 1e-2 < min(moved)
    again = DiffusionGemma.from_checkpoint(directory)
    assert max(differences(theirs, adapted, again)) < questions.TOLERANCE


# -- what peft has written -------------------------------------------------------------------------------------------

ALL = r".*(encoder\.language_model|decoder)\.(layers\.\d+\.(self_attn|mlp)|self_conditioning)\.\w+_proj"
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
WRITTEN = {
    "everything": dict(target_modules=ALL, target_parameters=EXPERTS),
    "patterns": dict(  # peft takes that of a matrix of experts, and warns that it does not
        target_modules=ALL,
        target_parameters=["experts.down_proj"],
        rank_pattern={"q_proj": 2, r"decoder\.layers\.1\.mlp\.up_proj": 6},
        alpha_pattern={"experts.down_proj": 5, r".*encoder.*o_proj": 1},
    ),
    "decoder_alone": dict(target_modules=r".*decoder\.layers.*\.(q_proj|router\.proj)", use_rslora=True),
    "one_matrix": dict(target_modules=[], target_parameters=["layers.1.experts.gate_up_proj"]),
}


def written_by_peft(theirs, base, directory, **keys):
    """Adapters of transformers' model with random A and B, another for encoder and decoder, and the model."""
    import copy

    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    adapted = get_peft_model(copy.deepcopy(theirs), LoraConfig(**(dict(r=4, lora_alpha=12) | keys))).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.uniform_(-0.1, 0.1)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(str(directory))
    return adapted


@pytest.fixture(scope="module")
def written(theirs, base, tmp_path_factory):
    """`written(name)` -> directory and model of `WRITTEN`."""
    made = {}

    def get(name):
        if name not in made:
            directory = tmp_path_factory.mktemp(name)
            made[name] = directory, written_by_peft(theirs, base, directory, **WRITTEN[name])
        return made[name]

    return get


@pytest.mark.filterwarnings(
    "ignore::UserWarning:peft", "ignore::RuntimeWarning:peft", "ignore::FutureWarning:transformers"
)
@pytest.mark.parametrize("name", WRITTEN)
def test_we_load_what_peft_writes(single, theirs, base, written, name):
    """Encoder and decoder have adapters of their own there, though their weights are one."""
    directory, adapted = written(name)
    moved = differences(theirs, adapted, DiffusionGemma.from_checkpoint(base))
    assert max(differences(theirs, adapted, DiffusionGemma.from_checkpoint(directory))) < questions.TOLERANCE
    assert min(moved) > 1e-2
    network = DiffusionGemma.from_checkpoint(directory)
    with pytest.raises(UserError, match="differ between encoder and decoder"):
        network.merge_adapters()


@pytest.mark.parametrize(("name", "layout"), [("everything", "tp2_ep2"), ("everything", "tp2_etp2_ep2")])
def test_what_peft_writes_in_a_layout(pool, theirs, written, name, layout):
    directory, adapted = written(name)
    asked = [questions.question(theirs, kind, 9) for kind in ("plain", "after_1_canvas")]
    world, axes = LAYOUTS[layout]
    ranks = pool(world).run(
        "tests.lora.cases:logits", path=str(directory), layout=axes, questions=[one.asked() for one in asked]
    )
    with torch.no_grad():
        truth = [questions.answer(adapted.get_base_model(), one) for one in asked]
    for answers in ranks:
        assert max(float((a - b).abs().max()) for a, b in zip(answers, truth, strict=True)) < questions.TOLERANCE


@pytest.mark.parametrize(("form", "layout"), [("each", "tp2_etp2_ep2"), ("shared", "tp2_ep2")])
def test_files_do_not_depend_on_the_layout(pool, single, base, tmp_path, form, layout):
    keys = dict(experts=form)
    kit.save(kit.adapted(base, kit.group(**keys)), tmp_path / "one")
    world, axes = LAYOUTS[layout]
    target = tmp_path / "cut"
    pool(world).run("tests.lora.cases:written", path=str(base), layout=axes, lora=keys, target=str(target))
    assert contents(target) == contents(tmp_path / "one")


def contents(directory):
    """Configuration, fingerprint and every tensor of an adapter."""
    with safe_open(directory / "adapter_model.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key).tolist() for key in file.keys()}  # noqa: SIM118
        return json.loads((directory / "adapter_config.json").read_text()), file.metadata(), tensors
