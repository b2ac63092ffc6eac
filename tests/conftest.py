"""Fixtures of the whole suite: a pool of ranks for each world size, and tiny checkpoints of the reference."""

from __future__ import annotations

import os

os.environ.setdefault("NEMO_REDIRECT_LOGS_TO_STDERR", "1")
os.environ.setdefault("OMP_NUM_THREADS", "2")

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.pool import Pool


@pytest.fixture(scope="session")
def pool():
    """`pool(world)` -> the session's pool of that many gloo ranks; one that died is started again."""
    pools: dict[int, Pool] = {}

    def get(world: int) -> Pool:
        if world not in pools or not pools[world].alive:
            pools[world] = Pool(world)
        return pools[world]

    yield get
    for started in pools.values():
        started.close()


@pytest.fixture(scope="session")
def single() -> None:
    """Process groups of a world of one in this process."""
    from nemo_diffgemma.parallel import ParallelLayout, initialize

    initialize(ParallelLayout())


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`checkpoint("deep", damp=0.1)` -> directory of a randomised reference model in the released layout."""
    made: dict[tuple, Path] = {}

    def make(size: str, seed: int = 3, damp: float = 1.0, shards: int = 2) -> Path:
        key = (size, seed, damp, shards)
        if key not in made:
            from tests.reference import randomised_model, save_released_layout, tiny_config

            made[key] = tmp_path_factory.mktemp(size) / "model"
            reference = randomised_model(tiny_config(size), seed=seed, damp_self_conditioning=damp)
            save_released_layout(reference, made[key], shards=shards)
        return made[key]

    return make
