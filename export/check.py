"""Compare a bundle with the PyTorch model of its checkpoint: keys and values, every denoising step, tokens, routing.

    python export/check.py bundle=bundles/mine                                # ONNX Runtime, on the CPU
    python export/check.py bundle=bundles/mine provider=tensorrt reference_dtype=bfloat16     # the engines, on a GPU
    torchrun --nproc-per-node 8 export/check.py bundle=bundles/tp8 provider=tensorrt reference_dtype=bfloat16
    python export/check.py bundle=bundles/mine checkpoint=<another checkpoint of the same sizes>

The PyTorch model runs first and is gone when the engines are opened: a GPU must hold one of them at a time (in each of
several processes the whole PyTorch model). In float32 every number must agree within `tolerance`, and so must the
tokens of all rows (on models that are not chaotic: a trained one). In lower precision, of either, and with quantised
experts, the share of equal arg-max tokens must reach `agreement`. What ONNX Runtime cannot compute (bfloat16, NVFP4) is
checked with the functions that were traced, run by PyTorch on the CPU. The last line is JSON: differences by graph
(null: no number), agreement, computed_by, verdict. Exit code 1 where the verdict is "differs".
"""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from nemo_diffgemma.cli.output import Results, table
from nemo_diffgemma.cli.start import start
from nemo_diffgemma.schema import DTYPES, ConfigurationError

if TYPE_CHECKING:
    from export.bundle.comparison import Differences, Trajectory
    from export.bundle.format import Bundle, Settings
    from nemo_diffgemma.diffusion.sampler_config import SamplerConfig

_ROUTED_STEPS = 8  # of the last prompts: the traced functions run on the CPU


@dataclass
class CheckConfig:
    """Configuration of `export/check.py`."""

    bundle: str = "???"
    checkpoint: str | None = None  # another one than the bundle's own
    provider: str = "onnxruntime"  # tensorrt_rtx, tensorrt, tensorrt_llm
    reference_dtype: str = "float32"  # of the PyTorch model; bfloat16 halves what it takes of a GPU
    prompt_lengths: list[int] = field(default_factory=list)  # empty: below, at and above the sliding window
    rows: int = 3
    steps: int | None = None  # None: those of the bundle's loop, else 48
    canvases: int = 2
    seed: int = 0
    routing: bool = True  # compare chosen experts too; false: no second set of weights, on the CPU, to do it with
    tolerance: float = 1e-3  # float32: entropies in nats, keys and values
    agreement: float = 0.9  # lower precision: share of equal arg-max tokens


def check(config: CheckConfig, results: Results) -> dict[str, Any]:
    """Compare, show, judge."""
    from export import open_bundle
    from export.bundle.comparison import check_one_rank, in_lockstep, tokens_agree, torch_engine
    from export.bundle.format import read_bundle, verify_checksums
    from export.bundle.opening import check_provider
    from nemo_diffgemma import SamplerConfig
    from nemo_diffgemma.parallel.team import Team

    bundle = read_bundle(config.bundle)
    settings = bundle.settings
    lengths, batch = _fitting(config, bundle)
    by_pytorch = config.provider == "onnxruntime" and (settings.dtype == "bfloat16" or settings.quantization == "nvfp4")
    if by_pytorch:
        check_one_rank(bundle)
    else:
        check_provider(bundle, config.provider)
    verify_checksums(bundle)  # all that can be refused is, before anything is loaded
    team = Team.of_processes()
    sampler = SamplerConfig(max_denoising_steps=config.steps or settings.steps or 48, confidence_threshold=0.0)
    exact, sequences = _reference(config, bundle, lengths, batch, sampler)
    # one engine of the traced functions, for the routing and for what ONNX Runtime cannot compute
    routed = config.routing and settings.layout.world_size == 1
    traced = torch_engine(bundle) if routed or by_pytorch else None
    engine = traced[0] if by_pytorch and traced else open_bundle(config.bundle, config.provider)
    new = config.canvases * bundle.config.canvas_length
    differences: dict[int, Differences] = {}
    tokens: dict[int, list[bool]] = {}
    for length, run in exact.items():
        differences[length] = in_lockstep(engine, run)
        differences[length].keys_values = max(
            team.gather(differences[length].keys_values)
        )  # each rank has heads of its own
        tokens[length] = tokens_agree(engine, sequences[length], run.input_ids, new, sampler, config.seed)
    differences, tokens = team.from_rank_zero((differences, tokens))
    computed_by = "the traced functions in PyTorch" if by_pytorch else config.provider
    results.show(f"{config.bundle}: {settings.dtype}, experts {settings.quantization or settings.dtype}")
    results.show(f"by {computed_by}; PyTorch model in {config.reference_dtype}")
    results.show(_table(differences, tokens))
    routing: list[float] = []
    if routed and traced:
        few = replace(run, steps=run.steps[:_ROUTED_STEPS], experts=run.experts[:_ROUTED_STEPS])
        routing = in_lockstep(traced[0], few, traced[1]).routing
        results.show("tokens with the same experts, by layer: " + " ".join(f"{share:.3f}" for share in routing))
    return {**_judge(config, settings, differences, tokens, routing, results), "computed_by": computed_by}


def _reference(
    config: CheckConfig, bundle: Bundle, lengths: list[int], batch: int, sampler: SamplerConfig
) -> tuple[dict[int, Trajectory], dict[int, Tensor]]:
    """What the PyTorch model does with prompts of each length: trajectories and tokens. Its memory is free again."""
    from export.bundle.comparison import trajectory
    from nemo_diffgemma import DiffusionGemma, ParallelLayout
    from nemo_diffgemma.parallel import initialize

    initialize(ParallelLayout())
    dtype = DTYPES[config.reference_dtype]
    network = (
        DiffusionGemma.from_checkpoint(config.checkpoint, dtype)
        if config.checkpoint
        else DiffusionGemma.from_huggingface(bundle.assets, dtype)
    )
    generator = torch.Generator().manual_seed(config.seed)
    exact: dict[int, Trajectory] = {}
    sequences: dict[int, Tensor] = {}
    for length in lengths:
        ids = torch.randint(network.model_config.vocab_size, (batch, length), generator=generator)
        exact[length] = trajectory(network, ids, sampler, config.seed)
        new = config.canvases * network.model_config.canvas_length
        sequences[length] = network.generate(ids, max_new_tokens=new, sampler=sampler, seed=config.seed).sequences.cpu()
    del network
    gc.collect()  # modules and hooks refer to each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return exact, sequences


def _table(differences: Mapping[int, Differences], tokens: Mapping[int, list[bool]]) -> str:
    header = ["prompt", "encode: K/V", "step: entropy", "soft", "worst arg-max", "worst canvas", "rows of equal tokens"]
    rows = []
    for length, d in differences.items():
        numbers = [f"{number:.1e}" for number in (d.keys_values, d.entropy, d.soft)]
        shares = [f"{min(share):.4f}" for share in (d.argmax, d.canvas)]
        rows.append([length, *numbers, *shares, f"{sum(tokens[length])}/{len(tokens[length])}"])
    return table(header, rows)


def _judge(
    config: CheckConfig,
    settings: Settings,
    differences: Mapping[int, Differences],
    tokens: Mapping[int, list[bool]],
    routing: list[float],
    results: Results,
) -> dict[str, Any]:
    """The JSON line, and exit code 1 where the bundle differs."""
    worst = {name: max(getattr(d, name) for d in differences.values()) for name in ("keys_values", "entropy", "soft")}
    argmax = [share for d in differences.values() for share in d.argmax]
    rows = [same for of_length in tokens.values() for same in of_length]
    agreement = sum(argmax) / len(argmax)
    if settings.dtype == config.reference_dtype == "float32" and settings.quantization is None:
        fine = max(worst.values()) <= config.tolerance and all(rows)
    else:
        fine = agreement >= config.agreement and all(map(math.isfinite, worst.values()))
    results.exit_code |= int(not fine)  # one process may check several bundles
    known = {name: value if math.isfinite(value) else None for name, value in worst.items()}  # JSON has no infinity
    return {
        "differences": {"encode": known["keys_values"], "step": known["entropy"], "soft": known["soft"]},
        "agreement": {"argmax": agreement, "rows": sum(rows) / len(rows), "routing": routing},
        "verdict": "agrees" if fine else "differs",
    }


def _fitting(config: CheckConfig, bundle: Bundle) -> tuple[list[int], int]:
    """Prompt lengths that leave room for the canvases, and rows, as many as the engines take."""

    for name in ("steps", "rows", "canvases"):
        given = getattr(config, name)
        if given is not None and given < 1:
            raise ConfigurationError(f"{name}={given}; expected at least 1")
    if config.reference_dtype not in DTYPES:
        raise ConfigurationError(f"reference_dtype={config.reference_dtype!r}; use one of {', '.join(DTYPES)}")
    limits, model = bundle.settings.limits, bundle.config
    room = limits.context - (config.canvases - 1) * model.canvas_length
    window = model.sliding_window
    wanted = config.prompt_lengths or sorted({max(1, window - 1), window, window + 3, min(window, max(1, room))})
    lengths = [length for length in wanted if 1 <= length <= room]
    if not lengths:
        raise ConfigurationError(
            f"{config.bundle} takes {limits.context} columns of context, so with canvases={config.canvases} prompts "
            f"of 1 to {room} tokens: give prompt_lengths=[...], or fewer canvases"
        )
    return lengths, min(config.rows, limits.batch)


if __name__ == "__main__":
    start(check, CheckConfig, "export_check")
