"""Bundles: written whole or not at all, opened only when complete, and their commands do what they say."""

from __future__ import annotations

import gc
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import onnx
import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from export import open_bundle
from export.build import BuildConfig, _settings, build
from export.bundle.building import build_bundle, check_request
from export.bundle.format import BUILD_INFO, Settings, read_bundle, verify_checksums
from export.check import CheckConfig, check
from export.engine.builders import BuilderError, check_local_target
from export.engine.engine import Limits
from export.run import RunConfig, run
from export.show import ShowConfig, show
from nemo_diffgemma import DiffusionGemma, ParallelLayout, SamplerConfig
from nemo_diffgemma.config import ModelConfig
from nemo_diffgemma.gpus import load_gpu
from nemo_diffgemma.schema import ModelGroup, ParallelGroup, SamplerGroup
from tests.export import kit

ROOT = Path(__file__).resolve().parents[2]
LIMITS = Limits(batch=4, context=64, chunk=16)
SAMPLER = SamplerConfig(max_denoising_steps=8, entropy_bound=5.0, confidence_threshold=0.0)

SUDOKU = ModelGroup(architecture=yaml.safe_load((ROOT / "conf/model/sudoku.yaml").read_text())["architecture"])
TWO = ParallelGroup(tensor=2)

pytestmark = pytest.mark.usefixtures("single")


class Shown:
    """Takes the place of `Results`: keeps what would be printed."""

    is_rank_zero, colours = True, False

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.exit_code = 0

    def show(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="module")
def bundle(traces, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("bundles") / "base"
    build_bundle(traces, out, Settings(steps=8, limits=LIMITS))
    return out


@pytest.fixture
def copy(bundle, tmp_path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


def ids(rows: int = 2, length: int = 11) -> torch.Tensor:
    return torch.randint(64, (rows, length), generator=torch.Generator().manual_seed(0))


def test_a_bundle_generates_what_its_checkpoint_does(bundle, traces):
    expected = kit.network(traces).generate(ids(), max_new_tokens=8, sampler=SAMPLER, seed=1)
    found = open_bundle(bundle).generate(ids(), max_new_tokens=8, sampler=SAMPLER, seed=1)
    assert torch.equal(found.sequences, expected.sequences)
    assert torch.equal(found.forwards, expected.forwards)


@pytest.mark.parametrize("layout", [ParallelLayout(), ParallelLayout(tensor=2, expert=2)], ids=str)
def test_inline_weights_change_nothing(traces, layout, tmp_path):
    several = layout.world_size > 1
    graphs = ("encode", "step") if several else ("encode", "step", "loop")
    settings = Settings(layout=layout, graphs=graphs, steps=8, weights="inline", limits=LIMITS)
    build_bundle(traces, tmp_path / "inline", settings)
    expected = kit.network(traces).generate(ids(), max_new_tokens=8, sampler=SAMPLER, seed=1)
    found = open_bundle(tmp_path / "inline").generate(ids(), max_new_tokens=8, sampler=SAMPLER, seed=1)
    assert torch.equal(found.sequences, expected.sequences)
    if not several:
        assert check(CheckConfig(str(tmp_path / "inline"), steps=4), Shown())["verdict"] == "agrees"
    stored = sum(file.stat().st_size for file in (tmp_path / "inline").glob("weights.rank*.bin"))
    whole = sum(file.stat().st_size for file in (tmp_path / "inline" / "checkpoint").glob("*.safetensors"))
    assert several or stored == 0 < whole  # what lies in the checkpoint as it is, is not stored again


def test_every_weight_input_is_described_and_fits_the_checkpoint(bundle):
    found = read_bundle(bundle)
    files = sorted((bundle / "checkpoint").glob("*.safetensors"))
    stored = {name: tensor for file in files for name, tensor in load_file(file).items()}
    described = json.loads((bundle / "weights.json").read_text())["checkpoint"]
    assert all(entry["key"] in load_file(bundle / "checkpoint" / entry["file"]) for entry in described.values())
    for graph in found.settings.graphs:
        model = onnx.load(bundle / found.settings.file(graph, 0))
        for value in model.graph.input:
            if value.name not in stored:
                continue
            weight = found.weights[value.name]
            assert [dim.dim_value for dim in value.type.tensor_type.shape.dim] == list(weight.shape)
            assert tuple(stored[weight.key].shape) == weight.stored


def test_the_other_checkpoint_of_the_same_sizes_is_not_the_same(bundle, checkpoint, traces):
    other = checkpoint("short")  # the same sizes, other numbers
    shown = Shown()
    found = check(CheckConfig(str(bundle), steps=4), shown)
    assert (found["verdict"], found["computed_by"], shown.exit_code) == ("agrees", "onnxruntime", 0)
    assert found["agreement"]["routing"] == [1.0] * kit.config("short").num_hidden_layers
    assert check(CheckConfig(str(bundle), checkpoint=str(other), steps=4), shown)["verdict"] == "differs"
    assert shown.exit_code == 1
    check(CheckConfig(str(bundle), steps=4, routing=False), shown)
    assert shown.exit_code == 1, "the second check of a process forgot the failure of the first"


def test_the_pytorch_model_is_gone_when_the_engine_is_opened(bundle, monkeypatch):
    """A GPU that holds either need not hold both."""

    def networks() -> int:
        gc.collect()
        # `isinstance` asks for `__class__`, at which a deprecated object warns
        return sum(issubclass(type(thing), DiffusionGemma) for thing in gc.get_objects())

    before, meanwhile = networks(), []
    monkeypatch.setattr(
        "export.bundle.opening.open_bundle", lambda *given: meanwhile.append(networks()) or open_bundle(*given)
    )
    found = check(CheckConfig(str(bundle), steps=2, rows=1, reference_dtype="bfloat16", agreement=0.5), Shown())
    assert meanwhile == [before]
    assert found["verdict"] == "agrees" and found["differences"]["encode"] > 1e-3  # it was in bfloat16


def checked(path: Path) -> tuple[dict, int]:
    """Run by the ranks of a pool."""
    shown = Shown()
    return check(CheckConfig(str(path), steps=2, rows=1, routing=False), shown), shown.exit_code


def test_processes_that_check_together_give_one_verdict(bundle, pool):
    """As under torchrun: each has the whole PyTorch model, and follows the first one's."""
    first, second = pool(2).run("tests.export.test_bundle:checked", path=bundle)
    assert first == second and first[0]["verdict"] == "agrees"


def test_an_engine_that_gives_no_numbers_differs(bundle, monkeypatch):
    """Also where shares decide: its arg-max may still be right."""

    def broken(*given):
        engine = open_bundle(*given)
        plain = engine.sampling_step
        engine.sampling_step = lambda *a, **k: (s := plain(*a, **k))._replace(entropy=s.entropy * float("nan"))
        return engine

    monkeypatch.setattr("export.bundle.opening.open_bundle", broken)
    shown = Shown()
    found = check(CheckConfig(str(bundle), steps=2, rows=1, reference_dtype="bfloat16", agreement=0.0), shown)
    assert (found["verdict"], found["differences"]["step"], shown.exit_code) == ("differs", None, 1)


def test_run_and_show_tell_what_is_there(bundle, traces):
    found = run(
        RunConfig(
            str(bundle), prompt_ids=[2, 10, 11], max_new_tokens=8, seed=3, sampler=SamplerGroup(entropy_bound=5.0)
        ),
        Shown(),
    )
    sampler = SamplerConfig.from_mapping({**vars(kit.network(traces).sampler_defaults), "entropy_bound": 5.0})
    expected = kit.network(traces).generate(torch.tensor([[2, 10, 11]]), max_new_tokens=8, seed=3, sampler=sampler)
    assert found["sequences"] == expected.sequences.tolist()
    one = run(RunConfig(str(bundle), prompt_ids=[2, 10, 11]), Shown())["sequences"][0]
    assert len(one) == 3 + kit.config("short").canvas_length  # one canvas unless told otherwise
    shown = show(ShowConfig(str(bundle)), Shown())
    assert set(shown["graphs"]) == {"encode.rank0", "step.rank0", "loop.rank0"}
    assert shown["graphs"]["loop.rank0"]["weight_inputs"] == shown["graphs"]["step.rank0"]["weight_inputs"] > 40


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (dict(steps=0), "steps=0; expected at least 1"),
        (dict(rows=0), "rows=0; expected at least 1"),
        (dict(canvases=0), "canvases=0; expected at least 1"),
        (dict(reference_dtype="float16"), "reference_dtype='float16'; use one of float32, bfloat16"),
        (dict(prompt_lengths=[61]), "takes 64 columns of context, so with canvases=2 prompts of 1 to 60 tokens"),
        (dict(provider="tensorrt"), "built with builder=onnx and has no engines for provider=tensorrt"),
    ],
)
def test_a_check_that_cannot_be_made_is_refused_before_anything_is_loaded(bundle, given, says, monkeypatch):
    monkeypatch.setattr("export.check._reference", lambda *given: pytest.fail("the PyTorch model was loaded"))
    with pytest.raises(ValueError, match=says):
        check(CheckConfig(str(bundle), **given), Shown())


def test_ranks_that_only_gpus_compute_are_sent_there(bundle, monkeypatch):
    single = read_bundle(bundle)
    settings = replace(single.settings, dtype="bfloat16", layout=ParallelLayout(tensor=2, expert=2))
    monkeypatch.setattr("export.bundle.format.read_bundle", lambda path: replace(single, settings=settings))
    with pytest.raises(ValueError, match="torchrun --nproc-per-node 2 .* provider=tensorrt .*build a float32 bundle"):
        check(CheckConfig(str(bundle)), Shown())


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_half_built_damaged_and_foreign_bundles_are_refused(bundle, copy, tmp_path):
    def refused(says: str) -> None:
        with pytest.raises(ValueError, match=says):
            open_bundle(copy)

    info = json.loads((copy / BUILD_INFO).read_text())
    (copy / BUILD_INFO).write_text(json.dumps({**info, "format": 99}))
    refused("is a bundle of format 99, this version reads format 4; build it again")
    (copy / BUILD_INFO).unlink()
    refused("a half-built bundle: it has no build_info.json; remove it and build it again")
    (copy / BUILD_INFO).write_text(json.dumps(info))
    (copy / "step.rank0.onnx").rename(copy / "elsewhere")
    refused("lacks step.rank0.onnx; copy the bundle again")
    (copy / "step.rank0.onnx").write_bytes(b"short")
    refused("has 5 bytes, but build_info.json says")
    with pytest.raises(ValueError, match="is not a bundle"):
        open_bundle(tmp_path)
    with pytest.raises(ValueError, match="provider='cuda'; use one of onnxruntime, tensorrt_rtx"):
        open_bundle(bundle, provider="cuda")


def test_a_changed_byte_is_found(copy):
    file = copy / "step.rank0.onnx"
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(ValueError, match="step.rank0.onnx is not what was built: its checksum differs"):
        verify_checksums(read_bundle(copy))


def test_weights_of_other_sizes_are_refused(copy):
    file = next(copy.glob("checkpoint/*.safetensors"))
    file.chmod(0o644)
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("mlp.up_proj.weight"))
    tensors[name] = tensors[name].t().contiguous()  # as many bytes
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{name} in .* has shape .* but the engines were built for"):
        open_bundle(copy)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (dict(builder="onnxx"), "builder='onnxx'; use one of onnx, tensorrt_rtx"),
        (dict(dtype="float8"), "dtype='float8'; use one of float32, float16, bfloat16"),
        (dict(graphs=["encode", "step", "step"]), "use \\[encode,step\\] or \\[encode,step,loop\\]"),
        (dict(graphs=["step"]), "use \\[encode,step\\] or \\[encode,step,loop\\]"),
        (dict(steps=0), "steps=0; give at least 1"),
        (dict(max_batch_size=0), "max_batch=0; expected at least 1"),
        (dict(max_context=1000), "max_context=1000 is beyond the 512 positions of the model"),
        (dict(weights="outside"), "weights='outside'; use inputs"),
        (dict(experts="sparce"), "experts='sparce'; use one of sparse, dense, or null for what suits the model"),
        (dict(quantization="int3"), "quantization='int3'; use one of fp8, int4, nvfp4"),
        (dict(quantization="fp8"), "give a few typical prompts to calibrate"),
        (dict(builder="tensorrt_rtx", gpu=load_gpu("h100")), "TensorRT-RTX has no sm_90: .* use builder=tensorrt on a"),
        (
            dict(checkpoint=None, model=SUDOKU, weights="inline"),
            "inline puts a checkpoint's weights .* model= has none",
        ),
        (dict(builder="edge_llm", dtype="bfloat16", steps=16), "so dtype, steps would change nothing; leave out"),
        (dict(builder="tensorrt_llm", parallel=TWO, graphs=["encode", "step"]), "no exchanges .* layout has 2; use"),
        (dict(builder="tensorrt"), "needs the package tensorrt, which cannot be imported"),
    ],
)
def test_bad_requests_leave_nothing(traces, tmp_path, given, says):
    limits = {} if given.get("builder") == "edge_llm" else {"max_context": 64}
    config = BuildConfig(out=str(tmp_path / "out"), **{"checkpoint": str(traces), **limits, **given})
    with pytest.raises(ValueError, match=says):
        build(config, Shown())
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("positions", [1, 64, 8191, 262_144])
@pytest.mark.parametrize("parallel", [ParallelGroup(), TWO], ids=["one rank", "two"])
def test_what_nobody_asked_for_is_never_refused(positions, parallel):
    architecture = {**SUDOKU.architecture, "max_position_embeddings": positions}
    config = BuildConfig(model=ModelGroup(architecture=architecture), out="out", parallel=parallel)
    model = ModelConfig(**architecture)
    check_request(model, _settings(config, model), config.builder, (), ())


def test_an_engine_for_another_gpu_than_the_one_at_hand_is_refused(traces, tmp_path, monkeypatch):
    _have_gpu(monkeypatch, (8, 0))
    with pytest.raises(ValueError, match="for the GPU at hand, sm_80, but the target is sm_90; build on a machine"):
        build_bundle(traces, tmp_path / "out", Settings(limits=LIMITS), "tensorrt", ["sm_90"])
    assert not any(tmp_path.iterdir())


def test_graphs_without_engines_are_for_any_gpu_whichever_is_at_hand(monkeypatch):
    _have_gpu(monkeypatch, (8, 0))
    check_local_target("onnx", ["sm_90"])
    check_local_target("tensorrt_rtx", ["sm_120"])
    with pytest.raises(BuilderError, match="for the GPU at hand, sm_80"):
        check_local_target("tensorrt", ["sm_90"])


def _have_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)


def test_graphs_may_be_asked_for_in_any_order(traces, tmp_path):
    """The loop is made of the step, so the step comes first."""
    built = build_bundle(traces, tmp_path / "out", Settings(graphs=("loop", "step", "encode"), limits=LIMITS))
    assert list(built) == ["encode.rank0", "step.rank0", "loop.rank0"]


@pytest.mark.parametrize(("tracing", "building"), [(1, 2), (2, 1)])
def test_memory_of_the_children_counts_with_our_own(traces, tmp_path, monkeypatch, tracing, building):
    def call(function, *arguments):
        if function.__name__ == "trace_graph":
            return function(*arguments), tracing * 10**13
        arguments[2].write_bytes(b"engine")
        return SimpleNamespace(scratch_bytes=0), building * 10**13

    monkeypatch.setattr("export.bundle.building.call_in_child", call)
    monkeypatch.setattr("export.bundle.building.load_module", lambda builder: None)
    settings = Settings(graphs=("encode", "step"), limits=LIMITS)
    built = build_bundle(traces, tmp_path / "out", settings, "tensorrt_rtx")
    held = psutil.Process().memory_info().rss
    assert all(held / 2 < graph.peak_memory - 2 * 10**13 < 2 * held for graph in built.values())


def test_layouts_that_engines_cannot_have_are_refused(traces, tmp_path):
    for layout, says in (
        (ParallelLayout(tensor=3), "layout tensor=3 cannot divide 4 attention heads"),
        (ParallelLayout(tensor=2, expert=4), "let tensor be 1 or 4"),
        (ParallelLayout(tensor=2), "keep the loop on the host"),
    ):
        with pytest.raises(ValueError, match=says):
            build_bundle(traces, tmp_path / "out", Settings(layout=layout, limits=LIMITS))
    assert not any(tmp_path.iterdir())


def test_what_fails_midway_leaves_nothing(traces, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("export.bundle.building.to_loop", fail)
    with pytest.raises(OSError, match="disk full"):
        build_bundle(traces, tmp_path / "out", Settings(limits=LIMITS))
    assert not any(tmp_path.iterdir())


def test_what_exists_is_not_overwritten(traces, bundle):
    before = (bundle / BUILD_INFO).read_bytes()
    with pytest.raises(ValueError, match="exists and is not empty; choose another name"):
        build_bundle(traces, bundle, Settings(limits=LIMITS))
    assert (bundle / BUILD_INFO).read_bytes() == before


def test_structure_without_weights_builds_but_does_not_run(traces, tmp_path):
    out = tmp_path / "structure"
    build_bundle(kit.config("short"), out, Settings(weights="none", limits=LIMITS))
    with pytest.raises(ValueError, match="was built without weights"):
        open_bundle(out)
