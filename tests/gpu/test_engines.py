"""Engines on a GPU against ONNX Runtime's numbers for the same bundle.

    make test-gpu        # prints latencies too: a row of benchmarks/engine.py for each precision and batch

Bundles of a tiny random checkpoint are built here, with TensorRT where it is installed, else with TensorRT-RTX (not on
H100, H200 or B200, for which it has no kernels). A GPU for which neither can build fails the tests: install TensorRT as
export/README.md says. What ONNX Runtime gives is kept in an .npz file for the session.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from tests.conftest import GPUS, VISIBLE_GPUS
from tests.parity.generations import DAMP, SUBLAYERS
from tests.pool import Pools

ROOT = Path(__file__).resolve().parents[2]
LENGTHS = (3, 8, 21)  # below, at and above the sliding window of the tiny models
STEPS = 8
SAMPLER = dict(max_denoising_steps=STEPS, entropy_bound=5.0, t_min=0.4, t_max=0.8, eos_token_id=[1, 50], pad_token_id=0)


# -- run by the ranks, which see the GPUs ------------------------------------------------------------------------------


def target_here() -> str:
    return "sm_{}{}".format(*torch.cuda.get_device_capability())


def builder_here() -> str:
    """The TensorRT that can build for this GPU, or why there is none."""
    from export.engine.builders import BuilderError, check_target, load_module

    reasons = []
    for builder in ("tensorrt", "tensorrt_rtx"):
        try:
            load_module(builder)
            check_target(builder, [target_here()], "bfloat16")
            return builder
        except BuilderError as error:
            reasons.append(str(error))
    return "none: " + "; ".join(reasons)


def build(checkpoint: Path, out: Path, builder: str, dtype: str, layout: dict[str, int], **settings: Any) -> None:
    from export.bundle.building import build_bundle
    from export.bundle.format import Settings
    from export.engine.engine import Limits
    from nemo_diffgemma import ParallelLayout

    if torch.distributed.get_rank() == 0:
        graphs = ("encode", "step") if layout else ("encode", "step", "loop")
        limits = Limits(batch=4, context=64, chunk=16)
        wanted = Settings(dtype, ParallelLayout(**layout), graphs, STEPS, limits=limits, **settings)
        build_bundle(checkpoint, out, wanted, builder, prompts=[[2, 10, 11, 12], [2, 5, 6, 7, 8, 9]])
    torch.distributed.barrier()


def save_sudoku(out: Path) -> None:
    """A random model whose experts can be cut into blocks: that of the demo."""
    from nemo_diffgemma import DiffusionGemma, ModelConfig

    network = DiffusionGemma(
        ModelConfig(**yaml.safe_load((ROOT / "conf/model/sudoku.yaml").read_text())["architecture"])
    )
    network.init_weights(0)
    network.save_huggingface(out)


def numbers(path: Path, provider: str, length: int, calls: int = 1) -> list[dict[str, Tensor]]:
    """Keys and values, and `calls` denoising steps of one canvas in two rows, each with other noise.

    Run with provider "traced" these are the traced functions in PyTorch, in the dtype of the bundle.
    """
    engine = _open(path, provider)
    generator = torch.Generator().manual_seed(length)
    vocabulary, canvas = engine.model_config.vocab_size, (2, engine.model_config.canvas_length)
    ids = torch.randint(vocabulary, (2, length), generator=generator)
    context = engine.encode(ids.to(engine.device), engine.start([0, 1]))
    results = [{name: tensor.cpu() for name, tensor in context.past[0].items()}]
    soft = engine.no_signal(2)
    for _ in range(calls):
        inputs = {
            "canvas": torch.randint(vocabulary, canvas, generator=generator),
            "soft": soft,
            "temperature": 0.4 + 0.4 * torch.rand(2, generator=generator),
            "entropy_bound": torch.full((2,), 5.0),
            "uniforms": torch.rand(canvas, generator=generator),
            "replacements": torch.randint(vocabulary, canvas, generator=generator),
        }
        found = engine.step(context, {name: tensor.to(engine.device) for name, tensor in inputs.items()})
        results.append({name: tensor.cpu() for name, tensor in found.items()})
        soft = found["next_soft"]
    return results


def tokens(path: Path, provider: str, length: int, **sampler: Any) -> Tensor:
    """Two canvases of three rows."""
    from nemo_diffgemma import SamplerConfig

    engine = _open(path, provider)
    ids = torch.randint(engine.model_config.vocab_size, (3, length), generator=torch.Generator().manual_seed(length))
    settings = SamplerConfig(**{**SAMPLER, **sampler})
    new = 2 * engine.model_config.canvas_length
    return engine.generate(ids, max_new_tokens=new, sampler=settings, seed=5).sequences.cpu()


def error_of_long_prompt(path: Path, provider: str) -> str:
    from export.engine.engine import EngineError

    engine = _open(path, provider)
    past = engine.start([0])
    grown = {name: tensor.new_zeros(1, tensor.shape[1], 65, tensor.shape[3]) for name, tensor in past.past[0].items()}
    try:
        engine.encode(torch.ones(1, 2, dtype=torch.long), type(past)(past.left_padding, 65, (grown,)))
    except EngineError as error:
        return str(error)
    return "no error"


def verdict(path: Path, provider: str, **settings: Any) -> dict[str, Any]:
    """What export/check.py finds, every rank having the whole PyTorch model."""
    from export.check import CheckConfig, check
    from tests.export.test_bundle import Shown

    return check(CheckConfig(str(path), provider=provider, rows=2, canvases=1, **settings), Shown())  # type: ignore[arg-type]


def _open(path: Path, provider: str) -> Any:
    from export import open_bundle
    from export.bundle.comparison import torch_engine
    from export.bundle.format import read_bundle

    if provider == "traced":
        return torch_engine(read_bundle(path))[0]
    return open_bundle(path, provider)


# -- fixtures ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Any]]:
    pools = Pools()
    gpus = VISIBLE_GPUS or ",".join(map(str, range(GPUS)))

    def get(world: int) -> Any:
        if world > GPUS:
            pytest.skip(f"{world} GPUs wanted, {GPUS} there")
        return pools.get(world, gpus=gpus)

    yield get
    pools.close()


@pytest.fixture(scope="session")
def provider(ranks) -> str:
    found = ranks(1).run("tests.gpu.test_engines:builder_here")[0]
    if found.startswith("none"):  # skipping would be a green run that has tested nothing
        pytest.fail(f"no TensorRT can build for the GPU of this machine: {found.removeprefix('none: ')}")
    return found


@pytest.fixture(scope="session")
def quantised(ranks, provider) -> Callable[[str], dict[str, Any]]:
    """`quantised("nvfp4")` -> settings of a bundle; skips where the GPU lacks the format."""
    from export.engine.builders import BuilderError, check_target

    target = ranks(1).run("tests.gpu.test_engines:target_here")[0]

    def get(scheme: str) -> dict[str, Any]:
        try:
            check_target(provider, [target], "bfloat16", scheme)
        except BuilderError as error:
            pytest.skip(str(error))
        return {"model": "sudoku", "quantization": scheme}

    return get


@pytest.fixture(scope="session")
def bundle(ranks, provider, checkpoint, sudoku, tmp_path_factory) -> Callable[..., Path]:
    """`bundle("float16", weights="inline")` -> a bundle with engines, built here."""
    made: dict[tuple, Path] = {}

    def get(
        dtype: str, world: int = 1, model: str = "base", layout: dict[str, int] | None = None, **settings: Any
    ) -> Path:
        key = (dtype, world, model, *(layout or {}).values(), *settings.values())
        if key not in made:
            made[key] = tmp_path_factory.mktemp("bundles") / "-".join(map(str, key))
            ranks(world).run(
                "tests.gpu.test_engines:build",
                timeout=540,
                checkpoint=sudoku if model == "sudoku" else checkpoint("base", damp=DAMP, sublayers=SUBLAYERS),
                out=made[key],
                builder=provider,
                dtype=dtype,
                layout=layout or {},
                **settings,
            )
        return made[key]

    return get


@pytest.fixture(scope="session")
def sudoku(ranks, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("sudoku") / "checkpoint"
    ranks(1).run("tests.gpu.test_engines:save_sudoku", out=directory)
    return directory


@pytest.fixture(scope="session")
def golden(bundle, tmp_path_factory) -> Callable[[int, int], list[dict[str, Tensor]]]:
    """`golden(length, calls)` -> ONNX Runtime's `numbers` in float32, written once."""
    folder = tmp_path_factory.mktemp("golden")

    def get(length: int, calls: int) -> list[dict[str, Tensor]]:
        file = folder / f"{length}-{calls}.npz"
        if not file.exists():
            found = numbers(bundle("float32"), "onnxruntime", length, calls)
            arrays = {f"{i}/{name}": tensor.numpy() for i, call in enumerate(found) for name, tensor in call.items()}
            np.savez(file, allow_pickle=False, **arrays)
        results: list[dict[str, Tensor]] = [{} for _ in range(calls + 1)]
        for key, array in np.load(file).items():
            index, name = key.split("/")
            results[int(index)][name] = torch.from_numpy(array)
        return results

    return get


def distance(ours: list[dict[str, Tensor]], truth: list[dict[str, Tensor]], name: str) -> float:
    """Root mean square over all calls."""
    pairs = [
        (mine[key].float(), theirs[key].float())
        for mine, theirs in zip(ours, truth, strict=True)
        for key in theirs
        if key.startswith(name)
    ]
    return float(torch.cat([(mine - theirs).flatten() for mine, theirs in pairs]).square().mean().sqrt())


# -- claims ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", LENGTHS)
def test_float32_graphs_give_what_onnx_runtime_gives(ranks, bundle, provider, golden, length):
    """Calls of the same shapes: the first is launched, the second captured, the others replayed with other inputs."""
    path = bundle("float32")
    truth = golden(length, 5)
    ours = ranks(1).run("tests.gpu.test_engines:numbers", path=path, provider=provider, length=length, calls=5)[0]
    for mine, theirs in zip(ours, truth, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            if value.dtype == torch.float32:
                torch.testing.assert_close(mine[name], value, atol=1e-4, rtol=1e-4, msg=f"{name} differs")
            else:
                assert torch.equal(mine[name], value), name


@pytest.mark.parametrize(
    "sampler", [{"confidence_threshold": 0.005}, {"confidence_threshold": 0.0}], ids=["step", "loop"]
)
@pytest.mark.parametrize("length", LENGTHS)
def test_float32_tokens_equal_onnx_runtime(ranks, bundle, provider, length, sampler):
    path = bundle("float32")
    arguments = dict(path=path, length=length, **sampler)
    ours = ranks(1).run("tests.gpu.test_engines:tokens", provider=provider, **arguments)[0]
    assert torch.equal(ours, tokens(provider="onnxruntime", **arguments))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("length", LENGTHS)
def test_lower_precision_is_no_less_exact_than_pytorch(ranks, bundle, provider, golden, length, dtype):
    """Distance to float32: the engine's at most 1.5 times that of the traced functions in PyTorch in the same dtype."""
    path, truth = bundle(dtype), golden(length, 1)
    ours = ranks(1).run("tests.gpu.test_engines:numbers", path=path, provider=provider, length=length)[0]
    theirs = numbers(path, "traced", length)
    for name in ("past_key_values", "entropy", "next_soft"):
        assert distance(ours, truth, name) < 1.5 * distance(theirs, truth, name)


def test_context_beyond_the_profile_is_refused_before_the_gpu_sees_it(ranks, bundle, provider):
    message = ranks(1).run("tests.gpu.test_engines:error_of_long_prompt", path=bundle("float32"), provider=provider)[0]
    assert "axis 2 has 65, and 1 to" in message and "max_context=65" in message


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"tensor": 2, "expert": 2}], ids=str)
def test_two_ranks_give_the_tokens_of_onnx_runtime(ranks, bundle, provider, layout):
    if provider == "tensorrt_rtx":
        pytest.skip("TensorRT-RTX runs engines of one rank only")
    path = bundle("float32", 2, layout=layout)
    arguments = dict(path=path, length=8)
    ours = ranks(2).run("tests.gpu.test_engines:tokens", provider=provider, **arguments)
    truth = tokens(provider="onnxruntime", **arguments)
    assert all(torch.equal(mine, truth) for mine in ours)


def test_weights_inside_of_the_engine_give_the_tokens_of_onnx_runtime(ranks, bundle, provider):
    ours = ranks(1).run(
        "tests.gpu.test_engines:tokens", path=bundle("float32", weights="inline"), provider=provider, length=8
    )[0]
    assert torch.equal(ours, tokens(bundle("float32"), "onnxruntime", 8))


@pytest.mark.parametrize("scheme", ["int4", "fp8", "nvfp4"])
def test_quantised_experts_are_no_less_exact_than_simulated_ones(ranks, bundle, provider, quantised, scheme):
    """Distance to float32: the engine's at most 1.5 times that of the same quantisation simulated in PyTorch."""
    path = bundle("bfloat16", **quantised(scheme))
    truth = numbers(bundle("float32", model="sudoku"), "onnxruntime", 8)
    ours = ranks(1).run("tests.gpu.test_engines:numbers", path=path, provider=provider, length=8)[0]
    theirs = numbers(path, "traced", 8)
    for name in ("past_key_values", "entropy", "next_soft"):
        assert distance(ours, truth, name) < 1.5 * distance(theirs, truth, name)


@pytest.mark.parametrize("world", [1, 2])
def test_check_agrees_on_the_gpu(ranks, bundle, provider, world):
    """The command of the guide, in every process of the engines."""
    if world > 1 and provider == "tensorrt_rtx":
        pytest.skip("TensorRT-RTX runs engines of one rank only")
    path = bundle("bfloat16", world, layout={"tensor": world} if world > 1 else None)
    given = dict(reference_dtype="bfloat16", routing=False)
    for found in ranks(world).run("tests.gpu.test_engines:verdict", path=path, provider=provider, **given):
        assert (found["verdict"], found["computed_by"]) == ("agrees", provider)


MEASURED = [
    *(
        (dtype, {}, rows, steps)
        for dtype in ("float32", "float16", "bfloat16")
        for rows in (1, 4)
        for steps in (4, STEPS)
    ),
    *(("bfloat16", {"quantization": scheme}, 4, STEPS) for scheme in ("int4", "fp8", "nvfp4")),
    ("bfloat16", {"weights": "inline"}, 4, STEPS),
]


@pytest.mark.parametrize(("dtype", "settings", "rows", "steps"), MEASURED, ids=str)
def test_latency_can_be_measured(bundle, provider, quantised, dtype, settings, rows, steps):
    if "quantization" in settings:
        settings = quantised(settings["quantization"])
    command = [sys.executable, "benchmarks/engine.py", str(bundle(dtype, **settings)), "--provider", provider]
    command += ["--batch", str(rows), "--context", "32", "--steps", str(steps)]
    visible = {"CUDA_VISIBLE_DEVICES": VISIBLE_GPUS or "0"}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | visible, stdout=subprocess.PIPE, text=True, check=True)
    print(f"\n{done.stdout}")
    assert float(done.stdout.splitlines()[-1].split("|")[-2]) > 0
