"""Fixtures of the whole suite: a pool of ranks for each world size, and tiny models of the reference.

Everything but `tests/gpu` runs on the CPU, on a machine with GPUs too: they are hidden from this process and from the
ranks of `pool`, and given to those of `gpu_pool`.
"""

from __future__ import annotations

import os

os.environ.setdefault("NEMO_REDIRECT_LOGS_TO_STDERR", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: a second thread only waits, and worse beside a pool

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from tests.pool import Pool, Pools

hypothesis.settings.register_profile("suite", deadline=None, derandomize=True)  # the same examples in every run
hypothesis.settings.load_profile("suite")

GPUS = torch.cuda.device_count()  # asks the driver's library, starts nothing
VISIBLE_GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")
os.environ["CUDA_VISIBLE_DEVICES"] = ""


# Of pytest-xdist's processes one has all tests of a group: they share the pools of ranks, models, or engines.
GROUPS = {
    "traces": tuple(
        f"tests/export/test_{name}" for name in ("bundle", "engines", "graphs", "ranks", "roofline", "team", "triton")
    ),
    "quantized": ("tests/export/test_quant", "tests/export/test_schemes"),
    "ranks": (
        "tests/checkpoint/",
        "tests/distributed/",
        "tests/evaluation/",
        "tests/lora/",
        "tests/parallel/",
        "tests/model/",
        *(
            f"tests/serving/test_{name}"
            for name in (
                "adapters",
                "constrained",
                "engine",
                "held",
                "ranks",
                "replica_languages",
                "responses",
                "scores",
            )
        ),
        "tests/training/test_archive",
        "tests/training/test_run",
        "tests/parity/test_joint",
        "tests/parity/test_mixed",
    ),
    "gpu": ("tests/gpu/",),
    "starts": ("tests/training/", "tests/launch/", "tests/cli/"),
}


def group_of(nodeid: str) -> str:
    """Its name; other tests are grouped by their files."""
    return next((name for name, paths in GROUPS.items() if nodeid.startswith(paths)), nodeid.split("::")[0])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    # its own groups, --dist=loadgroup, go into Item._nodeid, which pytest 9.2 does not read
    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return ByGroup(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The long groups first, so that none is left for the end."""
    if hasattr(config, "workerinput"):  # pytest-xdist's
        order = [*GROUPS, *dict.fromkeys(group_of(item.nodeid) for item in items)]
        items.sort(key=lambda item: order.index(group_of(item.nodeid)))


@pytest.fixture(scope="session")
def pool() -> Iterator[Callable[[int], Pool]]:
    """`pool(world)` -> the session's pool of that many gloo ranks; one that died is started again."""
    pools = Pools()
    yield pools.get
    pools.close()


@pytest.fixture(scope="session")
def single() -> None:
    """Process groups of a world of one in this process."""
    from nemo_diffgemma.parallel import ParallelLayout, initialize

    initialize(ParallelLayout())


@pytest.fixture(scope="session")
def reference() -> Callable[..., Any]:
    """`reference("deep", damp=0.1)` -> a randomised model of transformers, shared: tests must not change it.

    `damp` and `sublayers` are `damp_self_conditioning` and `damp_sublayers` of `randomised_model`.
    """
    made: dict[tuple, Any] = {}

    def make(size: str, seed: int = 3, damp: float = 1.0, sublayers: float = 1.0) -> Any:
        key = (size, seed, damp, sublayers)
        if key not in made:
            from tests.reference import randomised_model, tiny_config

            model = randomised_model(tiny_config(size), seed, damp, sublayers)
            # padding_idx=0 would keep the look-up's gradient from row 0, which is a token like any other in the noise
            model.model.decoder.embed_tokens.padding_idx = None
            model.model.encoder.language_model.embed_tokens.padding_idx = None
            made[key] = model
        return made[key]

    return make


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, reference: Callable[..., Any]) -> Callable[..., Path]:
    """`checkpoint("deep", damp=0.1)` -> directory of the same reference model in the released layout."""
    made: dict[tuple, Path] = {}

    def make(size: str, seed: int = 3, damp: float = 1.0, shards: int = 2, sublayers: float = 1.0) -> Path:
        key = (size, seed, damp, shards, sublayers)
        if key not in made:
            from tests.reference import save_released_layout

            made[key] = tmp_path_factory.mktemp(size) / "model"
            save_released_layout(reference(size, seed, damp, sublayers), made[key], shards=shards)
        return made[key]

    return make


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets how many threads torch computes with, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
