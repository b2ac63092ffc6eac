"""Logits of a canvas after a prefix, by transformers: encoder into a DynamicCache, decoder over it, sdpa attention.

`encode` and `denoise` are the two steps and keep gradients; the others put them together without. Masks are 2-D, True
or 1 for a real token, and go to the encoder and the decoder alike: a decoder without its mask would attend to padding.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache


def encode(
    model, input_ids: Tensor, cache: DynamicCache | None = None, attention_mask: Tensor | None = None
) -> tuple[DynamicCache, Tensor]:
    """Append `input_ids` [B, S] to `cache` (new when None); gives it, and their states after the final norm [B, S, H].

    `attention_mask` covers everything encoded so far, these tokens included. Not `model(...)`, so that no decoder runs.
    """
    cache = DynamicCache(config=model.config.get_text_config()) if cache is None else cache
    output = model.model.encoder(input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache)
    return cache, output.last_hidden_state


def denoise(
    model,
    canvas: Tensor,
    cache: DynamicCache,
    attention_mask: Tensor | None = None,
    self_conditioning_logits: Tensor | None = None,
) -> Tensor:
    """Logits [B, C, V], float32 and softcapped, of a noised canvas [B, C] after what `cache` holds; the cache stays as
    it is.

    `attention_mask` covers the encoded tokens; the canvas itself is never masked.
    """
    if attention_mask is not None:
        attention_mask = pad(attention_mask.bool(), (0, canvas.shape[-1]), value=True)
    return model(
        decoder_input_ids=canvas,
        past_key_values=cache,
        decoder_attention_mask=attention_mask,
        self_conditioning_logits=self_conditioning_logits,
    ).logits


def head(model, states: Tensor) -> Tensor:
    """Softcapped float32 logits of final states: the decoder's own head, which HF never applies to the encoder."""
    cap = model.final_logit_softcapping
    return cap * torch.tanh(model.lm_head(states).to(torch.float32) / cap)


@torch.no_grad()
def encode_and_denoise(
    model,
    input_ids: Tensor,
    canvas: Tensor,
    attention_mask: Tensor | None = None,
    self_conditioning_logits: Tensor | None = None,
) -> Tensor:
    """Logits [B, C, V] of `canvas` directly after the prompt."""
    return multi_canvas(model, input_ids, [], canvas, attention_mask, self_conditioning_logits)


@torch.no_grad()
def multi_canvas(
    model,
    input_ids: Tensor,
    finished_canvases: list[Tensor],
    canvas: Tensor,
    attention_mask: Tensor | None = None,
    self_conditioning_logits: Tensor | None = None,
) -> Tensor:
    """Logits [B, C, V] of `canvas` after the prompt and the finished canvases, which are encoded one by one as
    `generate` does.
    """
    cache, _ = encode(model, input_ids, attention_mask=attention_mask)
    for finished in finished_canvases:
        if attention_mask is not None:
            attention_mask = pad(attention_mask.bool(), (0, finished.shape[-1]), value=True)
        cache, _ = encode(model, finished, cache, attention_mask)
    return denoise(model, canvas, cache, attention_mask, self_conditioning_logits)


@torch.no_grad()
def encoder_states(model, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """The encoder's states after the final norm [B, S, H]; what stands at padded positions means nothing."""
    return encode(model, input_ids, attention_mask=attention_mask)[1]
