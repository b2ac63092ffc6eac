"""The TensorRT adapter with the real TensorRT-RTX on small graphs.

TensorRT-RTX builds without a GPU. Engines are never compared by their bytes: two builds of one graph differ.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.engine.builders import BuilderError, build_engine, check_target, inspect_network, load_module
from export.engine.engine import EngineError
from export.engine.tensorrt_session import _deserialize
from nemo_diffgemma.cli.child_process import call_in_child

FLOAT, HALF, BF16, FP8, INT64 = (
    getattr(TensorProto, name) for name in ("FLOAT", "FLOAT16", "BFLOAT16", "FLOAT8E4M3FN", "INT64")
)
BATCH = {"batch": (1, 2, 8)}
RTX = "tensorrt_rtx"


@pytest.fixture(scope="module", autouse=True)
def tensorrt_rtx() -> None:
    pytest.importorskip(
        RTX, reason="TensorRT-RTX is not installed (pip install tensorrt-rtx-cu13)", exc_type=ImportError
    )


def save(path: Path, nodes, inputs, outputs, weights=(), external=False) -> Path:
    values = [
        [helper.make_tensor_value_info(*value) for value in values] for values in (inputs, outputs)
    ]  # (name, dtype, shape)
    graph = helper.make_graph(nodes, "graph", *values, list(weights))
    opsets = [helper.make_opsetid("", 22), helper.make_opsetid("trt", 1)]
    onnx.save(
        helper.make_model(graph, opset_imports=opsets, ir_version=10),
        path,
        save_as_external_data=external,
        location="weights.bin" if external else None,
        size_threshold=0,
    )
    return path


def product(path: Path, dtype=FLOAT, external=False) -> Path:
    """[batch, 4] @ [4, 3], the matrix an input; with `external` a constant that lies in another file."""
    inputs = [("x", dtype, ["batch", 4]), ("w", dtype, [4, 3])]
    weights = [numpy_helper.from_array(np.ones((4, 3), np.float32), "w")] if external else []
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    return save(path, nodes, inputs[: 1 if external else 2], [("y", dtype, ["batch", 3])], weights, external)


def loop(path: Path) -> Path:
    """x @ w, as often as the stack is long."""
    body = helper.make_graph(
        [
            helper.make_node("Gather", ["stack", "i"], ["added"], axis=0),
            helper.make_node("MatMul", ["carried", "w"], ["turned"]),
            helper.make_node("Add", ["turned", "added"], ["next"]),
            helper.make_node("Identity", ["on"], ["still"]),
        ],
        "body",
        [
            helper.make_tensor_value_info(*value)
            for value in (("i", INT64, []), ("on", TensorProto.BOOL, []), ("carried", FLOAT, ["batch", 4]))
        ],
        [
            helper.make_tensor_value_info(*value)
            for value in (("still", TensorProto.BOOL, []), ("next", FLOAT, ["batch", 4]))
        ],
    )
    nodes = [
        helper.make_node("Shape", ["stack"], ["sizes"], end=1),
        helper.make_node("Squeeze", ["sizes"], ["count"]),
        helper.make_node("Constant", [], ["true"], value=numpy_helper.from_array(np.array(True))),
        helper.make_node("Loop", ["count", "true", "x"], ["y"], body=body),
    ]
    inputs = [("x", FLOAT, ["batch", 4]), ("w", FLOAT, [4, 4]), ("stack", FLOAT, ["steps"])]
    return save(path, nodes, inputs, [("y", FLOAT, ["batch", 4])])


def exchange(path: Path) -> Path:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["part"]),
        helper.make_node(
            "DistCollective",
            ["part"],
            ["y"],
            domain="trt",
            collective_operation="all_reduce",
            reduce_op="sum",
            root=-1,
        ),
    ]
    return save(path, nodes, [("x", BF16, ["batch", 4]), ("w", BF16, [4, 3])], [("y", BF16, ["batch", 3])])


# -- building ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FLOAT, HALF, BF16], ids=["float32", "float16", "bfloat16"])
def test_engine_has_the_names_and_dtypes_of_the_graph(tmp_path, dtype):
    file = product(tmp_path / "graph.onnx", dtype)
    report = build_engine(RTX, file, tmp_path / "graph.engine", BATCH, targets=["sm_89", "sm_120"])
    name = {FLOAT: "FLOAT", HALF: "HALF", BF16: "BF16"}[dtype]
    network = report.network
    assert {key: (value.dtype, value.shape, value.axes) for key, value in network.inputs.items()} == {
        "x": (name, (-1, 4), ("batch", "")),
        "w": (name, (4, 3), ("", "")),
    }
    assert (network.outputs["y"].dtype, network.outputs["y"].shape) == (name, (-1, 3))
    assert network.layers["MATRIX_MULTIPLY"] == 1 and network == inspect_network(RTX, file)
    assert report.bytes == (tmp_path / "graph.engine").stat().st_size > 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["graph.engine", "graph.onnx"]


def test_weights_beside_the_graph_end_up_in_the_engine(tmp_path):
    file = product(tmp_path / "graph.onnx", external=True)
    report = build_engine(RTX, file, tmp_path / "graph.engine", BATCH)
    assert list(report.network.inputs) == ["x"] and report.network.layers["CONSTANT"] == 1
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(BuilderError, match="cannot read .*graph.onnx.*weights.bin"):
        inspect_network(RTX, file)


def test_body_of_a_loop_is_counted(tmp_path):
    report = build_engine(RTX, loop(tmp_path / "loop.onnx"), tmp_path / "loop.engine", {**BATCH, "steps": (1, 8, 48)})
    layers = report.network.layers
    assert (layers["MATRIX_MULTIPLY"], layers["RECURRENCE"] > 0, layers["TRIP_LIMIT"] > 0) == (1, True, True)
    assert report.network.inputs["stack"].axes == ("steps",)


def test_exchange_between_ranks_knows_how_many_there_are(tmp_path):
    file = exchange(tmp_path / "graph.onnx")
    report = build_engine(RTX, file, tmp_path / "graph.engine", BATCH, world=2)
    assert report.network.collectives == (2,) and report.network.layers["DIST_COLLECTIVE"] == 1
    assert inspect_network(RTX, file, world=8).collectives == (8,)
    with pytest.raises(BuilderError, match="1 exchanges between ranks, but world=1"):
        inspect_network(RTX, file)


def test_files_of_the_working_directory_are_not_imported(tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text("raise RuntimeError('not this one')")
    monkeypatch.chdir(tmp_path)
    file = product(tmp_path / "graph.onnx")
    for path in ("", os.pathsep, f"{tmp_path / 'nothing'}{os.pathsep}"):
        monkeypatch.setenv("PYTHONPATH", path)
        report, peak = call_in_child(build_engine, RTX, file, tmp_path / "graph.engine", BATCH)
        assert report.bytes > 1000 and peak > 10**8


def test_an_engine_file_is_mapped_not_read(tmp_path):
    """TensorRT takes the mapping: without a GPU it comes as far as it does with bytes, to CUDA."""
    build_engine(RTX, product(tmp_path / "graph.onnx"), tmp_path / "graph.engine", BATCH)
    with pytest.raises(EngineError, match="cannot read .*graph.engine: .*CUDA driver"):
        _deserialize(load_module(RTX), RTX, tmp_path / "graph.engine")


# -- what cannot be built ----------------------------------------------------------------------------------------------


def unknown_operator(path: Path) -> Path:
    return save(
        path, [helper.make_node("Sorcery", ["x"], ["y"], domain="trt")], [("x", FLOAT, [2])], [("y", FLOAT, [2])]
    )


def loop_without_condition(path: Path) -> Path:
    model = onnx.load(loop(path))
    next(node for node in model.graph.node if node.op_type == "Loop").input[1] = ""
    onnx.save(model, path)
    return path


def no_protobuf(path: Path) -> Path:
    path.write_bytes(b"not a graph")
    return path


def unbuildable(path: Path) -> Path:
    """Parses, but its sizes never fit: rows of the profile are 4 to 8, and the other addend has 3."""
    nodes = [helper.make_node("Add", ["x", "three"], ["y"])]
    return save(path, nodes, [("x", FLOAT, ["batch", 4]), ("three", FLOAT, [3, 4])], [("y", FLOAT, [3, 4])])


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (unknown_operator, {}, "cannot read .*Sorcery"),
        (no_protobuf, {}, "cannot read .*graph.onnx"),
        (loop_without_condition, {"profile": {**BATCH, "steps": (1, 2, 4)}}, "Node input was not registered"),
        (lambda path: path, {}, "there is no graph .*graph.onnx"),
        (
            unbuildable,
            {"profile": {"batch": (4, 4, 8)}},
            "cannot build an engine of .*graph.onnx: .*dimensions not compatible",
        ),
        (product, {"profile": {"rows": (1, 2, 8)}}, "input x .*needs sizes for 'batch'; the profile has rows"),
        (product, {"profile": {"batch": (4, 2, 8)}}, r"batch: \(4, 2, 8\); expected .*ascending"),
        (product, {"targets": ["sm_90"]}, "no sm_90.*use builder=tensorrt "),
        (product, {"targets": ["sm_61"]}, "no target sm_61; use sm_75, sm_80"),
        (product, {"targets": ["8.9"]}, "'8.9' is no compute capability; give sm_89"),
        (lambda path: product(path, BF16), {"targets": ["sm_75"]}, "sm_75 cannot compute bfloat16.*use dtype=float16"),
    ],
)
def test_what_cannot_be_built_says_why_and_leaves_no_file(tmp_path, make, arguments, message):
    file, target = make(tmp_path / "graph.onnx"), tmp_path / "engines" / "graph.engine"
    target.parent.mkdir()
    with pytest.raises(BuilderError, match=message):
        build_engine(RTX, file, target, **{"profile": BATCH, **arguments})
    assert list(target.parent.iterdir()) == []


def test_disk_that_fails_leaves_the_old_engine(tmp_path, monkeypatch):
    file, target = product(tmp_path / "graph.onnx"), tmp_path / "engines" / "graph.engine"
    target.parent.mkdir()
    target.write_bytes(b"old")
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        build_engine(RTX, file, target, BATCH)
    assert [path.name for path in target.parent.iterdir()] == ["graph.engine"] and target.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("target", "dtype", "quantization", "message"),
    [
        ("sm_75", "bfloat16", None, "dtype=float16"),
        ("sm_86", "bfloat16", "fp8", "sm_86 cannot compute fp8.*sm_89; use quantization=int4"),
        ("sm_90", "bfloat16", "nvfp4", "sm_90 cannot compute nvfp4.*sm_100; use quantization=fp8"),
        ("sm_75", "float16", "int4", "sm_80; use quantization=null"),
    ],
)
def test_format_that_a_target_lacks_is_refused(target, dtype, quantization, message):
    with pytest.raises(BuilderError, match=message):
        check_target("tensorrt", [target], dtype, quantization)


@pytest.mark.parametrize(
    ("builder", "target", "quantization"),
    [("tensorrt", "sm_90", "fp8"), ("tensorrt", "sm_100", "nvfp4"), (RTX, "sm_121", "nvfp4"), (RTX, "sm_89", "fp8")],
)
def test_format_that_a_target_has_is_accepted(builder, target, quantization):
    check_target(builder, [target], "bfloat16", quantization)
    check_target(builder, [], "bfloat16", quantization)


# -- which TensorRT ----------------------------------------------------------------------------------------------------

WITH_BUILDER = "__version__ = '{}'\nclass Builder: pass\n"


@pytest.mark.parametrize(
    ("builder", "packages", "message"),
    [
        ("tensorrt", {"tensorrt": ""}, "stub.*pip install .*INDEX .tensorrt-cu13>=10.16"),
        ("tensorrt", {"tensorrt": "raise RuntimeError('run the real installer')"}, "real installer.*tensorrt-cu13"),
        ("tensorrt", {"tensorrt": WITH_BUILDER.format("10.15.1.29")}, "10.15.1.29 is installed; 10.16"),
        ("tensorrt", {"tensorrt": "import no_such_library"}, "needs the package tensorrt.*no_such_library"),
        (
            "tensorrt_llm",
            {"tensorrt": WITH_BUILDER.format("10.14.1"), "tensorrt_llm": "__version__ = '1.3.0rc20'"},
            "tensorrt_llm 1.3.0rc20 .*tensorrt-llm==1.2.1",
        ),
        (
            "tensorrt_llm",
            {"tensorrt": WITH_BUILDER.format("10.9"), "tensorrt_llm": "__version__ = '0.21.0'"},
            "tensorrt_llm 0.21.0",
        ),
        ("tensorrt_llm", {"tensorrt": WITH_BUILDER.format("10.14.1")}, "needs the package tensorrt_llm"),
        ("onnx", {}, "'onnx' has no TensorRT; use one of tensorrt_rtx"),
    ],
)
def test_missing_stub_or_wrong_package_says_what_to_install(tmp_path, monkeypatch, builder, packages, message):
    installed(tmp_path, monkeypatch, packages)
    with pytest.raises(BuilderError, match=message):
        load_module(builder)


@pytest.mark.parametrize(
    ("builder", "versions"),
    [
        ("tensorrt", {"tensorrt": "10.16.0"}),
        ("tensorrt", {"tensorrt": "11.4.0.106"}),
        ("tensorrt_llm", {"tensorrt": "10.14.1.48", "tensorrt_llm": "1.2.1"}),
    ],
)
def test_supported_versions_are_taken(tmp_path, monkeypatch, builder, versions):
    installed(tmp_path, monkeypatch, {name: WITH_BUILDER.format(version) for name, version in versions.items()})
    assert load_module(builder).__version__ == versions["tensorrt"]


def installed(tmp_path, monkeypatch, packages: dict[str, str]) -> None:
    """Only these of tensorrt and tensorrt_llm are there, with this source."""
    for name in ("tensorrt", "tensorrt_llm"):
        monkeypatch.setitem(sys.modules, name, None)  # remembered, so that what is imported below leaves again
        if name in packages:
            del sys.modules[name]
    for name, source in packages.items():
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)


class LlmBuilder:
    """What `export.engine.builders` uses of tensorrt_llm 1.2.1's Builder, with its signatures, around TensorRT-RTX."""

    def __init__(self) -> None:
        trt = importlib.import_module("tensorrt")
        self._trt_builder = trt.Builder(trt.Logger(trt.Logger.ERROR))

    @property
    def trt_builder(self) -> Any:
        return self._trt_builder

    def create_network(self) -> SimpleNamespace:
        return SimpleNamespace(trt_network=self.trt_builder.create_network(0))

    def create_builder_config(self, precision: str, strongly_typed: bool = True) -> SimpleNamespace:
        return SimpleNamespace(trt_builder_config=self.trt_builder.create_builder_config())

    def build_engine(self, network: Any, builder_config: Any) -> Any:
        assert builder_config.trt_builder_config.num_optimization_profiles  # else it makes one, of tensors of its own
        config = builder_config.trt_builder_config
        engine = self.trt_builder.build_serialized_network(network.trt_network, config)
        assert engine is not None, "Engine building failed, please check the error log."
        return engine


def test_the_builder_of_tensorrt_llm_carries_the_same_network(tmp_path, monkeypatch):
    """A double of its package: what is ours of that path runs, and TensorRT-LLM's own part does not."""
    llm = ModuleType("tensorrt_llm")
    llm.__version__, llm.builder = "1.2.1", SimpleNamespace(Builder=LlmBuilder)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", importlib.import_module(RTX))
    monkeypatch.setitem(sys.modules, "tensorrt_llm", llm)
    file = product(tmp_path / "graph.onnx")
    report = build_engine("tensorrt_llm", file, tmp_path / "graph.engine", BATCH)
    plain = build_engine(RTX, file, tmp_path / "plain.engine", BATCH)
    assert (report.network, report.profile) == (plain.network, plain.profile) and report.bytes > 1000
    file = unbuildable(tmp_path / "graph.onnx")
    with pytest.raises(BuilderError, match="cannot build an engine of .*graph.onnx.*TensorRT-LLM: Engine building"):
        build_engine("tensorrt_llm", file, tmp_path / "other.engine", {"batch": (4, 4, 8)})
