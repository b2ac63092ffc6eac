"""What the documents say was verified is what docs/claims.yaml says, and each claim names something that there is."""

from __future__ import annotations

import re
import subprocess
import sys
from datetime import date

import pytest

from nemo_diffgemma.repository import ROOT
from scripts import claims

ALL = [claim for topic in claims.read_claims().values() for claim in topic]


def test_the_documents_are_made_from_the_claims():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "claims.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_topic_stands_in_a_document():
    text = "".join((ROOT / name).read_text() for name in claims.DOCUMENTS)
    shown = {topic.strip() for match in re.findall(r"<!-- claims: ([a-z, ]+) -->", text) for topic in match.split(",")}
    assert shown == set(claims.read_claims())


@pytest.mark.parametrize("claim", ALL, ids=lambda claim: claim["claim"][:40])
def test_a_claim_says_how_and_where_or_why_not(claim):
    assert claim["status"] in claims.STATUSES
    ran = claim["status"] in ("verified", "dry run")
    assert set(claim) == {"claim", "status", "command"} | ({"hardware", "date"} if ran else {"reason"})
    assert not ran or isinstance(claim["date"], date)
    for path in re.findall(r"[\w/]+\.py", claim["command"]):
        assert (ROOT / path).is_file(), path
    for target in re.findall(r"make ([\w-]+)", " ".join(map(str, claim.values()))):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


def test_a_stale_table_is_made_anew():
    text = "before\n<!-- claims: parity -->\nold\n<!-- end of claims -->\nafter\n"
    made = claims.render(text, {"parity": [dict(claim="c", status="not run", command="x", reason="r")]})
    assert "old" not in made and "| c | not run | `x` | r |" in made
    assert made.startswith("before\n") and made.endswith("<!-- end of claims -->\nafter\n")
