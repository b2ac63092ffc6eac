"""Generation with the graphs of a bundle: the same loop, sampler and noise as `DiffusionGemma.generate`.

The context lies at the right end of buffers; sliding layers keep the last `window - 1` columns. On a GPU the columns
are rounded up to a bucket, so that calls keep their shapes from canvas to canvas and sessions replay what they have
recorded. Before there is any context a buffer has one column that no token sees: engines have no empty axes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F

from export.engine.onnx_session import Session, Tensors
from export.graph.model import empty_context
from export.graph.tracing import past_names, present_names
from nemo_diffgemma.checkpoint.tensor_files import TensorFiles
from nemo_diffgemma.config import SLIDING, ModelConfig
from nemo_diffgemma.diffusion.generate import (
    CanvasInputs,
    Denoised,
    DenoisedCanvas,
    Generation,
    Settled,
    StepInputs,
    generate,
)
from nemo_diffgemma.diffusion.noise import KeyedNoise, Noise
from nemo_diffgemma.diffusion.sampler_config import SamplerConfig
from nemo_diffgemma.errors import UserError
from nemo_diffgemma.model.fixed_step import bucket
from nemo_diffgemma.model.segments import left_padding
from nemo_diffgemma.non_finite import DAMAGED, NonFiniteError, first_non_finite, is_finite
from nemo_diffgemma.parallel.agreement import agreed
from nemo_diffgemma.parallel.layout import ParallelLayout
from nemo_diffgemma.parallel.team import tensors_of_rank_zero
from nemo_diffgemma.transfer import to_device

# outputs of a step that decide what comes next: rank 0's, as separately built engines may differ in the last bit
_DECIDING = ("next_canvas", "argmax", "entropy", "accepted", "accepted_count")
LOOP_STEPS = 256  # most of a loop whose number of steps is an input


class EngineError(UserError):
    """Something an engine was not built for; the message says what it was built for and how to build another."""


@dataclass(frozen=True)
class Context:
    """What the canvases see: so many columns of each row, in the buffers of each rank of this process.

    `left_padding` counts those of a row before its first token; the graphs call this input `first`, and `lengths`
    `past_length`.
    """

    left_padding: tuple[int, ...]
    lengths: tuple[int, ...]
    past: tuple[dict[str, Tensor], ...]

    @property
    def length(self) -> int:
        """Columns of the longest row."""
        return max(self.lengths)

    @staticmethod
    def of(contexts: Sequence[Context]) -> Context:
        """The rows of several contexts, each at the right end of buffers that have room for all of them."""
        if len(contexts) == 1:
            return contexts[0]
        past = tuple(
            {name: _beside([context.past[rank][name] for context in contexts]) for name in buffers}
            for rank, buffers in enumerate(contexts[0].past)
        )
        return Context(
            tuple(columns for context in contexts for columns in context.left_padding),
            tuple(length for context in contexts for length in context.lengths),
            past,
        )

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        """What the graphs are given besides the buffers: sent to the device once a context, not once a step."""
        device = next(iter(self.past[0].values())).device
        numbers = {"first": torch.tensor(self.left_padding), "past_length": torch.tensor(self.lengths)}
        return {name: to_device(number, device) for name, number in numbers.items()}


def _beside(buffers: Sequence[Tensor]) -> Tensor:
    """[B, G, P, D] of buffers [_, G, _, D]."""
    columns = max(buffer.shape[2] for buffer in buffers)
    return torch.cat([F.pad(buffer, (0, 0, columns - buffer.shape[2], 0)) for buffer in buffers])


@dataclass(frozen=True)
class Limits:
    """What the engines take: rows of a batch, context columns in all, and columns of one call of `encode`."""

    batch: int
    context: int
    chunk: int


class _Watched:
    """A session that remembers which of its outputs were not finite, in `not_finite`."""

    def __init__(self, graph: str, session: Session) -> None:
        self._graph, self._session = graph, session
        self.not_finite: list[str] = []

    def run(self, shared: Tensors, ranked: Sequence[Tensors]) -> list[dict[str, Tensor]]:
        outputs = self._session.run(shared, ranked)
        for rank in outputs:
            self.not_finite += [
                f"output {name} of the graph {self._graph}" for name, tensor in rank.items() if not is_finite(tensor)
            ]
        return outputs


class Engine:
    """The model of a bundle; `generate` is `DiffusionGemma.generate`. Made by `open_bundle`.

    `encode`, `step` and `loop` are sessions; `loop` may be missing, and `loop_steps` None means any number of steps.
    `ranks` are those that this process runs; `device` is where inputs are wanted.
    """

    def __init__(
        self,
        config: ModelConfig,
        layout: ParallelLayout,
        dtype: torch.dtype,
        sessions: Mapping[str, Session],
        limits: Limits,
        assets: Path,
        ranks: Sequence[int],
        loop_steps: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.model_config, self.layout, self.dtype = config, layout, dtype
        self.limits, self.assets, self.device = limits, assets, device or torch.device("cpu")
        self.loop_steps = loop_steps
        self._sessions = sessions
        self.ranks = tuple(ranks)
        self.columns_for: Callable[[int], int] = bucket if self.device.type == "cuda" else int
        self._alone = len(self.ranks) == layout.world_size  # no other process runs ranks of this engine
        self._ranks = [{"rank": torch.tensor(rank, device=self.device)} for rank in ranks]

    @property
    def sampler_defaults(self) -> SamplerConfig:
        """Sampler settings of the checkpoint."""
        return SamplerConfig.of_checkpoint(self.assets, self.model_config)

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 256,
        sampler: SamplerConfig | None = None,
        noise: Noise | None = None,
        seed: int | Sequence[int] = 0,
        observe: Callable[[Denoised], None] | None = None,
    ) -> Generation:
        """Generate whole canvases after [B, S] prompts, as `DiffusionGemma.generate` does.

        Runs `step` until a canvas is stable, or `loop` in one call where it has the right number of steps, stopping is
        off (`confidence_threshold=0`) and nobody observes. Raises `EngineError` beyond what the engines were built for.
        """
        sampler = sampler or self.sampler_defaults
        sampler.check_ids(self.model_config.vocab_size)
        self._check(input_ids, max_new_tokens)
        rows, length = input_ids.shape[0], self.model_config.canvas_length
        if noise is None:
            noise = KeyedNoise.for_rows(seed, rows, length, self.model_config.vocab_size, self.device)
        whole = "loop" in self._sessions and observe is None and sampler.confidence_threshold <= 0
        steps = sampler.max_denoising_steps
        whole = whole and (self.loop_steps == steps or (self.loop_steps is None and steps <= LOOP_STEPS))
        return generate(
            self,
            input_ids.to(self.device),
            left_padding(input_ids, attention_mask),
            canvas_length=length,
            max_new_tokens=max_new_tokens,
            sampler=sampler,
            noise=noise,
            observe=observe,
            denoise_canvas=self._denoise_canvas if whole else None,
        )

    # -- the graphs ------------------------------------------------------------------------------------------------

    def encode(self, ids: Tensor, context: Context) -> Context:
        """The context with [B, S] more columns."""
        for chunk in ids.split(self.limits.chunk, dim=1):
            fresh = self._sessions["encode"].run(
                {"input_ids": chunk, **context.inputs},
                [{**rank, **past} for rank, past in zip(self._ranks, context.past, strict=True)],
            )
            past = tuple(self._append(old, new, context.length) for old, new in zip(context.past, fresh, strict=True))
            lengths = tuple(length + chunk.shape[1] for length in context.lengths)
            context = Context(context.left_padding, lengths, past)
        return context

    def step(self, context: Context, inputs: Tensors) -> dict[str, Tensor]:
        """One denoising step; `inputs` are the step's own (canvas, soft, temperature, ...)."""
        return self._denoise("step", context, inputs)

    def no_signal(self, rows: int) -> Tensor:
        """The self-conditioning signal of a first step."""
        shape = (rows, self.model_config.canvas_length, self.model_config.hidden_size)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def _denoise(self, graph: str, context: Context, inputs: Tensors) -> dict[str, Tensor]:
        ranked = [{**rank, **past} for rank, past in zip(self._ranks, context.past, strict=True)]
        outputs = self._sessions[graph].run({**inputs, **context.inputs}, ranked)[0]
        return (
            outputs if self._alone else {**outputs, **tensors_of_rank_zero({name: outputs[name] for name in _DECIDING})}
        )

    def _append(self, old: Mapping[str, Tensor], new: Mapping[str, Tensor], length: int) -> dict[str, Tensor]:
        past = {}
        window = max(1, self.model_config.sliding_window - 1)  # of 1 it sees nothing, but engines have no empty axes
        for layer in range(self.model_config.num_hidden_layers):
            seen = window if self.model_config.layer_kind(layer) == SLIDING else None
            for name, fresh in zip(past_names(layer), present_names(layer), strict=True):
                past[name] = self._appended(old[name], new[fresh], length, seen)
        return past

    def _appended(self, old_BGPD: Tensor, new_BGSD: Tensor, length: int, seen: int | None) -> Tensor:
        """`length` columns and the new ones at the right end of a buffer; no more than are `seen` are kept."""
        joined = torch.cat([old_BGPD, new_BGSD], dim=2) if length else new_BGSD
        length += new_BGSD.shape[2]
        kept = length if seen is None else min(length, seen)
        columns = max(kept, min(self.columns_for(length), self.limits.context, seen or self.limits.context))
        missing = columns - joined.shape[2]
        return F.pad(joined, (0, 0, missing, 0)) if missing >= 0 else joined[:, :, -columns:].contiguous()

    # -- what generation asks for ------------------------------------------------------------------------------------

    def start(self, first_positions: Sequence[int]) -> Context:
        """No context yet, of rows whose first tokens will have these positions: that many columns are padding."""
        buffers = empty_context(self.model_config, self.layout, len(first_positions), self.dtype, self.device)
        past = {
            name: buffer
            for layer, pair in enumerate(buffers)
            for name, buffer in zip(past_names(layer), pair, strict=True)
        }
        return Context(tuple(first_positions), (0,) * len(first_positions), tuple(dict(past) for _ in self._ranks))

    def sampling_step(self, inputs: StepInputs, cache: Context) -> Settled:
        """One denoising step of [B, C] canvases; new context is encoded first.

        `inputs.entropy_bound` may be one for each sequence, [B], as temperatures may.
        """
        if inputs.constraint is not None:
            raise EngineError("engines keep no logits, so they cannot be constrained; generate from the checkpoint")
        if inputs.locked is not None:
            raise EngineError("engines cannot hold tokens in their places (locked); generate from the checkpoint")
        cache, rows = self._extended(cache, inputs.context), inputs.canvas.shape[0]
        outputs = self.step(
            cache,
            {
                "canvas": inputs.canvas,
                "soft": self.no_signal(rows) if inputs.soft is None else inputs.soft,
                "temperature": self._of_rows(inputs.temperature, rows),
                "entropy_bound": self._of_rows(inputs.entropy_bound, rows),
                "uniforms": inputs.uniforms,
                "replacements": inputs.replacements,
            },
        )
        return Settled(
            canvas=outputs["next_canvas"],
            argmax=outputs["argmax"],
            entropy=outputs["entropy"],
            accepted=outputs["accepted"],
            soft=outputs["next_soft"],
            cache=cache,
        )

    def canvas_step(self, inputs: StepInputs, cache: Context) -> Settled:
        """One denoising step without new context; sessions on GPUs record and replay calls of equal shapes."""
        return self.sampling_step(inputs, cache)

    def agreed(self, flags: Tensor) -> Tensor:
        """Which of the flags hold in every process that runs ranks of this engine."""
        return flags if self._alone else agreed(flags)

    def raise_non_finite(self, run: Callable[[], Any]) -> NoReturn:
        """Raise `NonFiniteError` naming the tensor of the checkpoint, or the output of a graph, that is not finite."""
        with TensorFiles(self.assets) as files:
            weight = first_non_finite((name, files.open(file).get_tensor(name)) for name, file in files.files.items())
        if weight is not None:
            raise NonFiniteError(f"{weight}, so nothing that these engines compute is a number; {DAMAGED}")
        watched = {name: _Watched(name, session) for name, session in self._sessions.items()}
        before, self._sessions = self._sessions, watched
        try:
            run()
        finally:
            self._sessions = before
        output = next((text for session in watched.values() for text in session.not_finite), "a result")
        raise NonFiniteError(
            f"{output} is not finite (NaN or infinite), though all weights are; values are too large for {self.dtype} "
            "or for the quantisation: build with dtype=bfloat16 or float32, or without quantization="
        )

    def _of_rows(self, setting: float | Tensor, rows: int) -> Tensor:
        """float32 [..., B] of one number for all rows, or of one for each."""
        numbers = torch.as_tensor(setting, dtype=torch.float32, device=self.device)
        return numbers.expand(*numbers.shape[:-1], rows).contiguous()

    def _extended(self, cache: Context, context: Sequence[Tensor] | None) -> Context:
        """Extend the context by every row's new ids, left-padded to equal columns as the graphs take them."""
        if not context:
            return cache
        padding = cache.left_padding if cache.length == 0 else (0,) * len(context)
        rows = [F.pad(ids, (columns, 0)) for ids, columns in zip(context, padding, strict=True)]
        return self.encode(torch.stack(rows), cache)

    def _denoise_canvas(self, inputs: CanvasInputs, cache: Context) -> DenoisedCanvas:
        """All steps of a canvas in one call of `loop`; its randomness is drawn beforehand."""
        cache, noise = self._extended(cache, inputs.context), inputs.noise
        rows = noise.initial.shape[0]
        outputs = self._denoise(
            "loop",
            cache,
            {
                "canvas": noise.initial,
                "soft": self.no_signal(rows),
                "temperatures": self._of_rows(inputs.temperatures_N[:, None], rows),
                "entropy_bound": self._of_rows(inputs.entropy_bound, rows),
                "uniforms": noise.uniforms,
                "replacements": noise.replacements,
            },
        )
        live_B = (~inputs.finished_B).long() * len(noise.uniforms)
        return DenoisedCanvas(outputs["argmax"], cache, live_B, outputs["entropy"].isfinite().all())

    def _check(self, input_ids: Tensor, max_new_tokens: int) -> None:
        config, limits = self.model_config, self.limits
        if input_ids.dim() != 2 or input_ids.numel() == 0:
            raise EngineError(
                f"input_ids has shape {list(input_ids.shape)}; expected [rows, tokens], at least one row of one token"
            )
        if max_new_tokens < 1:
            raise EngineError(f"max_new_tokens={max_new_tokens}; expected at least 1 (rounded up to whole canvases)")
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= config.vocab_size:
            raise EngineError(
                f"input_ids holds {low if low < 0 else high}; token ids go from 0 to {config.vocab_size - 1}"
            )
        if input_ids.shape[0] > limits.batch:
            raise EngineError(
                f"{input_ids.shape[0]} rows, but the engines were built for batches of 1 to {limits.batch}; send "
                f"fewer, or build with max_batch_size={input_ids.shape[0]}"
            )
        canvases = -(-max_new_tokens // config.canvas_length)
        needed = input_ids.shape[1] + (canvases - 1) * config.canvas_length
        if needed > limits.context:
            raise EngineError(
                f"{input_ids.shape[1]} prompt tokens and {max_new_tokens} new ones need a context of {needed} columns, "
                f"but the engines were built for at most {limits.context}; shorten the prompt, or build with "
                f"max_context={needed}"
            )
