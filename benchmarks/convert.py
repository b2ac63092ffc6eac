"""Memory and speed of converting a large checkpoint: to sharded and back, compared byte for byte.

    python benchmarks/convert.py --layers 4 --work /tmp/convert        # 4.0 B parameters, 8 GB three times on the disk

The model has the released sizes, but for its number of layers, and random values in bfloat16. Prints a row of a table:
parameters, and of each direction seconds and the largest memory of its process.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from math import prod
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import xxhash
import yaml
from torch import Tensor

from nemo_diffgemma.checkpoint.names import released_tensors
from nemo_diffgemma.checkpoint.stored import StoredTensor, of_files
from nemo_diffgemma.checkpoint.streamed_files import write_safetensors
from nemo_diffgemma.checkpoint.tensor_files import TensorFiles
from nemo_diffgemma.config import ModelConfig
from nemo_diffgemma.repository import ROOT

FILES = 4


@dataclass(frozen=True)
class RandomTensor(StoredTensor):
    """Rows of one random buffer, from a place of its own on."""

    seed: int = 0

    def rows(self, start: int, stop: int) -> Tensor:
        row = prod(self.shape[1:])
        first = (self.seed * 977 + start * row) % len(_RANDOM)
        copies = 1 + -(-(first + (stop - start) * row) // len(_RANDOM))
        return _RANDOM.repeat(copies)[first : first + (stop - start) * row].view(stop - start, *self.shape[1:])


_RANDOM = torch.randn((1 << 22) + 1, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)


def make(directory: Path, layers: int) -> int:
    """Write the source -> its number of parameters."""
    sizes = yaml.safe_load((ROOT / "conf/model/diffusiongemma_26b_a4b.yaml").read_text())["architecture"]
    kinds = ["sliding_attention"] * (layers - 1) + ["full_attention"]
    config = ModelConfig(**{**sizes, "num_hidden_layers": layers, "layer_types": kinds})
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config.to_huggingface()))
    tensors = {
        name: (RandomTensor(shape, torch.bfloat16, (), seed), torch.bfloat16, shape)
        for seed, (name, shape) in enumerate(released_tensors(config).items())
    }
    for number in range(FILES):
        part = dict(list(tensors.items())[number::FILES])
        write_safetensors(directory / f"model-{number + 1:05}-of-{FILES:05}.safetensors", part, lambda *_: None)
    return sum(prod(shape) for _, _, shape in tensors.values())


def convert(source: Path, target: Path, format: str) -> tuple[float, float]:
    """Seconds, and GiB of the process at its largest."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, ROOT / "launch/convert.py", f"source={source}", f"target={target}", f"format={format}"],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return time.perf_counter() - started, json.loads(done.stdout.splitlines()[-1])["peak_memory"] / 2**30


def checksums(directory: Path) -> dict[str, str]:
    """Of the values of each tensor."""
    with TensorFiles(directory) as files:
        tensors = of_files(files)
    found = {}
    for name, tensor in tensors.items():
        state = xxhash.xxh3_128()
        for rows in tensor.blocks():
            state.update(tensor.rows(*rows).flatten().view(torch.uint8).numpy())
        found[name] = state.hexdigest()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--work", type=Path, required=True, help="a directory that does not exist")
    given = parser.parse_args()
    try:
        parameters = make(given.work / "source", given.layers)
        there = convert(given.work / "source", given.work / "sharded", "sharded")
        back = convert(given.work / "sharded", given.work / "back", "huggingface")
        same = checksums(given.work / "source") == checksums(given.work / "back")
    finally:
        shutil.rmtree(given.work, ignore_errors=True)
    print("| parameters | to sharded | back | equal |")
    both = " | ".join(f"{seconds:.0f} s, {memory:.2f} GiB" for seconds, memory in (there, back))
    print(f"| {parameters / 1e9:.1f} B | {both} | {same} |")
    if not same:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
