"""What tests of several modules here begin with."""

from __future__ import annotations

import pytest

from tests.export import kit


@pytest.fixture(scope="session", autouse=True)
def folder_of_traces(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> None:
    base = tmp_path_factory.getbasetemp()  # pytest-xdist gives each of its processes a part of the session's
    kit.folder = (base.parent if hasattr(request.config, "workerinput") else base) / "traces"
    kit.folder.mkdir(exist_ok=True)


@pytest.fixture(scope="module")
def traces(checkpoint):
    """Graphs come from the session's traces: the same functions, traced once."""
    patch = pytest.MonkeyPatch()

    def trace(graph, config, layout, dtype, experts, quantized):
        assert config == kit.config("short") and quantized is None
        return kit.graph(graph, "short", layout, dtype, experts)

    patch.setattr("export.bundle.building.trace", trace)
    yield kit.calm(checkpoint)
    patch.undo()
