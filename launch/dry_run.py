"""Play one rank of any world without a GPU: memory, FLOPs, launches, host waits and collectives of the real code.

    python launch/dry_run.py verb=train parallel=tp4_ep8 world=512 rank=77
    python launch/dry_run.py verb=generate gpu=rtx_5090
    python launch/dry_run.py verb=train parallel.expert=8 model.recompute=none prompts=[100,700] responses=[256,2048]

torch itself chooses the kernels of the GPU (conf/gpu), on tensors that have shapes and no data: docs/dry_run.md says
how to read the result and what it cannot see. Numbers of a network of many layers come from three small ones (launches
of the optimizer within some hundred); whole=true plays all of its layers. A C compiler is needed once.

The last line is JSON: verb, world, rank, peak_gb, phases (peak_gb, launches, waits, tflop and wire_gb of each; those of
train add up to the step's; denoise is one step in the steady state) and violations. With violations the exit code is 1.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nemo_diffgemma.cli.output import Results
from nemo_diffgemma.cli.start import start
from nemo_diffgemma.cli.torchrun import processes_of
from nemo_diffgemma.config import ModelConfig
from nemo_diffgemma.gpus import Gpu
from nemo_diffgemma.schema import ConfigurationError, ModelGroup, OptimGroup, ParallelGroup, SamplerGroup


@dataclass
class DryRunConfig:
    """Configuration of `launch/dry_run.py`."""

    verb: str = "train"  # generate
    model: ModelGroup = field(default_factory=ModelGroup)  # its architecture; no checkpoint is read
    optim: OptimGroup = field(default_factory=OptimGroup)
    parallel: ParallelGroup = field(default_factory=ParallelGroup)
    sampler: SamplerGroup = field(default_factory=SamplerGroup)
    gpu: Gpu | None = None  # a file of conf/gpu
    world: int | None = None  # processes; null: as many as the layout needs
    rank: int = 0  # the one that is played
    prompts: list[int] = field(default_factory=list)  # tokens of each row's prompt; []: 256 to train, 1024 to generate
    responses: list[int] = field(default_factory=list)  # as long as prompts, or one for all rows; []: 768
    rows: int | None = None  # of a micro-batch; null: as many as prompts or responses has
    micro_batches: int = 1  # of one optimizer step
    max_new_tokens: int = 256
    temporary_gb: float = 2.0  # more in one allocation is a violation
    whole: bool = False  # play all layers


def dry_run(config: DryRunConfig, results: Results) -> dict[str, Any]:
    """Play one rank in a process that finds the stand-in driver."""
    from nemo_diffgemma.cli.child_process import call_in_child
    from nemo_diffgemma.dry_run.driver import environment
    from nemo_diffgemma.dry_run.report import as_json, tables
    from nemo_diffgemma.dry_run.whole import measure_in_child

    if config.gpu is None:
        raise ConfigurationError("gpu is not given; use gpu=<file of conf/gpu>")
    case = case_of(config)
    measured, _ = call_in_child(measure_in_child, case, config.whole, environment=environment(config.gpu))
    results.show(f"{config.verb}, rank {case.rank} of {case.world}, {case.layout}, {config.gpu.name}\n")
    results.show(tables(case, measured))
    for text, times in measured.violations.items():
        results.show(f"violation ({times} times): {text}")
    results.exit_code = 1 if measured.violations else 0
    return as_json(case, measured)


def case_of(config: DryRunConfig) -> Any:
    """What is played. Raises `ConfigurationError`, `LayoutError` or `DryRunError`."""
    from nemo_diffgemma.dry_run.case import PROMPTS, RESPONSES, Case

    if config.model.checkpoint is not None:
        raise ConfigurationError("model.checkpoint: a dry run reads no weights; give its sizes as model=<file>")
    layout = config.parallel.layout()
    prompts, responses = config.prompts or list(PROMPTS.get(config.verb, (1,))), config.responses or list(RESPONSES)
    rows = max(len(prompts), len(responses)) if config.rows is None else config.rows
    canvas = ModelConfig(**config.model.architecture).canvas_length
    return Case(
        verb=config.verb,
        model=config.model,
        optim=config.optim,
        layout=layout,
        world=processes_of(config.parallel) if config.world is None else config.world,
        rank=config.rank,
        prompts=_of_rows("prompts", prompts, rows),
        responses=_of_rows("responses", responses, rows),
        micro_batches=config.micro_batches,
        canvases=-(-config.max_new_tokens // canvas),
        steps=config.sampler.max_denoising_steps or 48,
        temporary_gb=config.temporary_gb,
    )


def _of_rows(name: str, lengths: list[int], rows: int) -> tuple[int, ...]:
    if rows < 1:
        raise ConfigurationError(f"rows={rows}; expected at least 1")
    if len(lengths) not in (1, rows):
        raise ConfigurationError(
            f"{name}={lengths} has {len(lengths)} lengths; expected one, or one for each of {rows} rows"
        )
    return tuple(lengths * rows if len(lengths) == 1 else lengths)


if __name__ == "__main__":
    start(dry_run, DryRunConfig, "dry_run")
