"""Compare a checkpoint, in any layout, with transformers: states, logits, routing, tokens. Float32.

    python launch/verify.py checkpoint=<directory>
    python launch/verify.py checkpoint=<directory> parallel=tp2_ep2 prompt_lengths=[7,12]

transformers runs on rank 0 only. Tokens are compared under the same noise, on rows whose tokens transformers itself
keeps when its logits are disturbed by `probe` and by its negative: on the others rounding decides. Where it decides all
rows, other prompts and noise are tried; the verdict says if none was found.
The last line is JSON: differences (largest, absolute), agreement (shares), verdict. Exit code 1 beyond the tolerance.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from omegaconf import MISSING
from torch import Tensor

from launch.output import Results, table
from launch.processes import launch
from nemo_diffgemma.schema import ParallelGroup

_TRIES = 8  # prompts and noise with which rows are looked for whose tokens can be compared


@dataclass
class VerifyConfig:
    """What `launch/verify.py` reads."""

    checkpoint: str = MISSING  # Hugging Face directory, sharded checkpoint or .nemo
    parallel: ParallelGroup = field(default_factory=ParallelGroup)
    prompt_lengths: list[int] | None = None  # null: half the sliding window, and a little more than it
    rows: int = 4
    canvases: int = 2  # generated after each prompt
    max_denoising_steps: int = 8
    tolerance: float = 1e-4  # of states and logits
    probe: float = 1e-5
    seed: int = 0


def verify(config: VerifyConfig, results: Results) -> dict[str, Any]:
    """Compare one checkpoint."""
    from launch.checkpoints import open_network
    from nemo_diffgemma.checkpoint.open import format_of

    network = open_network(config.checkpoint, "float32")
    with tempfile.TemporaryDirectory(prefix="nemo_diffgemma.") as folder:
        directory = Path(config.checkpoint).expanduser()
        if format_of(directory) != "huggingface":
            directory = Path(on_first_rank(lambda: folder)) / "huggingface"
            network.save_huggingface(directory)
        reference = load_reference(directory)
        window = network.model.sliding_window
        lengths = config.prompt_lengths or [max(1, window // 2), window + 3]
        differences: dict[str, float] = {}
        routes: list[float] = []
        tokens: list[bool] = []
        for length in lengths:
            prompts = random_ids(config, network, (config.rows, length))
            compare_passes(network, reference, prompts, random_ids(config, network, None), differences, routes)
            tokens += compare_tokens(network, reference, prompts, config)
        for seed in range(config.seed + 1, config.seed + _TRIES):  # rounding may decide every row so far
            if tokens:
                break
            other = dataclasses.replace(config, seed=seed)
            tokens += compare_tokens(network, reference, random_ids(other, network, (config.rows, lengths[0])), other)
    agreement = {"router": sum(routes) / len(routes), "tokens": sum(tokens) / len(tokens) if tokens else None}
    equal = max(differences.values()) <= config.tolerance and all(tokens)
    results.exit_code = int(not equal)
    rows = [[name.replace("_", " "), f"{value:.2e}"] for name, value in differences.items()]
    rows += [["same experts", f"{agreement['router']:.4%}"], ["same tokens", f"{sum(tokens)} of {len(tokens)} rows"]]
    results.show(f"against transformers, prompts of {lengths} tokens\n{table(['compared', 'found'], rows)}\n")
    verdict = "different" if not equal else "equal" if tokens else "equal, tokens not compared"
    return {"differences": differences, "agreement": agreement, "verdict": verdict}


def on_first_rank(ask: Callable[[], Any]) -> Any:
    """What rank 0 finds, on every rank. An error there is an error everywhere."""
    from nemo_diffgemma.parallel import agree_error

    box: list[Any] = [None]
    error: Exception | None = None
    if dist.get_rank() == 0:
        try:
            box = [ask()]
        except Exception as found:
            error = found
    agree_error(error)
    dist.broadcast_object_list(box, src=0)
    return box[0]


def load_reference(directory: Path) -> Any:
    """transformers' model on rank 0, None elsewhere."""
    from nemo_diffgemma.parallel import agree_error

    reference, error = None, None
    if dist.get_rank() == 0:
        try:
            from launch.reference import Reference

            reference = Reference(directory)
        except Exception as found:
            error = found
    agree_error(error)
    return reference


def random_ids(config: VerifyConfig, network: Any, shape: tuple[int, int] | None) -> Tensor:
    """Uniform ids, the same on every rank; a canvas a row where no shape is given."""
    generator = torch.Generator().manual_seed(config.seed)
    return torch.randint(
        network.model.vocab_size, shape or (config.rows, network.model.canvas_length), generator=generator
    )


@torch.no_grad()
def compare_passes(
    network: Any, reference: Any, prompts: Tensor, canvas: Tensor, differences: dict[str, float], routes: list[float]
) -> None:
    """One encoder pass and two denoising passes, the second with self-conditioning."""

    def note(name: str, ours: Tensor, theirs: Tensor) -> None:
        differences[name] = max(differences.get(name, 0.0), float((ours.cpu() - theirs).abs().max()))

    from nemo_diffgemma.parallel import device

    first: Any = None  # logits without self-conditioning
    their_cache: Any = None
    with chosen_experts(network) as ours:
        hidden = network.encode_clean(prompts.to(device())).hidden_BSH
    cache = network.encode(prompts)

    def encode() -> Any:
        nonlocal their_cache
        with reference.routes(encoder=True) as chosen:
            their_cache, states = reference.encode(prompts)
        return states, chosen

    states, chosen = on_first_rank(encode)
    note("encoder_states", hidden, states)
    routes += [same_experts(network, a, b) for a, b in zip(ours, chosen, strict=True)]
    for name, temperature in (("logits", None), ("self_conditioned_logits", 0.6)):
        signal = None if temperature is None else first / temperature
        with chosen_experts(network) as ours:
            logits = network.denoise(canvas, cache, signal)

        def denoise(signal: Tensor | None = signal) -> Any:
            with reference.routes(encoder=False) as chosen:
                found = reference.denoise(canvas, their_cache, signal)
            return found, chosen

        first, chosen = on_first_rank(denoise)
        note(name, logits, first)
        routes += [same_experts(network, a, b) for a, b in zip(ours, chosen, strict=True)]


def compare_tokens(network: Any, reference: Any, prompts: Tensor, config: VerifyConfig) -> list[bool]:
    """Whether each robust row has the tokens of transformers."""
    from nemo_diffgemma.diffusion.noise import KeyedNoise

    sampler = dataclasses.replace(network.sampler_defaults, max_denoising_steps=config.max_denoising_steps)
    new_tokens = config.canvases * network.model.canvas_length
    noise = KeyedNoise.for_rows(config.seed, config.rows, network.model.canvas_length, network.model.vocab_size)
    ours = network.generate(prompts, max_new_tokens=new_tokens, sampler=sampler, noise=noise).sequences.cpu()

    def theirs() -> list[Tensor]:
        sizes = (0.0, config.probe, -config.probe)
        return [reference.generate(prompts, new_tokens, sampler, noise, size) for size in sizes]

    sequences = [*on_first_rank(theirs), ours]
    width = max(found.shape[1] for found in sequences)
    pad = -1 if sampler.pad_token_id is None else sampler.pad_token_id
    plain, up, down, ours = (torch.nn.functional.pad(x, (0, width - x.shape[1]), value=pad) for x in sequences)
    robust = (plain == up).all(-1) & (plain == down).all(-1)
    return (plain == ours).all(-1)[robust].tolist()


class chosen_experts:
    """Experts that each of our layers chooses meanwhile, [tokens of this rank, E] bool a layer."""

    def __init__(self, network: Any) -> None:
        self._routers = [layer.moe.router for layer in network.layers]

    def __enter__(self) -> list[Tensor]:
        found: list[Tensor] = []
        self._handles = [
            router.register_forward_hook(lambda module, args, output: found.append(output[1]))
            for router in self._routers
        ]
        return found

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


def same_experts(network: Any, ours: Tensor, theirs_NK: Tensor) -> float:
    """Share of tokens that go to the same experts."""
    group = network.groups.tp
    parts = [torch.empty_like(ours, dtype=torch.uint8) for _ in range(group.size())]
    dist.all_gather(parts, ours.to(torch.uint8).contiguous(), group=group)
    ours_NE = torch.cat(parts)[: len(theirs_NK)].cpu().bool()  # behind them, padding up to whole tensor ranks
    theirs_NE = torch.zeros_like(ours_NE).scatter(-1, theirs_NK, True)
    return float((ours_NE == theirs_NE).all(-1).float().mean())


if __name__ == "__main__":
    launch(verify, VerifyConfig, "verify")
