"""The most probable path is the most probable one of all canvases there are: compared with trying each of them."""

from __future__ import annotations

import itertools
import random
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_diffgemma.diffusion.constraint import Allowed
from nemo_diffgemma.model.token_classes import ClassMaxima
from nemo_diffgemma.serving.constraints import Constraint, ConstraintError, regex
from nemo_diffgemma.serving.constraints.canvas import CanvasConstraint
from nemo_diffgemma.serving.constraints.sequence import CanvasConstraints, ConstrainedBatch, ConstrainedSequence
from nemo_diffgemma.serving.constraints.worker import Limits, Vocabulary, Worker
from tests.serving import examples

CPU = torch.device("cpu")
EOS = 0
# several bytes a token, halves of characters, two tokens of equal bytes; 0 ends, 1 and 9 are no text
TOKENS = {2: b"a", 3: b"b", 4: b"ab", 5: b"\xc3", 6: b"\xa9", 7: "é".encode(), 8: b"a"}
V = 10


@pytest.fixture(scope="module")
def worker() -> Worker:
    return Worker(Vocabulary(TOKENS, V, (EOS,)), Limits())


class Shard:
    """All ids on one rank."""

    first_id, size, parallel, vocab_size = 0, V, False, V


def chosen(batch: ConstrainedBatch, logits_BCV: torch.Tensor, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What a denoising step with these logits allows, and whether it is the arg-max canvas; the batch goes on."""
    allowed = step(batch.of_canvas(), logits_BCV.flatten(0, 1), interleaved)
    tokens_BC = allowed.tokens.view(logits_BCV.shape[:2])
    batch.advance(tokens_BC)
    return tokens_BC, allowed.is_argmax


def step(constraint: CanvasConstraint, logits_NV: torch.Tensor, interleaved: bool) -> Allowed:
    """What a denoising step with these logits allows."""
    chunks = torch.nn.functional.pad(logits_NV, (0, 2), value=-torch.inf).unflatten(1, (4, 3))
    logits_kNc = chunks.transpose(0, 1).contiguous()
    maxima = ClassMaxima(constraint, Shard(), logits_kNc, interleaved)
    for index, z_Nc in enumerate(logits_kNc):
        maxima.add(index, z_Nc[:, : V - 9] if index == 3 else z_Nc)
    argmax_N, cells, locked = logits_NV.argmax(-1), constraint.cells_nC.flatten(), constraint.locked_nC.flatten()
    argmax_N[cells[locked >= 0]] = locked[locked >= 0]
    return constraint.allowed(argmax_N, maxima.tokens())


def answers(pattern: str, length: int, tokens: int, locked: dict[int, int]) -> list[tuple[int, ...]]:
    """All answers of `length` places, of which `tokens` count, that are allowed."""
    found = []
    for ids in itertools.product(range(V), repeat=min(length, tokens)):
        text, rest = (ids[: ids.index(EOS)], ids[ids.index(EOS) :]) if EOS in ids else (ids, ())
        if any(id != EOS for id in rest) or any(id not in TOKENS for id in text):
            continue
        try:
            written = b"".join(TOKENS[id] for id in text).decode()
        except UnicodeDecodeError:
            continue
        if re.fullmatch(pattern, written) and all(ids[place] == id for place, id in locked.items()):
            found.append((*ids, *[EOS] * (length - len(ids))))
    return found


@settings(max_examples=150)
@given(
    seed=st.integers(0, 2**32),
    length=st.integers(1, 2),
    canvases=st.integers(1, 2),
    fewer=st.integers(0, 2),
    locks=st.integers(0, 2),
    interleaved=st.booleans(),
)
def test_no_allowed_answer_is_more_probable(worker, seed, length, canvases, fewer, locks, interleaved):
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    pattern = draw.choice(["a*b", "(ab)+", "é+", "a?|bé", "[^a]*", "", "(a|b|é){2,3}", "ab*é?", "b"])
    whole, tokens = length * canvases, max(1, length * canvases - fewer)
    places = draw.sample(range(tokens), min(locks, tokens))
    locked = {place: draw.choice([EOS, 2, 3, 4, 7, 8]) for place in places}
    allowed = answers(pattern, whole, tokens, locked)
    automaton = worker.compile(regex(pattern))
    asked = ([None, Constraint(automaton, tokens)], 2, length, canvases, [EOS], CPU, [{}, locked])
    if not allowed:
        with pytest.raises(ConstraintError, match="tokens"):
            ConstrainedBatch(*asked)
        return
    batch = ConstrainedBatch(*asked)
    behind = ()
    for canvas in range(canvases):
        logits_BCV = torch.randn(2, length, V, generator=generator)
        z_CV = logits_BCV[1].double()
        given_BC, is_argmax_B = chosen(batch, logits_BCV, interleaved)
        argmax_BC = logits_BCV.argmax(-1)
        assert torch.equal(given_BC[0], argmax_BC[0]) and bool(is_argmax_B[0])
        # of all answers that begin as settled: the best continuation, positions that count alone
        start, counted = canvas * length, max(0, min(length, tokens - canvas * length))
        continued = {ids[start : start + length] for ids in allowed if ids[:start] == behind}
        scores = {ids: float(sum(z_CV[c, ids[c]] for c in range(counted))) for ids in continued}
        ids = tuple(given_BC[1].tolist())
        assert ids in scores
        locked_argmax = [locked.get(start + c, int(argmax_BC[1, c])) for c in range(length)]
        end = locked_argmax.index(EOS) if EOS in locked_argmax else length
        cut = tuple((locked_argmax[:end] + [EOS] * length)[:counted] + [EOS] * (length - counted))
        if bool(is_argmax_B[1]):
            assert ids == cut or behind[-1:] == (EOS,)
        else:
            assert scores[ids] >= max(scores.values()) - 1e-9
            held = all(cut[c] == locked_argmax[c] for c in range(counted) if start + c in locked)
            assert cut not in continued or not held
        behind = (*behind, *ids)


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32), interleaved=st.booleans())
def test_a_sequence_knows_nothing_of_its_neighbours(worker, seed, interleaved):
    generator = torch.Generator().manual_seed(seed)
    patterns = ["(a|b){3,}", None, "é*", "ab|ba|b{4}"]
    constraints = [None if p is None else Constraint(worker.compile(regex(p))) for p in patterns]
    logits_BCV = torch.randn(4, 4, V, generator=generator)
    together, _ = chosen(ConstrainedBatch(constraints, 4, 4, 2, [EOS], CPU), logits_BCV, interleaved)
    for row, constraint in enumerate(constraints):
        if constraint is not None:
            alone = ConstrainedBatch([constraint], 1, 4, 2, [EOS], CPU)
            assert torch.equal(chosen(alone, logits_BCV[row : row + 1], interleaved)[0][0], together[row])


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32), interleaved=st.booleans())
def test_canvases_of_several_lengths_know_nothing_of_each_other(worker, seed, interleaved):
    """A step over canvases one behind the other, some constrained: each gets what it would get alone."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    lengths = [draw.randint(1, 5) for _ in range(4)]
    held = [
        ConstrainedSequence(worker.compile(regex(pattern)), length, 9, [EOS], {}, CPU) if pattern else None
        for pattern, length in zip(["(a|b){3,}", draw.choice([None, "b*"]), "é*", None], lengths, strict=True)
    ]
    logits_NV = torch.randn(sum(lengths), V, generator=generator)
    together = step(CanvasConstraints(CPU).of(held, lengths), logits_NV, interleaved)
    for row, part in enumerate(logits_NV.split(lengths)):
        alone = CanvasConstraints(CPU).of([held[row]], [lengths[row]])
        expected = part.argmax(-1) if alone is None else step(alone, part, interleaved).tokens
        assert torch.equal(together.tokens.split(lengths)[row], expected)
        assert bool(together.is_argmax[row]) == torch.equal(expected, part.argmax(-1)) or held[row] is not None


def test_what_steps_are_told_is_made_once_a_canvas(worker):
    held = [None, ConstrainedSequence(worker.compile(regex("(a|b){3,}")), 2, 9, [EOS], {}, CPU)]
    made = CanvasConstraints(CPU)
    first = made.of(held, [2, 2])
    assert first is not None and made.of(list(held), [2, 2]) is first
    moved = made.of(held[::-1], [2, 2])
    assert moved is not None and moved.rows_n.tolist() == [0] and moved.automata is first.automata
    held[1].settle([2, 3])
    after = made.of(held, [2, 2])
    assert after is not None and after.rows_n.tolist() == [1] and not torch.equal(after.start_n, first.start_n)
    assert made.of([None, None], [2, 2]) is None


def test_sizes_rounded_for_a_gpu_change_nothing(worker):
    from nemo_diffgemma.serving.constraints.paths import Automata, best_classes

    automaton = worker.compile(regex("(a|b|é){2,3}"))
    plain = Automata.of(automaton, CPU)
    rounded = Automata.joined([plain], rounded=True)
    assert rounded.states & (rounded.states - 1) == 0 and rounded.states > plain.states
    maxima = torch.randn(1, 4, plain.following.shape[1])
    more = torch.nn.functional.pad(maxima, (0, rounded.following.shape[1] - maxima.shape[2]), value=7.0)
    start, active = torch.tensor([automaton.start]), torch.ones(1, 4, dtype=torch.bool)
    viable = torch.from_numpy(automaton.distance == 0)[None]
    wider = torch.nn.functional.pad(viable, (0, rounded.states - viable.shape[1]))
    expected = best_classes(plain, maxima, start, viable, active)
    assert torch.equal(best_classes(rounded, more, start, wider, active), expected)


def test_what_nothing_fulfils_is_refused(worker):
    automaton = worker.compile(regex("(ab){3}b"))
    with pytest.raises(ConstraintError, match="has 4 tokens; max_tokens=3"):
        ConstrainedBatch([Constraint(automaton, 3)], 1, 4, 2, [EOS], CPU)
    with pytest.raises(ConstraintError, match="locked tokens"):
        ConstrainedBatch([Constraint(automaton, 8)], 1, 4, 2, [EOS], CPU, [{0: 3}])
    with pytest.raises(ConstraintError, match="locked position 8; expected 0 to 6"):
        ConstrainedBatch([Constraint(automaton, 7)], 1, 4, 2, [EOS], CPU, [{8: 3}])
    with pytest.raises(ConstraintError, match=r"end with one of \[0\]; sampler.eos_token_id=\[0, 2\]"):
        ConstrainedBatch([Constraint(automaton)], 1, 4, 2, [EOS, 2], CPU)
    with pytest.raises(ConstraintError, match="2 constraints for 1 rows"):
        ConstrainedBatch([None, None], 1, 4, 2, [EOS], CPU)
    nothing_ends = Worker(Vocabulary(TOKENS, V, ()), Limits()).compile(regex("a"))
    with pytest.raises(ConstraintError, match="eos_token_id"):
        ConstrainedBatch([Constraint(nothing_ends)], 1, 4, 2, [], CPU)
    with pytest.raises(ConstraintError, match="vocabulary"):
        worker.compile(regex("x"))


def test_buffers_take_over_another_constraint(worker):
    constraints = [Constraint(worker.compile(regex(pattern))) for pattern in ("a*b", "a*b", "é+")]
    first, other, third = (
        ConstrainedBatch([constraint], 1, 3, 2, [EOS], CPU).of_canvas() for constraint in constraints
    )
    assert first is not None and other is not None and third is not None
    assert first.geometry == other.geometry != third.geometry
    other.start_n.fill_(other.automata.states - 2)
    buffer = first.buffer()
    buffer.copy_(other)
    assert torch.equal(buffer.start_n, other.start_n) and not torch.equal(first.start_n, other.start_n)
    assert examples.EOS != examples.PAD
