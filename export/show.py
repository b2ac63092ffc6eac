"""Show what is in a bundle: model, graphs, engines, profiles, weights, versions.

    python export/show.py bundle=bundles/mine

The last line is JSON: graphs (nodes, inputs, collectives, ONNX and engine bytes), weights, builder, versions.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nemo_diffgemma.cli.output import Results, table
from nemo_diffgemma.cli.start import start


@dataclass
class ShowConfig:
    """Configuration of `export/show.py`."""

    bundle: str = "???"


def show(config: ShowConfig, results: Results) -> dict[str, Any]:
    """Describe a bundle from its own files."""
    import onnx

    from export.bundle.format import read_bundle
    from export.graph.bodies import graphs as graphs_of

    bundle = read_bundle(config.bundle)
    settings = bundle.settings
    graphs: dict[str, Any] = {}
    rows, names = [], bundle.weight_inputs
    for graph in settings.graphs:
        for rank in range(settings.layout.world_size):
            file = bundle.path / settings.file(graph, rank)
            engine = bundle.path / settings.file(graph, rank, "engine")
            model = onnx.load(file, load_external_data=False)
            operators = Counter(node.op_type for part in graphs_of(model.graph) for node in part.node)
            weights = sum(value.name in names for value in model.graph.input)
            facts = {
                "nodes": sum(operators.values()),
                "inputs": len(model.graph.input),
                "weight_inputs": weights,
                "collectives": operators["DistCollective"],
                "onnx_bytes": file.stat().st_size,
                "engine_bytes": engine.stat().st_size if engine.is_file() else 0,
            }
            graphs[f"{graph}.rank{rank}"] = facts
            rows.append([f"{graph}.rank{rank}", *facts.values()])
    experts = f"{settings.experts} experts {settings.quantization or settings.dtype}"
    results.show(f"{config.bundle}: {settings.dtype}, {experts}, {settings.layout}")
    results.show(f"weights {settings.weights}, loop of {settings.steps or 'any number of'} steps\n")
    results.show(table(["graph", "nodes", "inputs", "weights", "collectives", "ONNX bytes", "engine bytes"], rows))
    results.show("\nsizes (least, optimal, most):")
    for graph in settings.graphs:
        sizes = ", ".join(f"{axis} {list(span)}" for axis, span in settings.profile(graph, bundle.config).items())
        results.show(f"  {graph}: {sizes}")
    results.show(f"\nbuilt with {bundle.info['builder']} for {', '.join(bundle.info['targets']) or 'any target'}")
    results.show(", ".join(f"{name} {version}" for name, version in bundle.info["versions"].items()))
    return {
        "graphs": graphs,
        "weights": len(names),
        "builder": bundle.info["builder"],
        "versions": bundle.info["versions"],
    }


if __name__ == "__main__":
    start(show, ShowConfig, "export_show")
