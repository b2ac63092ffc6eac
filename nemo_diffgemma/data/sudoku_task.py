"""4x4 Sudoku as the task of a run: `data.kind=sudoku`. Puzzles and rules are in sudoku.py.

Measured is the share of held-out puzzles that a network solves, by budget of denoising steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from nemo_diffgemma.config import ModelConfig
from nemo_diffgemma.data.example import Example
from nemo_diffgemma.data.sudoku import SudokuDataset, SudokuTask, encode_puzzle, solve_rate
from nemo_diffgemma.data.sudoku_tokenizer import EOS_ID, PAD_ID, VOCABULARY, build_tokenizer
from nemo_diffgemma.data.tasks import DataGroup, Measures, Task
from nemo_diffgemma.diffusion.noise import KeyedNoise
from nemo_diffgemma.diffusion.sampler_config import SamplerConfig
from nemo_diffgemma.errors import ConfigurationError
from nemo_diffgemma.parallel.groups import device

if TYPE_CHECKING:
    from nemo_diffgemma.diffusion_gemma import DiffusionGemma

VALIDATION_STEPS = 16  # denoising steps with which puzzles are solved during training
_SEEDS = 1 << 20  # streams that do not overlap before example 2^40


@dataclass
class SudokuData(DataGroup):
    """Keys of `data` for Sudoku."""

    kind: str = "sudoku"
    held_out: int = 28  # grids kept for tests
    clues: tuple[int, int] = (0, 12)
    test_clues: tuple[int, int] = (4, 8)
    test_puzzles: int = 400


class SolveRate(NamedTuple):
    """Share of puzzles solved, and canvas tokens per denoising step over all of them."""

    rate: float
    tokens_per_forward: float


class Sudoku(Task):
    """The same split into trained and held-out grids whatever the seed of the run."""

    keys = SudokuData
    validated = ("solve_rate", "tokens_per_forward")
    eos_token_id, pad_token_id = EOS_ID, PAD_ID

    def __init__(self, data: SudokuData) -> None:
        super().__init__(data)
        try:
            self.split = SudokuTask(
                held_out=data.held_out,
                clues=(data.clues[0], data.clues[1]),
                test_clues=(data.test_clues[0], data.test_clues[1]),
                test_puzzles=data.test_puzzles,
            )
        except ValueError as error:
            raise ConfigurationError(f"data.{error}") from None

    @cached_property
    def _dataset(self) -> SudokuDataset:
        return SudokuDataset(self.split)

    def training_example(self, seed: int, index: int) -> Example:
        return self._dataset[((seed % _SEEDS) << 40) + index]

    def held_out_examples(self, wanted: int | None = None) -> list[Example]:
        digits = [VOCABULARY.index(str(digit)) for digit in range(10)]
        examples = []
        for sample, (puzzle, solution) in enumerate(self._solved()[:wanted]):
            prompt, answer = encode_puzzle(puzzle), [digits[digit] for digit in solution]
            tokens = (*prompt, *answer)
            examples.append(Example(tokens, ((len(prompt), len(tokens)),), sample))
        return examples

    def tokenizer(self) -> Any:
        return build_tokenizer()

    def prepare(self, model: ModelConfig) -> None:
        if model.vocab_size < len(VOCABULARY):
            raise ConfigurationError(
                f"data.kind=sudoku has {len(VOCABULARY)} token ids, but the network has vocab_size={model.vocab_size}; "
                f"use model.architecture.vocab_size={len(VOCABULARY)}"
            )

    def measures(self, network: DiffusionGemma, budgets: Sequence[int], seed: int, batch_size: int = 400) -> Measures:
        puzzles = self.puzzles()
        rates = {budget: sudoku_solve_rate(network, puzzles, budget, seed, batch_size) for budget in sorted(budgets)}
        return Measures(
            {
                "solve_rate": {str(budget): rate for budget, (rate, _) in rates.items()},
                "tokens_per_forward": rates[max(rates)].tokens_per_forward,
            },
            f"{len(puzzles)} held-out puzzles",
            ["steps", "solved", "tokens/forward"],
            [[budget, f"{rate:.4f}", f"{per_forward:.2f}"] for budget, (rate, per_forward) in rates.items()],
        )

    def validate(self, network: DiffusionGemma, examples: int, seed: int) -> dict[str, float]:
        solved = sudoku_solve_rate(network, self.puzzles()[:examples], VALIDATION_STEPS, seed)
        return {"solve_rate": solved.rate, "tokens_per_forward": solved.tokens_per_forward}

    def puzzles(self) -> list[tuple[int, ...]]:
        """The held-out puzzles."""
        return [puzzle for puzzle, _ in self._solved()]

    def _solved(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        try:
            return self.split.test_set
        except ValueError as error:  # not so many puzzles with these clues
            raise ConfigurationError(f"data.{error}") from None


@torch.no_grad()
def sudoku_solve_rate(
    network: DiffusionGemma,
    puzzles: Sequence[Sequence[int]],
    steps: int,
    seed: int,
    batch: int = 400,
) -> SolveRate:
    """Share of `puzzles` solved exactly with at most `steps` denoising steps, `batch` puzzles at a time. Collective.

    Puzzle i draws its noise by (seed, i), whatever the batch.
    """
    sampler = SamplerConfig(max_denoising_steps=steps, eos_token_id=None, pad_token_id=None)
    model, cells = network.model_config, len(puzzles[0])
    responses, forwards = [], 0
    for start in range(0, len(puzzles), batch):
        part = puzzles[start : start + batch]
        keys = range(start, start + len(part))
        noise = KeyedNoise([seed] * len(part), keys, model.canvas_length, model.vocab_size, device())
        prompts = torch.tensor([encode_puzzle(puzzle) for puzzle in part])
        generation = network.generate(prompts, max_new_tokens=cells, sampler=sampler, noise=noise)
        responses.append(generation.sequences[:, prompts.shape[1] :].cpu())
        forwards += int(generation.forwards.sum())
    answers = torch.cat(responses)
    return SolveRate(solve_rate(puzzles, answers), answers.numel() / forwards)
