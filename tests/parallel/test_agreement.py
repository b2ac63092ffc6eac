"""What one rank meets, every rank raises, and it keeps its kind: exit code 2 ends a Slurm job for good, 1 does not."""

from __future__ import annotations

import pytest

from tests.parallel import cases

FORMS = ("all_or_none", "on_rank_zero")
CASES = [(form, rank, kind) for form in FORMS for rank in (0, 1) for kind in cases.ERRORS]


def seen(pool, form: str, kinds: dict[int, str]) -> list[tuple[str, bool, str]]:
    everywhere = pool(2).run("tests.parallel.cases:outcomes", form=form, kinds=kinds)
    assert everywhere[0] == everywhere[1], "the ranks still understand each other afterwards"
    return everywhere[0]


@pytest.mark.parametrize(("form", "rank", "kind"), [case for case in CASES if case[:2] != ("on_rank_zero", 1)])
def test_an_error_keeps_its_kind_on_every_rank(pool, form, rank, kind):
    ranks = seen(pool, form, {rank: kind})
    error = cases.ERRORS[kind]()
    assert ranks[rank] == (type(error).__name__, kind == "user", str(error))
    name, is_users, text = ranks[1 - rank]
    assert (name, is_users) == (("OtherRankError", True) if kind == "user" else ("OtherRankFailure", False))
    assert text.startswith(f"rank {rank} stopped: ") and str(error) in text
    assert (type(error).__name__ in text) == (kind != "user")


def test_two_that_fail_raise_their_own(pool):
    ranks = seen(pool, "all_or_none", {0: "user", 1: "disk"})
    assert [name for name, *_ in ranks] == ["ConfigurationError", "OSError"]


@pytest.mark.parametrize("form", FORMS)
def test_without_a_failure_nobody_stops(pool, form):
    assert seen(pool, form, {}) == [("no error", False, "")] * 2
