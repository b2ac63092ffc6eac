"""Compare a bundle with the PyTorch model of its checkpoint: keys and values, every denoising step, tokens, routing.

    python export/check.py bundle=bundles/mine                                # ONNX Runtime, on the CPU
    python export/check.py bundle=bundles/mine provider=tensorrt              # the engines, on a GPU
    python export/check.py bundle=bundles/mine checkpoint=<another checkpoint of the same sizes>

In float32 every number must agree within `tolerance`, and so must the tokens of all rows (on models that are not
chaotic: a trained one). In lower precision, and with quantised experts, the share of equal arg-max tokens must reach
`agreement`. What ONNX Runtime cannot compute (bfloat16, NVFP4) is checked with the functions that were traced, run by
PyTorch. The last line is JSON: differences by graph, agreement, verdict. Exit code 1 where the verdict is "differs".
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from export.entry import start
from launch.output import Results, table
from nemo_diffgemma.training.schema import ConfigurationError

if TYPE_CHECKING:
    from export.bundle import Settings
    from export.checking import Differences


@dataclass
class CheckConfig:
    """What `export/check.py` reads."""

    bundle: str = "???"
    checkpoint: str | None = None  # another one than the bundle's own
    provider: str = "onnxruntime"  # tensorrt_rtx, tensorrt, tensorrt_llm
    prompt_lengths: list[int] = field(default_factory=list)  # empty: below, at and above the sliding window
    rows: int = 3
    steps: int | None = None  # None: those of the bundle's loop, else 48
    canvases: int = 2
    seed: int = 0
    tolerance: float = 1e-3  # float32: entropies in nats, keys and values
    agreement: float = 0.9  # lower precision: share of equal arg-max tokens


def check(config: CheckConfig, results: Results) -> dict[str, Any]:
    """Compare, show, judge."""
    from export import open_bundle
    from export.bundle import read_bundle, verify_checksums
    from export.checking import in_lockstep, tokens_agree, torch_engine
    from nemo_diffgemma import DiffusionGemma, ParallelLayout, SamplerConfig
    from nemo_diffgemma.checkpoint.open import load_network
    from nemo_diffgemma.parallel import initialize

    bundle = read_bundle(config.bundle)
    lengths, batch = _fitting(config, bundle)  # raises before anything is loaded
    verify_checksums(bundle)
    settings = bundle.settings
    # one engine of the traced functions, for the routing and for what ONNX Runtime cannot compute
    traced = torch_engine(bundle) if settings.layout.world_size == 1 else None
    if config.provider == "onnxruntime" and (settings.dtype == "bfloat16" or settings.quantization == "nvfp4"):
        engine, computed_by = (traced or torch_engine(bundle))[0], "the traced functions in PyTorch"
    else:
        engine, computed_by = open_bundle(config.bundle, config.provider), config.provider
    initialize(ParallelLayout())
    network = load_network(config.checkpoint) if config.checkpoint else DiffusionGemma.from_huggingface(bundle.assets)
    steps = config.steps or settings.steps or 48
    sampler = SamplerConfig(max_denoising_steps=steps, confidence_threshold=0.0)
    new = config.canvases * network.model.canvas_length
    generator = torch.Generator().manual_seed(config.seed)
    found: dict[int, Differences] = {}
    tokens: dict[int, list[bool]] = {}
    for length in lengths:
        ids = torch.randint(network.model.vocab_size, (batch, length), generator=generator)
        found[length] = in_lockstep(engine, network, ids, steps, config.seed)
        tokens[length] = tokens_agree(engine, network, ids, new, sampler, config.seed)
    experts = settings.quantization or settings.dtype
    results.show(f"{config.bundle}: {settings.dtype}, experts {experts}; by {computed_by}")
    results.show(_table(found, tokens))
    routing: list[float] = []
    if traced is not None:
        routing = in_lockstep(traced[0], network, ids, min(steps, 8), config.seed, traced[1]).routing
        results.show("tokens with the same experts, by layer: " + " ".join(f"{share:.3f}" for share in routing))
    return _judge(config, settings, found, tokens, routing, results)


def _table(found: Mapping[int, Differences], tokens: Mapping[int, list[bool]]) -> str:
    header = ["prompt", "encode: K/V", "step: entropy", "soft", "worst arg-max", "worst canvas", "rows of equal tokens"]
    rows = []
    for length, d in found.items():
        numbers = [f"{number:.1e}" for number in (d.keys_values, d.entropy, d.soft)]
        shares = [f"{min(share):.4f}" for share in (d.argmax, d.canvas)]
        rows.append([length, *numbers, *shares, f"{sum(tokens[length])}/{len(tokens[length])}"])
    return table(header, rows)


def _judge(
    config: CheckConfig,
    settings: Settings,
    found: Mapping[int, Differences],
    tokens: Mapping[int, list[bool]],
    routing: list[float],
    results: Results,
) -> dict[str, Any]:
    """The JSON line, and exit code 1 where the bundle differs."""
    worst = {name: max(getattr(d, name) for d in found.values()) for name in ("keys_values", "entropy", "soft")}
    argmax = [share for differences in found.values() for share in differences.argmax]
    rows = [same for of_length in tokens.values() for same in of_length]
    agreement = sum(argmax) / len(argmax)
    if settings.dtype == "float32" and settings.quantization is None:
        fine = max(worst.values()) <= config.tolerance and all(rows)
    else:
        fine = agreement >= config.agreement
    results.exit_code = int(not fine)
    return {
        "differences": {"encode": worst["keys_values"], "step": worst["entropy"], "soft": worst["soft"]},
        "agreement": {"argmax": agreement, "rows": sum(rows) / len(rows), "routing": routing},
        "verdict": "agrees" if fine else "differs",
    }


def _fitting(config: CheckConfig, bundle: Any) -> tuple[list[int], int]:
    """Prompt lengths that leave room for the canvases, and rows, as many as the engines take."""
    limits, model = bundle.settings.limits, bundle.config
    room = limits.context - (config.canvases - 1) * model.canvas_length
    window = model.sliding_window
    wanted = config.prompt_lengths or sorted({max(1, window - 1), window, window + 3, min(window, max(1, room))})
    lengths = [length for length in wanted if 1 <= length <= room]
    if not lengths or config.rows < 1:
        raise ConfigurationError(
            f"{config.bundle} takes {limits.context} columns of context, so with canvases={config.canvases} prompts "
            f"of 1 to {room} tokens: give prompt_lengths=[...], or fewer canvases, and at least 1 of rows"
        )
    return lengths, min(config.rows, limits.batch)


if __name__ == "__main__":
    start(check, CheckConfig, "export_check")
