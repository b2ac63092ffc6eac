"""The training objective with gradient, one canvas of one row at a time, each after its own clean prefix.

No joint mask, no padding, no batch: what a training step that does all of it at once has to equal, in loss and in
gradient.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tests.reference.forward import denoise, encode, head


def objective(
    model,
    tokens: Sequence[Tensor],
    prompt_lengths: Sequence[int],
    lengths: Sequence[int],
    noised: Sequence[Sequence[tuple[int, Tensor]]],
    self_conditioning_mask_B: Sequence[bool],
    *,
    autoregressive_weight: float,
    reduction: str = "example",
    vocabulary: int | None = None,
    first_pass: list[list[Tensor]] | None = None,
) -> tuple[Tensor, dict]:
    """Loss and its parts. `tokens` are the ids of each row; canvas c of a row is [P + cC : P + (c+1)C] of
    them, with P its prompt length.

    `noised[b]` lists the canvases of row b that are scored, as (c, noised ids [C]). The encoder reads the clean tokens
    before canvas c, the decoder the noised ids; every one of the C positions is scored against its clean token. Where
    the row's coin is True, the decoder gets the untempered logits of a first pass, which carries no gradient; where it
    is False, no signal. The autoregressive part is one causal encoder pass over tokens[:length] and scores every
    next-token pair.

    reduction "example": mean over rows of (mean over the row's canvases and positions + weight * mean over its pairs);
    "token": (sum / count) over all rows at once, diffusion and autoregressive each with its own count. `vocabulary`, if
    given, is what the model's logits must span. `first_pass` replaces the first passes' logits, in the shape of the
    part of that name: finite differences need them held.

    Parts, all detached: `diffusion`, `autoregressive` (reduced, unweighted), `diffusion_B`, `autoregressive_B` (row
    means), `diffusion_tokens`, `autoregressive_tokens` (counts), and per row a list per scored canvas of [C, V] logits:
    `first_pass`, `logits`. Note that HF's embedding has padding_idx 0, which keeps the gradient of the lookup from row
    0 (id 0 is a noise token like any other); set `padding_idx = None` on the embed_tokens of encoder and decoder for
    the mathematical gradient.
    """
    if reduction not in ("example", "token"):
        raise ValueError(f"reduction={reduction!r}; use 'example' or 'token'")
    canvas_length = model.config.canvas_length
    diffusion_losses, next_token_losses, firsts, seconds = [], [], [], []  # per row: losses of its tokens

    for row, ids in enumerate(tokens):
        losses, first_row, second_row = [], [], []
        for position, (index, noised_ids) in enumerate(noised[row]):
            start = int(prompt_lengths[row]) + index * canvas_length
            clean = ids[start : start + canvas_length]
            if start + canvas_length > int(lengths[row]):
                raise ValueError(
                    f"row {row}: canvas {index} ends at {start + canvas_length}, after its {lengths[row]} tokens"
                )
            cache, _ = encode(model, ids[None, :start])
            if first_pass is None:
                with torch.no_grad():
                    first = denoise(model, noised_ids[None], cache)
            else:
                first = first_pass[row][position][None]
            signal = first if self_conditioning_mask_B[row] else None
            second = denoise(model, noised_ids[None], cache, self_conditioning_logits=signal)
            if vocabulary is not None and second.shape[-1] != vocabulary:
                raise ValueError(f"the model's logits span {second.shape[-1]} ids, not vocabulary={vocabulary}")
            losses.append(cross_entropy(second[0], clean, reduction="none"))
            first_row.append(first[0])
            second_row.append(second[0].detach())
        diffusion_losses.append(losses)
        firsts.append(first_row)
        seconds.append(second_row)

        whole = ids[: int(lengths[row])]
        _, states = encode(model, whole[None])
        next_token_losses.append(cross_entropy(head(model, states[0, :-1]), whole[1:], reduction="none"))

    diffusion_tokens, diffusion_rows = _gather([torch.cat(losses) if losses else None for losses in diffusion_losses])
    next_tokens, next_rows = _gather(next_token_losses)
    if reduction == "example":
        diffusion, autoregressive = diffusion_rows.mean(), next_rows.mean()
    else:
        diffusion, autoregressive = diffusion_tokens.mean(), next_tokens.mean()
    return diffusion + autoregressive_weight * autoregressive, {
        "diffusion": diffusion.detach(),
        "autoregressive": autoregressive.detach(),
        "diffusion_B": diffusion_rows.detach(),
        "autoregressive_B": next_rows.detach(),
        "diffusion_tokens": len(diffusion_tokens),
        "autoregressive_tokens": len(next_tokens),
        "first_pass": firsts,
        "logits": seconds,
    }


def _gather(rows: list[Tensor | None]) -> tuple[Tensor, Tensor]:
    """The losses of all tokens in one tensor, and the mean of each row; a row with nothing to score has mean 0."""
    given = torch.cat([row for row in rows if row is not None])
    zero = given.new_zeros(())
    return given, torch.stack([row.mean() if row is not None and len(row) else zero for row in rows])
