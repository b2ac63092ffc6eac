"""Convert a checkpoint: between a Hugging Face directory, a sharded checkpoint and a .nemo archive, bit for bit.

    python launch/convert.py source=runs/sudoku_cpu/mine/checkpoints/step-1300 target=/tmp/sudoku format=huggingface
    python launch/convert.py source=<directory> target=model.nemo format=nemo
    python launch/convert.py source=<directory> target=out format=sharded dry_run=true   # headers; unpacks a .nemo
    python launch/convert.py source=<adapter> target=merged format=huggingface           # merged into its base

A few blocks are held at a time, whatever the size; processes (parallel.tensor=4) share the files. Interrupted, the same
command goes on. The last line is JSON: tensors, bytes (as a Hugging Face directory holds them), peak_memory (of the
largest process).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from omegaconf import MISSING

from nemo_diffgemma.cli.output import Results
from nemo_diffgemma.cli.start import start
from nemo_diffgemma.schema import ClusterGroup, ConfigurationError, ParallelGroup


@dataclass
class ConvertConfig:
    """Configuration of `launch/convert.py`."""

    source: str = MISSING  # a checkpoint of any format, or an adapter
    target: str = MISSING  # a directory that is empty or does not exist; for nemo a file
    format: str = "huggingface"  # sharded, nemo
    weights: str = "trained"  # ema: the average that a run with optim.ema has kept
    dry_run: bool = False  # say what would be converted; with a cluster, show its script
    parallel: ParallelGroup = field(default_factory=ParallelGroup)
    cluster: ClusterGroup = field(default_factory=ClusterGroup)


def convert(config: ConvertConfig, results: Results) -> dict[str, Any]:
    """Convert one checkpoint."""
    from nemo_diffgemma.checkpoint import streaming
    from nemo_diffgemma.checkpoint.average import WEIGHTS
    from nemo_diffgemma.checkpoint.contents import contents
    from nemo_diffgemma.checkpoint.open import check_target
    from nemo_diffgemma.checkpoint.tensor_files import CheckpointError

    if config.weights not in WEIGHTS:
        raise ConfigurationError(f"weights={config.weights!r}; use one of {', '.join(WEIGHTS)}")
    check_target(config.target, config.format)  # before anything is read
    source = contents(config.source)
    if config.dry_run:
        opened, files = streaming.plan(config.source, config.format, config.weights)
        text, carried = len(opened.tensors), len(opened.carried)
        results.show(f"{text + carried} tensors, each with one place: {text} of text, {carried} carried as they are")
        results.show(f"{len(files.names)} files: {files.names[0]} to {files.names[-1]}")
    else:
        streaming.convert(config.source, config.target, config.format, config.weights)
        written = contents(config.target)
        if (written.tensors, written.bytes) != (source.tensors, source.bytes):
            raise CheckpointError(
                f"{config.source} holds {source.tensors} tensors of {source.bytes} bytes, but {config.target} has "
                f"{written.tensors} of {written.bytes}; do not use it, and report this as a defect"
            )
    verb = "would be written" if config.dry_run else "written"
    results.show(f"{source.tensors} tensors, {source.bytes / 1e9:.3f} GB {verb} to {config.target} ({config.format})")
    return {"tensors": source.tensors, "bytes": source.bytes, "peak_memory": _peak_memory()}


def _peak_memory() -> int:
    """Bytes of resident memory of the process that had most."""
    import torch
    import torch.distributed as dist

    from nemo_diffgemma.cli.child_process import peak_memory
    from nemo_diffgemma.parallel import device

    peak = torch.tensor(peak_memory(), device=device())
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    return int(peak)


if __name__ == "__main__":
    start(convert, ConvertConfig, "convert", distributed=True)
