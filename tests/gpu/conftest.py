"""What a GPU test needs: ranks over nccl, with TransformerEngine or with it hidden."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import GPUS, VISIBLE_GPUS
from tests.pool import Pool, Pools

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not GPUS:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session", params=["with_transformer_engine", "without_transformer_engine"])
def gpu_pool(request: pytest.FixtureRequest) -> Iterator[Callable[[int], Pool]]:
    """`gpu_pool(world)` -> that many nccl ranks, a GPU each; skips where there are fewer GPUs."""
    hidden: tuple[str, ...] = ()
    if request.param == "without_transformer_engine":
        hidden = ("transformer_engine", "transformer_engine_torch")
    elif importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("TransformerEngine is not installed")
    gpus = VISIBLE_GPUS or ",".join(map(str, range(GPUS)))
    pools = Pools()

    def get(world: int) -> Pool:
        if world > GPUS:
            pytest.skip(f"{world} GPUs wanted, {GPUS} there")
        return pools.get(world, gpus=gpus, hidden_modules=hidden)

    yield get
    pools.close()
