"""Where an answer ends: one rule for every engine."""

from __future__ import annotations

from collections.abc import Callable

from nemo_diffgemma.serving.markers import Markers
from nemo_diffgemma.serving.request import Reason, Request

Decode = Callable[[list[int]], str]


def cut(
    request: Request, answer: list[int], tokens: list[int], decode: Decode | None, markers: Markers
) -> tuple[list[int], Reason | None]:
    """Of a canvas behind `answer`: its tokens up to what ends the answer, that included, and why it ends if it does.

    Strings of `request.stop` are looked for in the text that `decode` makes of ids; in a chat, of those that `markers`
    tell from thoughts and calls.
    """

    def stops(ids: list[int]) -> bool:
        if not request.stop or decode is None:
            return False
        texts = [decode(run) for run in (markers.said(ids) if request.chat else [ids])]
        return any(string in text for text in texts for string in request.stop)

    first = request.earliest_end - len(answer)
    ends = [index for index, id in enumerate(tokens) if id in request.sampler.eos_ids and index >= first]
    new, reason = (tokens[: ends[0] + 1], Reason.STOP) if ends else (tokens, None)
    if len(answer) + len(new) >= request.max_tokens:
        new = new[: request.max_tokens - len(answer)]
        is_whole = new[-1] in request.sampler.eos_ids or request.language is not None
        reason = Reason.STOP if is_whole else Reason.LENGTH
    if stops(answer + new):
        fewest = next(n for n in range(1, len(new) + 1) if stops(answer + new[:n]))
        return new[:fewest], Reason.STOP
    return new, reason
