"""A conversation in Python, without a server: what `DiffusionGemma.chat` does.

    model = DiffusionGemma.from_checkpoint("google/...")
    answer = model.chat("Why is the sky blue?", seed=7, on_draft=lambda draft: print(draft.text))
    answer.text, answer.token_ids, answer.steps

The prompt is the one that /v1/chat/completions makes, so equal settings and seed give equal tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from nemo_diffgemma.diffusion.generate import Denoised, Generation
from nemo_diffgemma.diffusion.sampler_config import SamplerConfig
from nemo_diffgemma.errors import UserError
from nemo_diffgemma.parallel.agreement import all_or_none, on_rank_zero
from nemo_diffgemma.serving.answer_parts import AnswerParts, Said, Thought, ToolCall
from nemo_diffgemma.serving.constraints import Compiler, Constraint, Language, Vocabulary, bytes_of_tokens
from nemo_diffgemma.serving.constraints.token_automaton import TokenAutomaton
from nemo_diffgemma.serving.text import ServedText, files_of
from nemo_diffgemma.tokenizer import Text


@dataclass(frozen=True)
class ChatDraft:
    """A canvas after one of its steps, an entry a cell: `remaining` more may follow. Entropies are in nats."""

    canvas: int
    remaining: int
    text: str
    token_ids: list[int]
    accepted: list[bool]
    entropy: list[float]


@dataclass(frozen=True)
class ChatAnswer:
    """`text` is what the model says, `thoughts` what it thinks before; `token_ids` are all it wrote, the end included.

    `steps` are denoising steps of all canvases; `finish_reason` is "stop", or "length" where `max_tokens` cut it.
    """

    text: str
    thoughts: str
    tool_calls: list[ToolCall]
    token_ids: list[int]
    steps: int
    canvases: int
    finish_reason: str


class Model(Protocol):
    """What is needed of a network, or of an engine with its `generate`."""

    model_config: Any
    assets: Any

    @property
    def sampler_defaults(self) -> SamplerConfig: ...

    def generate(self, input_ids: torch.Tensor, **given: Any) -> Generation: ...


def chat(
    model: Model,
    messages: str | Sequence[Mapping[str, Any]],
    *,
    max_tokens: int,
    seed: int,
    canvas_length: int | None,
    sampler: SamplerConfig | None,
    on_draft: Callable[[ChatDraft], None] | None,
    language: Language | None,
    **template: Any,
) -> ChatAnswer:
    """See `DiffusionGemma.chat`, which has the defaults."""
    with all_or_none():
        text = text_of(model)
        prompt = text.encode_chat(_turns(messages), template)
        if max_tokens < 1:
            raise UserError(f"max_tokens={max_tokens}; expected at least 1")
    sampler, length = sampler or model.sampler_defaults, canvas_length or model.model_config.canvas_length

    def observe(step: Denoised) -> None:
        assert on_draft is not None
        tokens, accepted, entropy = torch.stack([step.argmax, step.accepted, step.entropy])[:, 0].tolist()
        ids = [int(id) for id in tokens]
        cells = (ids, [bool(one) for one in accepted], entropy)
        on_draft(ChatDraft(step.canvas, step.remaining - 1, text.decode(ids), *cells))

    generation = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=max_tokens,
        canvas_length=canvas_length,
        sampler=sampler,
        seed=[seed],  # keyed as if alone, as a server's requests are
        constraints=None if language is None else [_constraint(model, language, max_tokens)],
        observe=observe if on_draft else None,
    )
    tokens = generation.sequences[0, len(prompt) :].tolist()
    canvases = len(tokens) // length
    ends = [place for place, id in enumerate(tokens) if id in sampler.eos_ids]
    tokens = tokens[: ends[0] + 1 if ends else None][:max_tokens]
    is_whole = language is not None or tokens[-1] in sampler.eos_ids
    most_calls = None if template.get("tools") else 0
    parts = AnswerParts(text.decode, text.part_markers, most_calls=most_calls).push(tokens, is_last=True)
    return ChatAnswer(
        text="".join(part.text for part in parts if isinstance(part, Said)),
        thoughts="".join(part.text for part in parts if isinstance(part, Thought)),
        tool_calls=[part for part in parts if isinstance(part, ToolCall)],
        token_ids=tokens,
        steps=int(generation.forwards[0]),
        canvases=canvases,
        finish_reason="stop" if is_whole else "length",
    )


def _constraint(model: Model, language: Language, max_tokens: int) -> Constraint:
    """Compiled by rank 0. Raises `ConstraintError`, on every rank."""

    def compiled() -> TokenAutomaton:
        tokens = bytes_of_tokens(Text(model.assets).tokenizer)
        with Compiler(Vocabulary(tokens, model.model_config.vocab_size, model.sampler_defaults.eos_ids)) as compiler:
            return compiler.compile(language)

    return Constraint(on_rank_zero(compiled), max_tokens)


def _turns(messages: str | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Raises `UserError`."""
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            expected = "expected a text, or messages like {'role': 'user', 'content': 'Hello'}"
            raise UserError(f"messages[{index}] is {message!r}; {expected}")
    return [dict(message) for message in messages]


def text_of(model: Model) -> ServedText:
    """The tokenizer beside a model's weights, as a server reads it; read once. Raises `UserError` without one."""
    if (found := getattr(model, "_served_text", None)) is None:
        files = files_of(Text(model.assets))
        if files is None:
            raise UserError(
                f"{model.assets or 'this model'} has no tokenizer.json, so it cannot chat; copy the tokenizer's files "
                "there, or give token ids to generate()"
            )
        found = model._served_text = ServedText(files)  # type: ignore[attr-defined]
    return found
