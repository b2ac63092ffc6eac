"""What tests of several modules here begin with."""

from __future__ import annotations

import pytest

from tests.export import kit


@pytest.fixture(scope="module")
def traces(checkpoint):
    """Graphs come from the session's traces: the same functions, traced once."""
    patch = pytest.MonkeyPatch()

    def trace(graph, config, layout, dtype):
        assert config == kit.config("base")
        return kit.graph(graph, "base", layout, dtype)

    patch.setattr("export.bundle.building.trace", trace)
    yield kit.calm(checkpoint)
    patch.undo()
