"""DiffusionGemma as users meet it: load, encode, denoise, generate, save. See the README's first example."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self

import torch
from torch import Tensor

from nemo_diffgemma.checkpoint import huggingface
from nemo_diffgemma.config import ModelConfig
from nemo_diffgemma.diffusion.generate import Denoised, Generation, Settled, StepInputs, generate
from nemo_diffgemma.diffusion.locked import check_locked
from nemo_diffgemma.diffusion.noise import KeyedNoise, Noise
from nemo_diffgemma.diffusion.sampler import accept
from nemo_diffgemma.diffusion.sampler_config import SamplerConfig
from nemo_diffgemma.errors import UserError
from nemo_diffgemma.model.cache import Cache
from nemo_diffgemma.model.fixed_step import CudaGraphs, FixedSteps
from nemo_diffgemma.model.initialisation import initialise
from nemo_diffgemma.model.network import Network
from nemo_diffgemma.model.segments import Stream, left_padding
from nemo_diffgemma.model.vocabulary import reused_scratch
from nemo_diffgemma.non_finite import raise_non_finite
from nemo_diffgemma.parallel.agreement import all_or_none
from nemo_diffgemma.parallel.groups import device
from nemo_diffgemma.repository import user_path
from nemo_diffgemma.serving.constraints.constraint import Constraint
from nemo_diffgemma.serving.constraints.sequence import ConstrainedBatch
from nemo_diffgemma.serving.settings import DEFAULT_MAX_TOKENS
from nemo_diffgemma.transfer import to_device

if TYPE_CHECKING:
    from nemo_diffgemma.serving.constraints.languages import Language
    from nemo_diffgemma.serving.local_chat import ChatAnswer, ChatDraft


class DiffusionGemma(Network):
    """The network in the layout that `parallel.initialize` made; every rank calls its methods with equal arguments."""

    def __init__(self, model: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(model, dtype)
        # whoever assigns `parameter.data` clears them
        self.fixed_steps = FixedSteps(CudaGraphs()) if device().type == "cuda" else None

    @classmethod
    def from_huggingface(cls, path: str | Path, dtype: torch.dtype = torch.float32) -> DiffusionGemma:
        """Load a released-format directory; each rank reads only its own slices.

        Raises `ConfigError`, `LayoutError` or `CheckpointError`, on every rank.
        """
        with all_or_none():
            config = ModelConfig.from_pretrained(path)
            huggingface.check(config, path)  # before memory is taken for sizes that may be wrong
            model = cls(config, dtype)
        huggingface.load(model, path)
        return model.eval()

    @classmethod
    def from_checkpoint(cls, path: str | Path, dtype: torch.dtype = torch.float32) -> DiffusionGemma:
        """Load a checkpoint of any format, weights only: a released-format directory, a sharded one or a `.nemo`.

        A directory with an adapter (adapter_config.json) is its base and the adapter.

        Collective. Raises `ConfigError`, `LayoutError` or `CheckpointError`, on every rank.
        """
        from nemo_diffgemma.checkpoint import nemo_archive, open, sharded  # they read what Megatron writes: seconds

        place, config = user_path(path), None
        with all_or_none():
            format = open.format_of(place)
        if format == "adapter":
            from nemo_diffgemma.lora import opening

            return opening.load(cls, place, dtype)
        with all_or_none():
            if format == "sharded":
                config = ModelConfig.from_pretrained(place / sharded.ASSETS)
                sharded.check(config, place)  # before memory is taken for sizes that may be wrong
        if format == "nemo":
            place = nemo_archive.unpacked_weights(place)
        if config is None:
            return cls.from_huggingface(place, dtype)
        model = cls(config, dtype)
        sharded.load_sharded(model, place)
        return model.eval()

    def save_huggingface(self, path: str | Path) -> huggingface.Written:
        """Write what `from_huggingface` reads: every tensor back, in the dtype of the file it came from.

        Raises `CheckpointError` for a network with adapters, which that format has no place for.
        """
        return huggingface.save(self, path)

    def merge_adapters(self) -> None:
        """Add the adapters to the weights, once to those that encoder and decoder share, and remove them."""
        from nemo_diffgemma.lora import attach

        if self.fixed_steps is not None:
            self.fixed_steps.clear()
        with all_or_none():
            attach.merge(self)

    @property
    def sampler_defaults(self) -> SamplerConfig:
        """Sampler settings of the checkpoint's generation_config.json, else Hugging Face's defaults."""
        return SamplerConfig.of_checkpoint(self.assets, self.model_config)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 256,
        sampler: SamplerConfig | None = None,
        noise: Noise | None = None,
        seed: int | Sequence[int] = 0,
        observe: Callable[[Denoised], None] | None = None,
        canvas_length: int | None = None,
        constraints: Sequence[Constraint | None] | None = None,
        locked: Sequence[Mapping[int, int] | None] | None = None,
    ) -> Generation:
        """Generate whole canvases after [B, S] prompts (left padded by `attention_mask`).

        `canvas_length` None is the model's; a short answer costs less with shorter canvases.

        `sampler` None takes the checkpoint's settings. `noise` replaces the noise keyed by `seed`: an int keys row r by
        (seed, r); one int a row keys each row as if it were alone. `observe` sees every denoising step.

        `constraints` say what texts the rows' answers must be. `locked` has for each row ids that stand in its answer
        from the first step on, by their places in it, from 0: `diffusion.locked` says what that means. An
        end-of-sequence id before the last of them ends nothing.

        Raises `UserError` for ids outside of the vocabulary, masks that are no left padding, settings that mean
        nothing, and constraints that no text fulfils with what is locked.
        """
        self.check_ids(input_ids)
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens={max_new_tokens}; expected at least 1 (rounded up to whole canvases)")
        longest = self.model_config.canvas_length
        length = longest if canvas_length is None else canvas_length
        if not 1 <= length <= longest:
            raise UserError(f"canvas_length={canvas_length}; expected 1 to {longest}, as the model was trained with")
        sampler = sampler or self.sampler_defaults
        sampler.check_ids(self.model_config.vocab_size)
        if noise is None:
            noise = KeyedNoise.for_rows(seed, input_ids.shape[0], length, self.model_config.vocab_size, device())
        held = self._checked_locks(locked, input_ids.shape[0], max_new_tokens)
        told = None
        if constraints is not None:
            canvases = -(-max_new_tokens // length)
            told = ConstrainedBatch(constraints, input_ids.shape[0], length, canvases, sampler.eos_ids, device(), held)
        with reused_scratch():
            return generate(
                self,
                to_device(input_ids, device()),
                left_padding(input_ids, attention_mask),
                canvas_length=length,
                max_new_tokens=max_new_tokens,
                sampler=sampler,
                noise=noise,
                observe=observe,
                constraints=told,
                locked=held,
            )

    def chat(
        self,
        messages: str | Sequence[Mapping[str, Any]],
        *,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        seed: int = 0,
        canvas_length: int | None = None,
        sampler: SamplerConfig | None = None,
        on_draft: Callable[[ChatDraft], None] | None = None,
        language: Language | None = None,
        **template: Any,
    ) -> ChatAnswer:
        """The next turn of a conversation: a text, or messages with `role` and `content`, in the chat template.

        A server's answer (/v1/chat/completions) to the same messages, settings and seed has the same tokens. `on_draft`
        sees the canvas after every denoising step, on every rank. The answer is of a `language` of
        `serving.constraints`, where one is given; `template` are variables of the chat template: `tools`,
        `enable_thinking` and others. Collective. Raises `UserError` without a tokenizer, and for what the template, the
        language or `generate` refuses.
        """
        from nemo_diffgemma.serving.local_chat import chat

        return chat(
            self,
            messages,
            max_tokens=max_tokens,
            seed=seed,
            canvas_length=canvas_length,
            sampler=sampler,
            on_draft=on_draft,
            language=language,
            **template,
        )

    def _checked_locks(
        self, locked: Sequence[Mapping[int, int] | None] | None, rows: int, tokens: int
    ) -> list[Mapping[int, int]]:
        if locked is not None and len(locked) != rows:
            raise UserError(f"locked has {len(locked)} entries for {rows} rows; give one, or None, for each row")
        held = [row or {} for row in locked or ()]
        for row in held:
            check_locked(row, tokens, self.model_config.vocab_size)
        return held

    def start(self, first_positions: Sequence[int]) -> Cache:
        """A cache of sequences without context, whose first tokens will have these positions."""
        return Cache.empty(first_positions)

    @torch.no_grad()
    def sampling_step(self, inputs: StepInputs, cache: Cache) -> Settled:
        """One denoising step and its sampling; new context joins the pass that denoises the canvases behind it."""
        context = inputs.context or ()
        lengths = [len(ids) for ids in context] or [0] * len(cache.sequences)
        places = [
            (index, span.end + new) for index, (span, new) in enumerate(zip(cache.sequences, lengths, strict=True))
        ]
        stream = self.stream(cache.sequences, lengths, places, [inputs.canvas.shape[1]] * len(places))
        settled = self._settled(inputs, stream, cache)
        return settled._replace(cache=settled.cache.trimmed(self.model_config) if context else cache)

    @torch.no_grad()
    def canvas_step(self, inputs: StepInputs, cache: Cache) -> Settled:
        """One denoising step of canvases alone: on a GPU of fixed shapes, recorded and replayed (model.fixed_step)."""
        if self.fixed_steps is None:
            return self.sampling_step(inputs, cache)
        return self.fixed_steps.run(self._settled, inputs, cache, self)

    def _settled(self, inputs: StepInputs, stream: Stream, cache: Cache) -> Settled:
        """A step of the tokens of `stream`; its cache is that of the pass."""
        tokens = torch.cat([*(inputs.context or ()), inputs.canvas.flatten()])
        result = self.run(tokens, stream, cache=cache, soft=inputs.soft, replicas_alike=True)
        assert result.canvas_hidden is not None
        shape, temperature = inputs.canvas.shape, inputs.temperature
        if isinstance(temperature, Tensor) and temperature.dim():  # one a sequence
            temperature = temperature[:, None].expand(shape).reshape(-1, 1)
        statistics = self.statistics(
            result.canvas_hidden,
            temperature,
            inputs.uniforms.flatten(),
            soft_embedding=not inputs.last,
            constraint=inputs.constraint,
            locked_N=None if inputs.locked is None else inputs.locked.flatten(),
        )
        assert statistics.sample_N is not None
        soft, entropy = statistics.soft_embedding_NH, statistics.entropy_N.view(shape)
        accepted, allowed = accept(entropy, inputs.entropy_bound), None
        argmax = statistics.argmax_N.view(shape)
        if inputs.constraint is not None:
            assert statistics.allowed_nC is not None
            allowed = inputs.constraint.allowed(argmax, statistics.allowed_nC)
        return Settled(
            canvas=torch.where(accepted, statistics.sample_N.view(shape), inputs.replacements),
            argmax=argmax,
            entropy=entropy,
            accepted=accepted,
            soft=None if soft is None else soft.view(*shape, -1),
            cache=result.cache,
            allowed=allowed,
        )

    def train(self, mode: bool = True) -> Self:
        """As torch's; training gets the memory of the recorded steps back."""
        if mode and self.fixed_steps is not None:
            self.fixed_steps.clear()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        """As torch's, for `to` and the like: weights move."""
        if self.fixed_steps is not None:
            self.fixed_steps.clear()
        return super()._apply(*args, **kwargs)

    def raise_non_finite(self, run: Callable[[], Any]) -> NoReturn:
        """Raise `NonFiniteError` naming the tensor or layer where NaN or infinity begins when `run` runs again."""
        recorded, self.fixed_steps = self.fixed_steps, None  # no module runs in a replay
        try:
            raise_non_finite(self, run)
        finally:
            self.fixed_steps = recorded

    def init_weights(self, seed: int) -> None:
        """Fill matrices with N(0, initializer_range), everything else with ones: a function of (seed, tensor name)."""
        initialise(self, seed)
