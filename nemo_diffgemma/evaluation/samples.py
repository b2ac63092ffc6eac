"""Answers that a network gives to held-out questions, beside the references.

for sample in answers(network, task, examples, seed=0):  sample.line(text)     # a JSON object each
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nemo_diffgemma.data.example import Example
from nemo_diffgemma.data.tasks import Task
from nemo_diffgemma.diffusion.noise import KeyedNoise
from nemo_diffgemma.diffusion_gemma import DiffusionGemma
from nemo_diffgemma.parallel.groups import device


@dataclass(frozen=True)
class Sample:
    """One question, its reference and the network's answer, as ids without what ends them."""

    example: int
    prompt: list[int]
    reference: list[int]
    answer: list[int]
    right: bool | None  # None: nobody can say
    forwards: int  # denoising steps

    def line(self, tokenizer: Any) -> dict[str, Any]:
        """As text where there is a tokenizer, else as ids."""

        def text(ids: list[int]) -> Any:
            return ids if tokenizer is None else tokenizer.decode(ids)

        return {
            "example": self.example,
            "prompt": text(self.prompt),
            "reference": text(self.reference),
            "answer": text(self.answer),
            "exact_match": self.right,
            "forwards": self.forwards,
        }


@torch.no_grad()
def answers(
    network: DiffusionGemma, task: Task, examples: Sequence[Example], seed: int, batch_size: int = 400
) -> Iterator[Sample]:
    """The network's answer to the last question of each example, with the checkpoint's sampler settings. Collective.

    As many canvases as the reference has; noise is keyed by (seed, sample), so the batch changes nothing.
    """
    length = network.model_config.canvas_length
    for start in range(0, len(examples), batch_size):
        part = examples[start : start + batch_size]
        cuts = [task.answer_start(example, length) for example in part]
        prompts = [list(example.tokens[:cut]) for example, cut in zip(part, cuts, strict=True)]
        references = [
            list(example.tokens[cut : example.answers[-1][1]]) for example, cut in zip(part, cuts, strict=True)
        ]
        rooms = [-(-len(reference) // length) * length for reference in references]
        width = max(map(len, prompts))
        pad = network.model_config.pad_token_id
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        samples = [example.sample for example in part]
        noise = KeyedNoise([seed] * len(part), samples, length, network.model_config.vocab_size, device())
        generation = network.generate(ids, mask, max_new_tokens=max(rooms), noise=noise)
        told = generation.sequences[:, width:].tolist()
        ends = _ends(network)
        for row, example in enumerate(part):
            answer, reference = _cut(told[row][: rooms[row]], ends), _cut(references[row], ends)
            right = task.is_right(example, answer, reference)
            yield Sample(start + row, prompts[row], reference, answer, right, int(generation.forwards[row]))


def _ends(network: DiffusionGemma) -> set[int]:
    """Ids with which an answer is over."""
    eos = network.model_config.eos_token_id
    return {*network.sampler_defaults.eos_ids, *([eos] if isinstance(eos, int) else eos)}


def _cut(ids: list[int], ends: set[int]) -> list[int]:
    """What stands before the first id that ends an answer."""
    return ids[: next((place for place, id in enumerate(ids) if id in ends), len(ids))]
