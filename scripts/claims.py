"""Writes the tables of claims into the documents, from docs/claims.yaml.

    python scripts/claims.py            # after a change of docs/claims.yaml
    python scripts/claims.py --check    # exit code 1 where a document is not up to date

A table stands between `<!-- claims: topic, topic -->` and `<!-- end of claims -->`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "docs/serve.md", "export/README.md", "slurm/README.md")
STATUSES = ("verified", "dry run", "not run", "unsupported")
_TABLE = re.compile(r"(?<=<!-- claims: )([a-z, ]+)( -->\n).*?(?=<!-- end of claims -->)", re.DOTALL)


def read_claims() -> dict[str, list[dict[str, str]]]:
    """Claims by topic."""
    return yaml.safe_load((ROOT / "docs" / "claims.yaml").read_text())


def table(claims: list[dict[str, str]]) -> str:
    """Markdown rows: what, status, how, where and when or why not."""
    rows = ["| claim | status | how | where, when; or why not |", "|---|---|---|---|"]
    for claim in claims:
        ran = claim["status"] in ("verified", "dry run")
        where = f"{claim['hardware']}, {claim['date']}" if ran else claim["reason"]
        rows.append(f"| {claim['claim']} | {claim['status']} | `{claim['command']}` | {where} |")
    return "\n".join(rows) + "\n"


def render(text: str, claims: dict[str, list[dict[str, str]]]) -> str:
    """A document with its tables made anew. Raises KeyError for a topic that there is not."""

    def made(match: re.Match[str]) -> str:
        topics = [topic.strip() for topic in match[1].split(",")]
        return match[1] + match[2] + table([claim for topic in topics for claim in claims[topic]])

    return _TABLE.sub(made, text)


def main() -> None:
    claims, stale = read_claims(), []
    for name in DOCUMENTS:
        document = ROOT / name
        text = document.read_text()
        made = render(text, claims)
        if made != text:
            stale.append(name)
            if "--check" not in sys.argv:
                document.write_text(made)
    if "--check" in sys.argv and stale:
        raise SystemExit(f"not up to date: {', '.join(stale)}; run python scripts/claims.py")


if __name__ == "__main__":
    main()
