"""Ranks in processes of their own, as on GPUs: what may differ between them never decides anything."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from export.bundle.comparison import trajectory
from export.bundle.format import BundleError
from export.engine.engine import Engine, EngineError
from export.engine.tensorrt_session import EngineSession
from export.graph import model as graph
from export.graph.model import Model, Weights, empty_context
from export.graph.weights import engine_weights, read_weights
from nemo_diffgemma import ParallelLayout, SamplerConfig
from nemo_diffgemma.cli.child_process import _one_gpu
from nemo_diffgemma.parallel.team import Team, own_device
from tests.export import kit

TWO = ParallelLayout(tensor=2)
ROWS = 3


# -- run by the ranks --------------------------------------------------------------------------------------------------


def one_step(path: Path, disturbed: bool) -> dict[str, Tensor]:
    """A step of this rank of two; `disturbed`: rank 1 rounds its running sums so that it draws the next chunk."""
    rank, config = dist.get_rank(), kit.config("short")
    weights = Weights(dict(read_weights(path, engine_weights(config, TWO), rank, torch.float32)))
    generator = torch.Generator().manual_seed(0)
    shape = (ROWS, config.canvas_length)
    plain = graph.choose_chunk
    if disturbed and rank == 1:
        graph.choose_chunk = lambda mass, uniforms: ((plain(mass, uniforms)[0] + 1) % 2, plain(mass, uniforms)[1] + 1)
    try:
        found = Model(config, TWO, torch.float32).step(
            weights,
            canvas=torch.randint(64, shape, generator=generator),
            soft=torch.zeros(*shape, config.hidden_size),
            first=torch.zeros(ROWS, dtype=torch.long),
            past_length=torch.zeros(ROWS, dtype=torch.long),
            rank=torch.tensor(rank),
            temperature=torch.full((ROWS,), 0.8),
            entropy_bound=torch.full((ROWS,), 1e9),  # all are accepted: the next canvas is the sample
            uniforms=torch.rand(shape, generator=generator),
            replacements=torch.randint(64, shape, generator=generator),
            past=empty_context(config, TWO, ROWS, torch.float32),
        )
    finally:
        graph.choose_chunk = plain
    return {"sample": found[0], "argmax": found[2]}


class Differs:
    """A session whose outputs are another on every rank."""

    def run(self, shared: Any, ranked: Any) -> list[dict[str, Tensor]]:
        rank, config = dist.get_rank(), kit.config("short")
        shape = (ROWS, config.canvas_length)
        ids = torch.full(shape, 7 + rank)
        return [
            {
                "next_canvas": ids,
                "next_soft": torch.full((*shape, config.hidden_size), float(rank)),
                "argmax": ids + 1,
                "entropy": torch.full(shape, 0.1).nextafter(torch.full(shape, 10.0 * rank)),
                "accepted": torch.full(shape, rank == 0),
                "accepted_count": torch.full((ROWS,), rank),
            }
        ]


def decided() -> tuple[dict[str, Tensor], bool, bool]:
    """What an engine of this rank says after a step in which the ranks differ, and two votes."""
    config, rank = kit.config("short"), dist.get_rank()
    engine = Engine(config, TWO, torch.float32, {"step": Differs()}, kit.LIMITS, Path(), [rank])
    found = engine.step(engine.start([0] * ROWS), {})
    return found, *engine.agreed(torch.tensor([True, rank == 0])).tolist()


def captured(fails: str) -> tuple[list[str], int, bool]:
    """Two ranks capture a call, of which rank 1 fails in `fails` -> what this rank did, graphs it has, may it go on."""
    session = EngineSession.__new__(EngineSession)
    session._world, session._device = 2, torch.device("cpu")
    session._captured, session._capturable = OrderedDict(), True
    done: list[str] = []

    def step(name: str, result: Any) -> Any:
        if name == fails and dist.get_rank() == 1:
            raise RuntimeError("out of memory")
        done.append(name)
        return result

    session._own_buffers = lambda inputs: step("buffers", (None, {}, {}))  # type: ignore[method-assign]
    session._warm_up = lambda context: step("exchanges", True)  # type: ignore[method-assign]
    session._recorded = lambda context: step("graph", "graph")  # type: ignore[method-assign]
    session._capture((), {})
    return done, len(session._captured), session._capturable


def replica(path: Path) -> tuple[Tensor, Tensor]:
    """The last canvas and signal of a trajectory, where the model of rank 1 is another one."""
    network = kit.network(path)
    if dist.get_rank() == 1:
        network.embed_tokens.weight.data.mul_(1.5)
    try:
        steps = trajectory(network, torch.ones(2, 5, dtype=torch.long), SamplerConfig(max_denoising_steps=4), 0).steps
    finally:
        if dist.get_rank() == 1:
            network.embed_tokens.weight.data.div_(1.5)
    return steps[-1].canvas, steps[-1].soft


def told(error: str) -> tuple[str, bool, str]:
    """What a part of the work that fails with `error` on rank 1 raises here, and whether it is a user's mistake."""
    try:
        with Team.of_processes().all_or_none():
            if dist.get_rank() == 1:
                raise {"refusal": BundleError("give another"), "crash": OSError("disk full")}[error]
    except Exception as found:
        return type(found).__name__, isinstance(found, ValueError), str(found)
    return "nothing", False, ""


# -- claims ------------------------------------------------------------------------------------------------------------


def test_a_rank_that_rounds_differently_does_not_change_the_sample(pool, checkpoint):
    """Both ranks would claim the drawn chunk, or neither, and their ids be added up."""
    arguments = dict(path=kit.calm(checkpoint))
    truth = pool(2).run("tests.export.test_ranks:one_step", disturbed=False, **arguments)
    found = pool(2).run("tests.export.test_ranks:one_step", disturbed=True, **arguments)
    assert len({int(id) // 32 for id in truth[0]["sample"].flatten()}) == 2, "samples of one rank's rows only"
    for ours in (*truth, *found):
        assert torch.equal(ours["sample"], truth[0]["sample"])
        assert torch.equal(ours["argmax"], truth[0]["argmax"])


def test_what_decides_a_loop_is_the_first_ranks(pool):
    (first, *votes), (second, *others) = pool(2).run("tests.export.test_ranks:decided")
    for name in ("next_canvas", "argmax", "entropy", "accepted", "accepted_count"):
        assert torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype, name
    assert first["next_canvas"].eq(7).all() and first["accepted"].all()
    assert second["next_soft"].eq(1).all()  # each rank goes on with its own
    assert votes == others == [True, False]


def test_all_ranks_capture_a_cuda_graph_or_none(pool):
    """A rank that has no buffers would not take part in the exchanges of the warm-up."""
    assert pool(2).run("tests.export.test_ranks:captured", fails="nothing") == [
        (["buffers", "exchanges", "graph"], 1, True),
        (["buffers", "exchanges", "graph"], 1, True),
    ]
    assert pool(2).run("tests.export.test_ranks:captured", fails="buffers") == [(["buffers"], 0, False), ([], 0, False)]
    assert pool(2).run("tests.export.test_ranks:captured", fails="graph") == [
        (["buffers", "exchanges", "graph"], 0, False),
        (["buffers", "exchanges"], 0, False),
    ]


def test_a_rank_that_cannot_launch_its_exchanges_does_not_go_on_alone(monkeypatch):
    """The others are in an exchange with it, not in the vote on what it has found out."""
    session = EngineSession.__new__(EngineSession)
    monkeypatch.setattr(session, "_warm_up", lambda context: (_ for _ in ()).throw(EngineError("could not run")))
    session._world = 2
    with pytest.raises(EngineError, match="could not run"):
        session._launched_before(None)
    session._world = 1
    assert not session._launched_before(None)


def test_replicas_of_the_pytorch_model_follow_the_first(pool, checkpoint):
    (canvas, soft), (other_canvas, other_soft) = pool(2).run(
        "tests.export.test_ranks:replica", path=kit.calm(checkpoint)
    )
    assert torch.equal(canvas, other_canvas) and torch.equal(soft, other_soft)


def test_only_a_refusal_of_another_process_is_a_users_mistake(pool):
    assert pool(2).run("tests.export.test_ranks:told", error="refusal") == [
        ("OtherRankError", True, "rank 1 stopped: give another"),
        ("BundleError", True, "give another"),
    ]
    assert pool(2).run("tests.export.test_ranks:told", error="crash") == [
        ("OtherRankFailure", False, "rank 1 stopped: OSError: disk full"),
        ("OSError", False, "disk full"),
    ]


@pytest.mark.parametrize(
    ("gpus", "visible", "own", "childs"),
    [(8, None, 3, "3"), (8, "7,6,5,4,3,2,1,0", 3, "4"), (1, None, 0, "0"), (1, "5", 0, "5"), (0, "", 0, None)],
)
def test_a_process_and_its_child_use_one_gpu(monkeypatch, gpus, visible, own, childs):
    """The fourth process of a node, which sees all GPUs of it, or the one that its launcher gave it."""
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert (own_device(), _one_gpu().get("CUDA_VISIBLE_DEVICES")) == (own, childs)
