"""A checkpoint that holds NaN or infinity in the text model is refused by the tensor's name, in every format."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from export.graph.weights import WeightsError, engine_weights, read_weights
from nemo_diffgemma import DiffusionGemma, ModelConfig
from nemo_diffgemma.checkpoint.open import save_network
from nemo_diffgemma.checkpoint.tensor_files import CheckpointError
from nemo_diffgemma.parallel import ParallelLayout

BAD = (float("nan"), float("inf"), float("-inf"))


@pytest.fixture
def damaged(checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[[str, float], Path]:
    """`damaged(tensor, value)` -> a copy of a checkpoint, one entry of a tensor set to a value."""
    shutil.copytree(checkpoint("odd_vocab", shards=1), tmp_path / "copy")
    (file,) = (tmp_path / "copy").glob("*.safetensors")
    tensors = load_file(file)

    def damage(name: str, value: float) -> Path:
        changed = {**tensors, name: tensors[name].clone()}
        changed[name].view(-1)[-1] = value
        save_file(changed, file, metadata={"format": "pt"})
        return file.parent

    damage.names = sorted(name for name in tensors if "vision" not in name)  # type: ignore[attr-defined]
    return damage


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), value=st.sampled_from(BAD))
def test_any_tensor_is_refused_by_its_name(single, damaged, data, value):
    name = data.draw(st.sampled_from(damaged.names), label="tensor")
    with pytest.raises(CheckpointError, match=f"{name} holds NaN or infinity in 1 of its .* the checkpoint is damaged"):
        DiffusionGemma.from_huggingface(damaged(name, value))


@pytest.mark.parametrize("format", ["sharded", "nemo"])
def test_other_formats_too(single, checkpoint, tmp_path, format):
    network = DiffusionGemma.from_huggingface(checkpoint("odd_vocab"))
    network.layers[1].self_attn.q_proj.weight.data[0, 0] = torch.nan  # an attention kernel makes zeros of it
    target = tmp_path / ("model.nemo" if format == "nemo" else "sharded")
    save_network(network, target, format)
    with pytest.raises(CheckpointError, match="layers.1.self_attn.q_proj.weight holds NaN"):
        DiffusionGemma.from_checkpoint(target)


def test_engines_take_no_such_weights(damaged):
    directory = damaged("model.decoder.layers.0.mlp.down_proj.weight", torch.inf)
    weights = engine_weights(ModelConfig.from_pretrained(directory), ParallelLayout())
    with pytest.raises(WeightsError, match="mlp.down_proj.weight in .* holds NaN or infinity as torch.float32"):
        list(read_weights(directory, weights, 0, torch.float32))


def test_nor_weights_that_their_type_cannot_hold(damaged):
    directory = damaged("model.decoder.layers.0.mlp.down_proj.weight", 1e6)
    weights = engine_weights(ModelConfig.from_pretrained(directory), ParallelLayout())
    assert list(read_weights(directory, weights, 0, torch.bfloat16))
    with pytest.raises(WeightsError, match="as torch.float16: .* too large for this type; use .* dtype=bfloat16"):
        list(read_weights(directory, weights, 0, torch.float16))
