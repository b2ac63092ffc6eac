"""Checkpoints for Edge-LLM: complete, and taken by its own exporter."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from export.build import BuildConfig, build
from export.bundle.edge_llm import EdgeLlmError, write_checkpoint
from export.bundle.format import BundleError
from export.graph.weights import WeightsError
from nemo_diffgemma import DiffusionGemma
from nemo_diffgemma.data import build_tokenizer
from tests.export.test_bundle import Shown

VERSION = "0.11.0"


@pytest.fixture
def source(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A tiny released-format directory with a tokenizer and no chat template."""
    directory = Path(shutil.copytree(checkpoint("bigger_canvas"), tmp_path / "source"))
    build_tokenizer().save_pretrained(directory)
    return directory


def read(directory: Path, name: str) -> Any:
    return json.loads((directory / name).read_text())


def edit(directory: Path, name: str, **changes: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    content = {key: value for key, value in (read(directory, name) | changes).items() if value is not None}
    (directory / name).write_text(json.dumps(content))


def test_settings_that_the_exporter_reads_are_never_null(source: Path, tmp_path: Path) -> None:
    (source / "generation_config.json").write_text(
        json.dumps(dict(t_max=0.7, max_denoising_steps=None, sampler_config=None, max_new_tokens=99))
    )
    write_checkpoint(source, tmp_path / "edge")
    written = read(tmp_path / "edge", "generation_config.json")
    assert written["max_denoising_steps"] == 48
    assert (written["t_min"], written["t_max"], written["max_new_tokens"]) == (0.4, 0.7, 99)
    assert written["sampler_config"] == {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.1}
    assert read(source, "generation_config.json")["max_denoising_steps"] is None, "the source was changed"


def test_settings_of_the_checkpoint_are_kept(source: Path, tmp_path: Path) -> None:
    edit(source, "generation_config.json", sampler_config={"entropy_bound": 0.3}, stability_threshold=2)
    write_checkpoint(source, tmp_path / "edge")
    before, after = (read(place, "generation_config.json") for place in (source, tmp_path / "edge"))
    assert after["sampler_config"]["entropy_bound"] == 0.3
    assert {key: after[key] for key in before if key != "sampler_config"} == {
        key: value for key, value in before.items() if key != "sampler_config"
    }


def test_a_vision_configuration_is_added_only_where_there_is_none(source: Path, tmp_path: Path) -> None:
    write_checkpoint(source, tmp_path / "with")
    assert read(tmp_path / "with", "config.json") == read(source, "config.json")
    edit(source, "config.json", vision_config=None)
    write_checkpoint(source, tmp_path / "without")
    added = read(tmp_path / "without", "config.json")
    assert added.pop("vision_config")["model_type"] == "gemma4_vision"
    assert added == read(source, "config.json")


def test_a_template_of_the_checkpoint_is_not_replaced(source: Path, tmp_path: Path) -> None:
    write_checkpoint(source, tmp_path / "plain")
    assert "message['content']" in (tmp_path / "plain" / "chat_template.jinja").read_text()
    edit(source, "tokenizer_config.json", chat_template="{{ messages[0].content }}!")
    write_checkpoint(source, tmp_path / "inside")
    assert not (tmp_path / "inside" / "chat_template.jinja").exists()
    (source / "chat_template.jinja").write_text("mine")
    write_checkpoint(source, tmp_path / "beside")
    assert (tmp_path / "beside" / "chat_template.jinja").read_text() == "mine"


def test_only_tensors_are_links_and_it_is_still_the_model(source: Path, tmp_path: Path, single: None) -> None:
    write_checkpoint(source, tmp_path / "edge")
    for file in source.glob("*.safetensors"):
        assert os.path.samefile(file, tmp_path / "edge" / file.name)
    # whoever edits the template here must not edit the checkpoint's
    assert not os.path.samefile(source / "tokenizer_config.json", tmp_path / "edge" / "tokenizer_config.json")
    DiffusionGemma.from_huggingface(tmp_path / "edge")  # raises where a tensor is missing


def test_the_command_writes_what_the_function_does(source: Path, tmp_path: Path) -> None:
    write_checkpoint(source, tmp_path / "edge")
    config = BuildConfig(checkpoint=str(source), out=str(tmp_path / "built"), builder="edge_llm")
    assert build(config, Shown()) == {"bundle": config.out, "graphs": {}}  # type: ignore[arg-type]
    expected, found = (
        {file.name: file.read_bytes() for file in place.iterdir()} for place in (tmp_path / "edge", tmp_path / "built")
    )
    assert found == expected


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_without_a_tokenizer_nothing_is_written(source: Path, tmp_path: Path, name: str) -> None:
    (source / name).unlink()
    with pytest.raises(EdgeLlmError, match=f"has no {name}.*copy the tokenizer's files"):
        write_checkpoint(source, tmp_path / "edge")
    assert list(tmp_path.iterdir()) == [source]


def test_a_canvas_that_the_exporter_cannot_trace_is_refused(source: Path, tmp_path: Path) -> None:
    edit(source, "config.json", canvas_length=7)
    with pytest.raises(EdgeLlmError, match="canvas_length=7; Edge-LLM's exporter takes 8 or more"):
        write_checkpoint(source, tmp_path / "edge")


def test_missing_tensors_and_a_full_target_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="exists and is not empty"):
        write_checkpoint(source, source)
    for file in source.glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(WeightsError):
        write_checkpoint(source, tmp_path / "edge")
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_exporter_takes_it(source: Path, tmp_path: Path) -> None:
    """Installs Edge-LLM into an environment of its own (0.2 GB and torch) and exports the model with it."""
    write_checkpoint(source, tmp_path / "edge")
    environment = tmp_path / "environment"
    python = shutil.which("python3.11") or sys.executable
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}

    def run(*command: str | Path) -> None:
        done = subprocess.run(command, capture_output=True, text=True, env=clean, cwd=tmp_path)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    run(python, "-m", "venv", environment)
    run(environment / "bin" / "pip", "install", "-q", f"tensorrt-edgellm[export]=={VERSION}")
    run(environment / "bin" / "tensorrt-edgellm-export", tmp_path / "edge", tmp_path / "out", "--skip-visual")

    import onnx

    written = read(tmp_path / "out" / "dllm", "config.json")
    assert written["engine_role"] == "dllm"
    diffusion, text = written["diffusion_config"], read(source, "config.json")["text_config"]
    assert diffusion["canvas_length"] == read(source, "config.json")["canvas_length"]
    assert (diffusion["max_denoising_steps"], diffusion["entropy_bound"], diffusion["t_min"]) == (48, 0.1, 0.4)
    assert written["num_hidden_layers"] == len(text["layer_types"])
    graph = onnx.load(tmp_path / "out" / "dllm" / "model.onnx", load_external_data=False).graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("AttentionPlugin") == len(text["layer_types"])
    table = load_file(tmp_path / "out" / "dllm" / "embedding.safetensors")
    assert [tuple(tensor.shape) for tensor in table.values()] == [(text["vocab_size"], text["hidden_size"])]
