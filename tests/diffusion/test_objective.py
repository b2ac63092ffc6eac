"""What is corrupted and what is scored, seen through a network that only writes down what it is asked."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_diffgemma.diffusion.objective import (
    Canvas,
    Counts,
    ObjectiveConfig,
    choose_canvases,
    corrupt,
    count,
    objective,
    self_conditioned,
)
from nemo_diffgemma.diffusion.rows import Rows
from nemo_diffgemma.errors import UserError

EOS = 1


def rows_of(prompts: list[int], canvases: list[int], length: int = 4, vocabulary: int = 61, seed: int = 0) -> Rows:
    lengths = [prompt + n * length for prompt, n in zip(prompts, canvases, strict=True)]
    tokens = torch.randint(vocabulary, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    return Rows(tokens, single_turns(prompts, lengths), lengths, list(range(100, 100 + len(prompts))), EOS)


def single_turns(prompts: list[int], lengths: list[int]) -> list:
    """Answers that go from the end of a prompt to the end of the row."""
    return [((prompt, length),) for prompt, length in zip(prompts, lengths, strict=True)]


@st.composite
def conversations(draw) -> Rows:
    """Rows with answers anywhere: some next to each other, some that end the row, some shorter than a canvas."""
    answers, lengths = [], []
    for _ in range(draw(st.integers(1, 4))):
        spans, position = [], 0
        for _ in range(draw(st.integers(1, 4))):
            start = position + draw(st.integers(0 if position else 1, 5))
            position = start + draw(st.integers(1, 11))
            spans.append((start, position))
        answers.append(spans)
        lengths.append(position + draw(st.integers(0, 3)))
    tokens = 2 + torch.arange(sum(lengths))  # every token is another, and none is the fill
    return Rows(tokens, answers, lengths, draw(st.permutations(range(len(lengths)))), EOS)


class Recorder:
    """A network of one hidden unit: position n has hidden state n, the cross-entropy of every position is 1."""

    def __init__(self, rows: Rows) -> None:
        self.rows, self.scored, self.signals, self.gradient_free = rows, [], [], []

    def encode_clean(self, tokens_T, lengths):
        assert len(tokens_T) == sum(lengths)
        self.encoded = list(lengths)
        return SimpleNamespace(context_hidden=torch.arange(len(tokens_T))[:, None].float(), cache=None)

    def canvas_hidden(self, canvas_MC, canvases, cache, soft_MCH):
        self.signals.append(soft_MCH)
        self.gradient_free.append(not torch.is_grad_enabled())
        return torch.arange(canvas_MC.numel())[:, None].float()

    def soft_embedding(self, hidden_NH):
        return torch.ones_like(hidden_NH)

    def cross_entropy(self, hidden_NH, labels_N, weights_N, shift=None):
        self.scored.append((hidden_NH[:, 0].long(), labels_N, weights_N))
        return weights_N.sum(), torch.ones_like(weights_N)


def scored(rows: Rows, config: ObjectiveConfig, level: float | None = None, totals: Counts | None = None):
    canvases = choose_canvases(rows, 4, config.canvases_per_example, 0)
    noised = corrupt(rows, canvases, 4, 61, 0, level=level)
    recorder = Recorder(rows)
    loss = objective(recorder, rows, canvases, noised, config, 0, totals or count(rows, canvases, 4))
    return loss, recorder, canvases


def responses(rows: Rows) -> torch.Tensor:
    ids = rows.tokens_T.split(list(rows.lengths))
    return torch.cat([row[start:end] for row, spans in zip(ids, rows.answers, strict=True) for start, end in spans])


# -- which canvases --------------------------------------------------------------------------------------------------


def test_canvases_are_counted_from_the_start_of_the_answer():
    canvases = [Canvas(0, 3, 0, 4), Canvas(0, 7, 1, 4), Canvas(1, 5, 0, 4)]
    assert choose_canvases(rows_of([3, 5], [2, 1]), 4, 0, seed=0) == canvases


@settings(max_examples=50)
@given(rows=conversations(), length=st.integers(1, 6), wanted=st.integers(0, 3))
def test_each_answer_has_its_own_canvases_and_fill_behind_its_end(rows, length, wanted):
    """Targets and context are two things: a canvas ends with fill where the row goes on with the next turn."""
    every = choose_canvases(rows, length, 0, seed=0)
    expected = []
    for row, (tokens, spans) in enumerate(zip(rows.tokens_T.split(rows.lengths), rows.answers, strict=True)):
        starts = [(start, end) for first, end in spans for start in range(first, end, length)]
        for index, (start, end) in enumerate(starts):
            target = [tokens[p].item() if p < end else EOS for p in range(start, start + length)]
            expected.append((row, start, index, target))
    clean = corrupt(rows, every, length, 61, 0).clean_MC.tolist()
    assert [(c.row, c.start, c.index, t) for c, t in zip(every, clean, strict=True)] == expected
    some = choose_canvases(rows, length, wanted, seed=0)
    assert [c for c in every if c in some] == some
    by_row = [sum(c.row == row for c in every) for row in range(len(rows))]
    assert len(some) == sum(min(count, wanted or count) for count in by_row)


@settings(max_examples=30)
@given(rows=conversations(), size=st.integers(1, 4))
def test_rows_of_many_answers_may_be_split(rows, size):
    whole = choose_canvases(rows, 4, 2, 7)
    ids = corrupt(rows, whole, 4, 61, 7)
    parts = []
    for part in rows.split(size):
        parts.append(corrupt(part, choose_canvases(part, 4, 2, 7), 4, 61, 7))
    for name in ("noised_MC", "clean_MC", "levels_M"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(ids, name))


def test_canvases_are_chosen_uniformly_and_without_replacement():
    samples = range(4000)
    rows = Rows(torch.zeros(4000 * 21, dtype=torch.long), [((1, 21),)] * 4000, [21] * 4000, list(samples), EOS)
    chosen = choose_canvases(rows, 4, 2, seed=3)
    assert len(chosen) == 8000 == len({(canvas.row, canvas.start) for canvas in chosen})
    frequency = torch.bincount(torch.tensor([canvas.index for canvas in chosen])) / 4000
    assert (frequency - 2 / 5).abs().max() < 5 * math.sqrt(0.4 * 0.6 / 4000)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([], "expected at least one"),
        ([(3, 3)], "none empty"),
        ([(0, 4)], "none at position 0"),
        ([(3, 9)], "none beyond the row"),
        ([(5, 7), (2, 4)], "in order"),
        ([(2, 5), (4, 7)], "apart from each other"),
    ],
    ids=["none", "empty", "no context", "too long", "order", "overlap"],
)
def test_a_row_has_answers_behind_a_context(answers, message):
    rows = Rows(torch.zeros(8, dtype=torch.long), [answers], [8], [0], EOS)
    with pytest.raises(UserError, match=message):
        choose_canvases(rows, 4, 1, seed=0)


# -- corruption ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("vocabulary", [5, 61])
def test_a_token_changes_with_probability_t_times_one_minus_one_over_v(level, vocabulary):
    """The new id is any id, the old one and special ones included."""
    rows = rows_of([2] * 300, [20] * 300, vocabulary=vocabulary)
    canvases = choose_canvases(rows, 4, 0, seed=1)
    noised = corrupt(rows, canvases, 4, vocabulary, 1, level=level)
    changed = (noised.noised_MC != noised.clean_MC).double().mean()
    expected = level * (1 - 1 / vocabulary)
    assert abs(changed - expected) <= 5 * math.sqrt(expected * (1 - expected) / noised.clean_MC.numel())
    if level == 1.0:
        counts = torch.bincount(noised.noised_MC.flatten(), minlength=vocabulary).double()
        even = counts.sum() / vocabulary
        chi_square = float(((counts - even) ** 2 / even).sum())
        assert abs(chi_square - (vocabulary - 1)) < 5 * math.sqrt(2 * (vocabulary - 1))


def test_a_canvas_is_the_response_and_never_the_prompt():
    rows = rows_of([3, 6], [2, 3])
    canvases = choose_canvases(rows, 4, 0, seed=0)
    noised = corrupt(rows, canvases, 4, 61, 0)
    assert torch.equal(noised.clean_MC.flatten(), responses(rows))


def test_eos_fill_is_corrupted_like_any_token():
    tokens = torch.full((200 * 42,), EOS)
    rows = Rows(tokens, [((2, 42),)] * 200, [42] * 200, list(range(200)), EOS)
    noised = corrupt(rows, choose_canvases(rows, 4, 0, 0), 4, 61, 0, level=0.5)
    assert abs((noised.noised_MC != EOS).double().mean() - 0.5 * 60 / 61) < 5 * math.sqrt(0.25 / 8000)


@pytest.mark.parametrize("floor", [0.0, 1e-3, 0.5])
def test_noise_levels_are_uniform_from_the_floor_to_one(floor):
    rows = rows_of([2] * 200, [20] * 200)
    levels = corrupt(rows, choose_canvases(rows, 4, 0, 0), 4, 61, 0, noise_floor=floor).levels_M.double()
    assert levels.min() >= floor and levels.max() < 1
    counts = torch.histc(levels, bins=20, min=floor, max=1)
    assert abs(float(((counts - 200) ** 2 / 200).sum()) - 19) < 5 * math.sqrt(2 * 19)


@settings(max_examples=30)
@given(order=st.permutations(range(4)), seed=st.integers(0, 2**31))
def test_noise_of_a_canvas_depends_on_its_sample_not_on_its_batch(order, seed):
    rows = rows_of([3, 5, 2, 9], [3, 1, 2, 2])
    ids = rows.tokens_T.split(rows.lengths)
    parts = (rows.answers, rows.lengths, rows.samples)
    some = Rows(torch.cat([ids[i] for i in order]), *([part[i] for i in order] for part in parts), EOS)
    both = []
    for these in (rows, some):
        canvases = choose_canvases(these, 4, 2, seed)
        noised = corrupt(these, canvases, 4, 61, seed)
        coins = self_conditioned(these, canvases, 0.5, seed).tolist()
        both.append(
            {
                (these.samples[canvas.row], canvas.index): (ids.tolist(), float(level), coin)
                for canvas, ids, level, coin in zip(canvases, noised.noised_MC, noised.levels_M, coins, strict=True)
            }
        )
    assert both[0] == both[1]


def test_coins_fall_by_example():
    rows = rows_of([2] * 3000, [2] * 3000)
    canvases = choose_canvases(rows, 4, 0, 0)
    coins = self_conditioned(rows, canvases, 0.3, seed=0).view(3000, 2)
    assert torch.equal(coins[:, 0], coins[:, 1])
    assert abs(coins[:, 0].double().mean() - 0.3) < 5 * math.sqrt(0.21 / 3000)


# -- what is scored --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0.0, 1.0])
@pytest.mark.parametrize("reduction", ["example", "token"])
def test_every_position_of_a_canvas_is_scored_alike_whatever_the_noise(reduction, level):
    """Corrupted or not, EOS fill or not; no 1/t; the target is the clean token at the same position."""
    rows = rows_of([3, 6], [3, 1])
    config = ObjectiveConfig(canvases_per_example=0, reduction=reduction, autoregressive_weight=0)
    loss, recorder, _ = scored(rows, config, level)
    ((positions, labels, weights),) = recorder.scored
    assert positions.tolist() == list(range(16))
    assert torch.equal(labels, responses(rows))
    by_row = [1 / (2 * 12)] * 12 + [1 / (2 * 4)] * 4 if reduction == "example" else [1 / 16] * 16
    torch.testing.assert_close(weights, torch.tensor(by_row))
    assert float(loss.total) == pytest.approx(1.0)


def test_next_tokens_are_scored_inside_a_row_only():
    """By hand: prompt pairs are among them, and no pair reaches from one row into the next."""
    tokens = torch.tensor([10, 11, 12, 13, 14, 15, 20, 21, 22, 23, 24, 25, 26, 27])
    rows = Rows(tokens, single_turns([2, 4], [6, 8]), [6, 8], [0, 1], EOS)
    _, recorder, _ = scored(rows, ObjectiveConfig(canvases_per_example=0))
    positions, labels, weights = recorder.scored[1]
    assert labels.tolist() == [11, 12, 13, 14, 15, 21, 22, 23, 24, 25, 26, 27]
    assert positions.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12]  # each from the state one token earlier
    torch.testing.assert_close(weights, torch.tensor([1 / (2 * 5)] * 5 + [1 / (2 * 7)] * 7))
    _, recorder, _ = scored(rows, ObjectiveConfig(canvases_per_example=0, reduction="token"))
    torch.testing.assert_close(recorder.scored[1][2], torch.full((12,), 1 / 12))


def test_without_the_encoders_loss_nothing_behind_the_last_scored_canvas_is_encoded():
    rows = rows_of([3, 6, 2], [3, 1, 2])
    _, recorder, canvases = scored(rows, ObjectiveConfig(canvases_per_example=1, autoregressive_weight=0))
    assert recorder.encoded == [canvas.start for canvas in canvases]
    assert scored(rows, ObjectiveConfig(canvases_per_example=1))[1].encoded == list(rows.lengths)


@pytest.mark.parametrize("reduction", ["example", "token"])
def test_shares_of_micro_batches_add_up_to_the_loss(reduction):
    """However rows are dealt: the denominators are the whole batch's."""
    rows = rows_of([3, 6, 2, 4], [3, 1, 2, 2])
    config = ObjectiveConfig(canvases_per_example=0, reduction=reduction)
    whole, _, canvases = scored(rows, config)
    totals = count(rows, canvases, 4)
    parts = rows.split(3)
    assert sum((count(p, choose_canvases(p, 4, 0, 0), 4) for p in parts), Counts(0, 0, 0)) == totals
    shares = [scored(part, config, totals=totals)[0] for part in parts]
    for name in ("total", "diffusion", "autoregressive"):
        assert float(sum(getattr(s, name) for s in shares)) == pytest.approx(float(getattr(whole, name)))


def test_the_first_pass_has_no_gradient_and_is_run_whatever_the_coins():
    """Ranks that share experts run the same passes; where no coin fell the signal is zero, not zero logits."""
    rows = rows_of([3] * 6, [1] * 6)
    _, recorder, canvases = scored(rows, ObjectiveConfig())
    assert recorder.gradient_free == [True, False] and recorder.signals[0] is None
    shown = self_conditioned(rows, canvases, 0.5, seed=0)
    assert 0 < shown.sum() < 6
    assert torch.equal(recorder.signals[1][:, :, 0], shown[:, None].expand(6, 4).float())

    never = rows_of([3] * 6, [1] * 6)
    one = Rows(never.tokens_T, [((3, 7),)], [7], [0], EOS)
    samples = [
        s
        for s in range(100)
        if not self_conditioned(dataclasses.replace(one, samples=[s]), [Canvas(0, 3, 0, 4)], 0.5, 0)
    ]
    _, recorder, _ = scored(dataclasses.replace(never, samples=samples[:6]), ObjectiveConfig())
    assert recorder.gradient_free == [True, False] and not recorder.signals[1].any()

    _, recorder, _ = scored(rows, ObjectiveConfig(self_conditioning_probability=0))
    assert recorder.gradient_free == [False] and recorder.signals == [None]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(reduction="sum"), "objective.reduction='sum'; use 'example' or 'token'"),
        (dict(self_conditioning_probability=1.5), "objective.self_conditioning_probability=1.5; expected 0 to 1"),
        (dict(noise_floor=1.0), "objective.noise_floor=1.0; expected at least 0 and below 1"),
        (dict(canvases_per_example=-1), "canvases_per_example=-1; expected 0"),
        (dict(autoregressive_weight=-0.5), "autoregressive_weight=-0.5; expected 0"),
        (dict(autoregressive_weight=float("nan")), "autoregressive_weight=nan; expected 0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_settings_that_mean_nothing_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**wrong)
