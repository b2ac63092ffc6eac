"""One sweep over a cut vocabulary gives what a dense float64 softmax gives; padding and chunks leave no trace.

Shapes: N positions, H hidden, V ids.
"""

from __future__ import annotations

import math
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nemo_diffgemma.model import vocabulary
from tests.model import cases
from tests.model.cases import dense, problem

LAST = 1 - 2**-24  # the largest float32 below 1


def check(found: dict[str, Tensor], asked: dict[str, Any]) -> None:
    z_NV = dense(asked["hidden_NH"], asked["table_VH"], asked["softcap"], asked.get("temperature", 1.0))
    terms_NV = asked["hidden_NH"].abs() @ asked["table_VH"].abs().T / asked.get("temperature", 1.0)
    largest = max(1.0, float(terms_NV.max()), float(z_NV.abs().max()), float(z_NV.logsumexp(-1).abs().max()))
    rounding = 2.0**-24 * largest  # of a float32 logit, of the terms that it is a sum of, or of the log-sum-exp
    p_NV = z_NV.softmax(-1)
    rows = range(len(z_NV))

    torch.testing.assert_close(found["log_sum_exp_N"].double(), z_NV.logsumexp(-1), atol=8 * rounding, rtol=0)
    entropy_N = -(p_NV * z_NV.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(found["entropy_N"].double(), entropy_N, atol=16 * rounding + 1e-6, rtol=1e-6)
    assert (found["entropy_N"] >= 0).all()

    best_N = z_NV[rows, found["argmax_N"]]
    assert (z_NV.amax(-1) - best_N).max() <= 8 * rounding
    clear_N = z_NV.topk(min(2, z_NV.shape[1])).values
    clear_N = clear_N[:, 0] - clear_N[:, -1] > 16 * rounding
    assert torch.equal(found["argmax_N"][clear_N], z_NV.argmax(-1)[clear_N])

    uniforms_N = asked["uniforms_N"].double()
    cumulative_NV = p_NV.cumsum(-1)
    sample_N = found["sample_N"]
    near = 1e-6 + 8 * rounding
    assert (cumulative_NV[rows, sample_N] >= uniforms_N - near).all()
    assert (cumulative_NV[rows, sample_N] - p_NV[rows, sample_N] <= uniforms_N + near).all()
    assert (p_NV[rows, sample_N] > 0).all()
    truth_N = (cumulative_NV <= uniforms_N[:, None]).sum(-1).clamp_max(z_NV.shape[1] - 1)
    exact_N = (cumulative_NV - uniforms_N[:, None]).abs().amin(-1) > near
    assert torch.equal(sample_N[exact_N], truth_N[exact_N])

    soft_NH = p_NV @ asked["table_VH"].double()
    largest = float(asked["table_VH"].abs().max())
    torch.testing.assert_close(
        found["soft_embedding_NH"].double(), soft_NH, atol=(16 * rounding + 1e-6) * largest, rtol=1e-5
    )


@settings(max_examples=80)
@given(
    seed=st.integers(0, 2**31),
    positions=st.integers(1, 5),
    ids=st.integers(1, 700),
    hidden=st.sampled_from([1, 8, 24]),
    chunk=st.integers(1, 900),
    scale=st.sampled_from([0.01, 1.0, 6.0, 60.0]),
    temperature=st.floats(0.05, 4.0),
    softcap=st.sampled_from([1.0, 30.0]),
)
def test_statistics_are_those_of_the_dense_softmax(
    single, seed, positions, ids, hidden, chunk, scale, temperature, softcap
):
    asked = problem(seed, positions, ids, hidden, scale, temperature=temperature, softcap=softcap, chunk=chunk)
    check(*cases.statistics(1, [asked]), asked)


@settings(max_examples=30)
@given(
    positions=st.integers(1, 900),
    first=st.integers(0, 899),
    count=st.integers(1, 12) | st.integers(1, 900),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_position_gets_the_same_bits_among_any_others(single, positions, first, count, dtype):
    """A canvas alone, and the same in a pass of many: whatever tile and vector of positions it falls into."""
    asked = problem(0, 900, 1000, 24, 3.0, chunk=64, temperature=torch.linspace(0.3, 0.9, 900).double()[:, None])
    asked = {name: value.to(dtype) if name in ("hidden_NH", "table_VH") else value for name, value in asked.items()}
    first = min(first, positions - 1)

    def of(begin: int, end: int) -> dict[str, Tensor]:
        names = ("hidden_NH", "uniforms_N", "temperature")
        return cases.statistics(1, [{**asked, **{name: asked[name][begin:end] for name in names}}])[0]

    end = min(positions, first + count)
    among, alone = of(0, positions), of(first, end)
    for name in alone:
        assert torch.equal(among[name][first:end], alone[name]), name


@pytest.mark.parametrize("tensor", [2, 4])
@pytest.mark.parametrize("ids", [61, 257, 1000])
def test_statistics_of_a_cut_vocabulary(pool, tensor, ids):
    """61 ids are padded to 128: of four ranks two hold padding alone. Every rank has the whole result."""
    asked = [
        problem(seed, 4, ids, 24, scale, chunk=chunk, temperature=temperature)
        for seed, (chunk, scale, temperature) in enumerate(
            [(2048, 1.0, 1.0), (7, 3.0, 0.5), (32, 10.0, 0.4), (100, 0.1, 0.8), (1, 2.0, 0.7)]
        )
    ]
    ranks = pool(tensor).run("tests.model.cases:statistics", tensor=tensor, problems=asked)
    for found in ranks:
        for one, its in zip(found, asked, strict=True):
            check(one, its)
    for other in ranks[1:]:
        for ours, theirs in zip(ranks[0], other, strict=True):
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("interleaved", [False, True])
def test_the_token_of_a_class_is_its_most_probable(single, pool, tensor, interleaved):
    """Of two of three sequences of four positions. With 61 ids, two of four ranks hold padding alone."""
    asked = []
    for seed, (ids, chunk) in enumerate([(61, 2048), (61, 7), (257, 32), (1000, 1), (1000, 100)]):
        generator = torch.Generator().manual_seed(seed)
        classes_nV = torch.randint(5, (2, ids), generator=generator, dtype=torch.int32)
        chosen_nC = torch.randint(5, (2, 4), generator=generator)
        cells_nC = torch.tensor([[8, 9, 10, 11], [0, 1, 2, 2]])  # the second canvas has three
        constraint = cases.Chosen(cells_nC, classes_nV, 5, chosen_nC)
        asked.append(problem(seed, 12, ids, 24, 3.0, chunk=chunk, constraint=constraint))
    asked[1]["table_VH"].zero_()  # equal logits
    arguments = dict(tensor=tensor, interleaved=interleaved, problems=asked)
    job = "tests.model.cases:tokens_of_classes"
    ranks = [cases.tokens_of_classes(**arguments)] if tensor == 1 else pool(tensor).run(job, **arguments)
    one_process = cases.tokens_of_classes(1, interleaved, asked)
    for number, (its, expected) in enumerate(zip(asked, one_process, strict=True)):
        z_BCV = dense(its["hidden_NH"], its["table_VH"], its["softcap"])[its["constraint"].cells_nC]
        constraint, tokens_nC = its["constraint"], ranks[0][number]["allowed_nC"]
        is_class_nCV = constraint.class_of_id_nV[:, None] == constraint.chosen_nC[..., None]
        assert is_class_nCV.gather(2, tokens_nC[..., None]).all()
        best_nC = z_BCV.masked_fill(~is_class_nCV, -torch.inf).amax(-1)
        assert (best_nC - z_BCV.gather(2, tokens_nC[..., None])[..., 0]).max() < 1e-4
        if not interleaved:  # the smallest id of equal ones
            first_nC = ((z_BCV == best_nC[..., None]) & is_class_nCV).int().argmax(-1)
            assert torch.equal(tokens_nC, first_nC)
        assert torch.equal(tokens_nC, expected["allowed_nC"])  # no layout changes it
        assert all(torch.equal(rank[number]["allowed_nC"], tokens_nC) for rank in ranks)


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_locked_positions_have_all_mass_on_their_id(pool, tensor):
    """Also where the logits are no numbers; 61 ids leave two of four ranks with padding alone. Others do not notice."""
    asked = []
    for dtype in (torch.float32, torch.bfloat16):
        free = problem(7, 6, 61, 24, 3.0, chunk=16)
        free["hidden_NH"], free["table_VH"] = free["hidden_NH"].to(dtype), free["table_VH"].to(dtype)
        spoiled = free["hidden_NH"].clone()
        spoiled[3] = torch.nan
        asked += [free, dict(free, hidden_NH=spoiled, locked_N=torch.tensor([-1, 60, -1, 0, 33, -1]))]
    arguments = dict(tensor=tensor, problems=asked)
    ranks = [cases.statistics(1, asked)]
    if tensor > 1:
        ranks = pool(tensor).run("tests.model.cases:statistics", **arguments)
    for free, locked in [pair for found in ranks for pair in (found[:2], found[2:])]:
        for place, id in enumerate(asked[1]["locked_N"].tolist()):
            if id < 0:
                assert all(torch.equal(locked[name][place], free[name][place]) for name in free)
                continue
            assert locked["argmax_N"][place] == locked["sample_N"][place] == id and locked["entropy_N"][place] == 0
            table_VH = asked[1 if locked["soft_embedding_NH"].dtype == torch.float32 else 3]["table_VH"]
            assert torch.equal(locked["soft_embedding_NH"][place], table_VH[id])


def extremes(ids: int) -> dict[str, dict[str, Any]]:
    hidden = torch.zeros(5, 8)
    hidden[:, 0] = 1e4
    table = torch.zeros(ids, 8)
    table[:, 0] = -1.0
    uniforms = torch.tensor([0.0, 1e-7, 0.5, 0.999, LAST])
    certain = table.clone()
    certain[ids - 2, 0] = 1.0
    halves = table.clone()
    halves[[3, ids - 1], 0] = 1.0
    common = dict(hidden_NH=hidden, uniforms_N=uniforms, softcap=30.0, temperature=0.4, chunk=16)
    return {
        "certain": dict(common, table_VH=certain),
        "halves": dict(common, table_VH=halves),
        "uniform": dict(common, table_VH=table, hidden_NH=torch.zeros(5, 8)),
    }


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("ids", [61, 257])
def test_extremes(single, pool, tensor, ids):
    """Saturated and flat distributions, numbers at either end of [0, 1), ties: nothing is NaN or a massless id."""
    asked = extremes(ids)
    if tensor == 1:
        ranks = [cases.statistics(1, list(asked.values()))]
    else:
        ranks = pool(tensor).run("tests.model.cases:statistics", tensor=tensor, problems=list(asked.values()))
    for found in ranks:
        certain, halves, uniform = found
        assert (certain["entropy_N"] == 0).all()
        assert (certain["argmax_N"] == ids - 2).all() and (certain["sample_N"] == ids - 2).all()
        assert torch.equal(certain["soft_embedding_NH"], asked["certain"]["table_VH"][[ids - 2] * 5])

        torch.testing.assert_close(halves["entropy_N"], torch.full((5,), math.log(2)), atol=1e-5, rtol=0)  # nats
        assert (halves["argmax_N"] == 3).all()  # of equal logits the smallest id, in whatever chunk or rank
        assert halves["sample_N"].tolist() == [3, 3, ids - 1, ids - 1, ids - 1]  # exceeds: at 0.5 it is the second

        torch.testing.assert_close(uniform["entropy_N"], torch.full((5,), math.log(ids)), atol=1e-5, rtol=0)
        assert (uniform["argmax_N"] == 0).all()
        assert uniform["sample_N"].tolist() == [0, 0, ids // 2, int(0.999 * ids), ids - 1]
        assert all(value.isfinite().all() for one in found for value in one.values())


def test_a_temperature_divides_after_the_softcap(single):
    """Half of 30 tanh(x / 30), not 30 tanh(x / 60)."""
    asked = problem(0, 3, 61, 8, 40.0, temperature=2.0)
    (found,) = cases.statistics(1, [asked])
    z_NV = 30 * torch.tanh(asked["hidden_NH"] @ asked["table_VH"].T / 30) / 2
    torch.testing.assert_close(found["log_sum_exp_N"], z_NV.logsumexp(-1), atol=1e-5, rtol=0)


def test_the_next_step_leaves_the_last_ones_statistics_alone(single):
    """Memory may be used again from step to step, what was returned may not: the sampler keeps it."""
    asked = [problem(seed, 4, 61, 24, 3.0) for seed in range(3)]
    found = cases.statistics(1, asked)
    for one, its in zip(found, asked, strict=True):
        check(one, its)


def test_nothing_is_computed_that_was_not_asked_for(single):
    asked = problem(0, 3, 61, 8)
    del asked["uniforms_N"]
    (found,) = cases.statistics(1, [dict(asked, soft_embedding=False)])
    assert found["sample_N"] is None and found["soft_embedding_NH"] is None


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("ids", [61, 257])
def test_logits_have_no_padding(single, pool, tensor, ids):
    asked = problem(3, 4, ids, 24, 5.0)
    arguments = dict(tensor=tensor, hidden_NH=asked["hidden_NH"], table_VH=asked["table_VH"], softcap=30.0)
    ranks = [cases.logits(**arguments)] if tensor == 1 else pool(tensor).run("tests.model.cases:logits", **arguments)
    z_NV = dense(asked["hidden_NH"], asked["table_VH"], 30.0)
    for logits, soft in ranks:
        torch.testing.assert_close(logits.double(), z_NV, atol=1e-5, rtol=0)
        torch.testing.assert_close(soft.double(), z_NV.softmax(-1) @ asked["table_VH"].double(), atol=1e-5, rtol=0)


def test_memory_of_a_sweep_is_kept_for_one_block_and_one_thread():
    def memory(shape: tuple[int, ...] = (2, 3, 4)) -> Tensor:
        return vocabulary._scratch(shape, torch.device("cpu"))

    with vocabulary.reused_scratch():
        ours = memory()
        with vocabulary.reused_scratch():
            assert memory() is ours
        with ThreadPoolExecutor() as others:
            assert others.submit(memory).result() is not ours
        assert memory((4, 3, 4)) is not ours, "of one size at a time"
        kept = weakref.ref(memory((4, 3, 4)))
        assert kept() is memory((4, 3, 4))
    assert kept() is None, "given back"
    assert memory() is not memory()


def test_threads_sweep_at_once_as_each_does_alone(single):
    asked = [problem(seed, positions=8, ids=700, hidden=24) for seed in range(4)]
    tables = [cases.cut(arguments.pop("table_VH"), 1) for arguments in asked]

    def sweep(index: int) -> dict[str, Tensor]:
        arguments = dict(asked[index])
        found = vars(vocabulary.statistics(arguments.pop("hidden_NH"), *tables[index], **arguments))
        return {name: value for name, value in found.items() if value is not None}

    def several(index: int) -> list[dict[str, Tensor]]:
        with vocabulary.reused_scratch():
            return [sweep(index) for _ in range(50)]

    alone = [sweep(index) for index in range(len(asked))]
    with ThreadPoolExecutor(len(asked)) as threads:
        for expected, results in zip(alone, threads.map(several, range(len(asked))), strict=True):
            assert all(torch.equal(expected[name], result[name]) for result in results for name in expected)
