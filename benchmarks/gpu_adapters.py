"""Training steps with adapters on the released network with random weights, on one GPU: seconds and memory.

    python benchmarks/gpu_adapters.py       # as experiment=lora_1xh100: 3 rows of 1024 tokens, a canvas each

Compare the peak with `launch/dry_run.py model.lora.rank=16 model.lora.alpha=32 model.lora.experts=each rows=3
prompts=[256] responses=[768]`.
"""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.gpu import network
from nemo_diffgemma import ParallelLayout
from nemo_diffgemma.diffusion.objective import ObjectiveConfig
from nemo_diffgemma.diffusion.rows import Rows
from nemo_diffgemma.lora.attach import attach, initialise
from nemo_diffgemma.lora.config import LoraGroup
from nemo_diffgemma.model.adapters import Adapted
from nemo_diffgemma.parallel import initialize
from nemo_diffgemma.schema import OptimGroup
from nemo_diffgemma.training import optimizer, overlap, step

ROWS, LENGTH, PROMPT, STEPS = 3, 1024, 256, 6
LORA = LoraGroup(rank=16, alpha=32, targets=["attention", "mlp"], experts="each")


def main() -> None:
    initialize(ParallelLayout())
    model = network(30).train()
    model.recompute = "full"
    attach(model, Adapted(LORA.sizes(model.model_config)))
    initialise(model, 0)
    print(f"{torch.cuda.get_device_name()}: weights and adapters {torch.cuda.memory_allocated() / 1e9:.1f} GB")
    optim = OptimGroup()
    wrapped = optimizer.data_parallel(model, optim)
    adapter = optimizer.MegatronAdapter(optimizer.build(wrapped, optim, model.dtype))
    print(f"with gradients and optimizer {torch.cuda.memory_allocated() / 1e9:.1f} GB")
    tokens = torch.randint(2, 262_000, (ROWS * LENGTH,), generator=torch.Generator().manual_seed(0)).cuda()
    rows = Rows(tokens, [[(PROMPT, LENGTH)]] * ROWS, [LENGTH] * ROWS, range(ROWS), 1)

    def backward(scored: Any, last: bool) -> None:
        with wrapped.no_sync():
            scored.backward_canvases()
        with nullcontext() if last else wrapped.no_sync():
            scored.backward_context()

    for index in range(STEPS):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        wrapped.zero_grad_buffer()
        adapter.zero_grad()
        sums = step.accumulate(model, rows, ObjectiveConfig(), 0, global_batch_size=ROWS, backward=backward)
        numbers = sums.read()
        overlap.finalize_gradients(wrapped)
        adapter.lr = 1e-4
        adapter.step()
        overlap.start_gather(wrapped)
        torch.cuda.synchronize()
        seconds, peak = time.perf_counter() - began, torch.cuda.max_memory_allocated() / 1e9
        print(
            f"step {index}: {seconds:.3f} s, peak {peak:.2f} GB, {numbers.flops / 1e12:.1f} useful TFLOP, "
            f"loss {numbers.loss:.4f}, gradient norm {adapter.grad_norm:.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
