"""Log-probabilities of a canvas as they come from the device (`model.token_scores`), as an event has them."""

from __future__ import annotations

from nemo_diffgemma.serving.request import Scores
from nemo_diffgemma.transfer import HostCopy


def scores_of(scored: HostCopy, top: int, tokens: int, length: int) -> list[Scores]:
    """Scores of the first `tokens` of a canvas of `length`."""
    rows = scored.values().view(length, -1)[:tokens].tolist()
    kept = len(rows[0]) // 2
    return [
        Scores(own, [(int(id), logprob) for logprob, id in zip(best[:top], best[kept : kept + top], strict=True)])
        for own, *best in rows
    ]
