"""A bound on how many bits a network needs for held-out answers, a token (NELBO).

A canvas is a uniform diffusion in continuous time: each token is replaced by one uniform over the V ids until, at level
t, alpha = 1 - t of the signal is left. With x the noised and y the clean token of a position, the reverse process that
puts a prediction p in place of the clean token has the negative evidence lower bound

    -log P(canvas) <= E over t, x of  sum over positions of  sigma / V * sum over ids j other than x of
                      [ R(j) - S(j) + S(j) log(S(j) / R(j)) ],    sigma = -alpha' / alpha = 1 / (1 - t),
    S(j) = q(j | y) / q(x | y),  R(j) = q(j | p) / q(x | p),   q(j | p) = alpha p(j) + (1 - alpha) / V

(Campbell et al., arXiv 2205.14987, of continuous time; Schiff et al., arXiv 2412.10193, equation 18, of uniform noise).
It is tightest where p is the posterior without the token's own observation (Gourevitch et al., arXiv 2605.22765), so
predictions of a denoiser are turned into that; any p gives a bound. Noise at t = 0 is none and at t = 1 all, so no
other term is left.

With k = alpha V / t and l(j) = log(1 + k p(j)), q(j | p) is t / V * exp(l(j)) and the sum over ids needs l at x, l at y
and the sum of all l: `Network.mixture`. Canvases of an answer follow one another, so their bounds add up; the bound is
of the whole canvas, fill included, and counts for the answer's own tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nemo_diffgemma.diffusion.levels import leave_one_out_shift
from nemo_diffgemma.diffusion.objective import choose_canvases, corrupt
from nemo_diffgemma.diffusion.rows import Rows
from nemo_diffgemma.diffusion_gemma import DiffusionGemma
from nemo_diffgemma.evaluation.measures import passes_of
from nemo_diffgemma.transfer import to_device

FLOOR = 1e-4  # the smallest level; the integral below it is taken as its mean above


@torch.no_grad()
def bits_per_token(
    network: DiffusionGemma, rows: Rows, seed: int, prediction: str = "denoiser", draws: int = 4
) -> float:
    """The bound for the answers of `rows`, without self-conditioning, in bits a token. Collective.

    The expectation is over `draws` noise levels of each canvas, spread evenly over all of them.
    """
    length, vocabulary = network.model_config.canvas_length, network.model_config.vocab_size
    nats, tokens = 0.0, 0
    for part in rows.split(passes_of(rows, length)):
        cache = network.encode_clean(part.tokens_T, part.lengths).cache
        canvases = choose_canvases(part, length, 0, seed)
        places = [(canvas.row, canvas.start) for canvas in canvases]
        tokens += sum(canvas.size for canvas in canvases)
        for draw in range(draws):
            corrupted = corrupt(
                part, canvases, length, vocabulary, seed + draw, noise_floor=FLOOR, spread_over=len(rows)
            )
            hidden = network.canvas_hidden(corrupted.noised_MC, places, cache, None)
            noised_N, clean_N = corrupted.noised_MC.flatten(), corrupted.clean_MC.flatten()
            levels_N = to_device(corrupted.levels_M.double(), noised_N.device).repeat_interleave(length)
            shift = leave_one_out_shift(corrupted.noised_MC, corrupted.levels_M, vocabulary)
            back = None if prediction == "leave_one_out" else shift._replace(amounts_N=-shift.amounts_N)
            factors_N = (vocabulary * (1.0 - levels_N) / levels_N).float()
            ratios = network.mixture(hidden, noised_N, clean_N, factors_N, back)
            noised, clean, total = (ratio.double() for ratio in ratios)
            bounds_N = bound(noised, clean, total, noised_N == clean_N, levels_N, vocabulary)
            nats += float(bounds_N.sum()) / draws
    return nats / tokens / math.log(2.0)


def bound(
    log_noised_N: Tensor, log_clean_N: Tensor, log_sum_N: Tensor, kept_N: Tensor, levels_N: Tensor, vocab_size: int
) -> Tensor:
    """The integrand of the bound, nats [N]: `Mixture` of the predictions, and where the noised token is the clean one.

    With l as above and d = log(1 + k), the l of a prediction that is sure of the clean token: S(j) = 1 for all ids but
    the clean one, where it is exp(d), if the token was replaced; and S(j) = exp(-d) for all ids if it was kept.
    """
    sure_N = torch.log1p(vocab_size * (1.0 - levels_N) / levels_N)  # d
    mass_N = vocab_size / levels_N  # sum over ids of exp(l), whatever the prediction
    rates_N = mass_N * (torch.exp(-log_noised_N) - torch.exp(-torch.where(kept_N, sure_N, 0.0)))  # R - S
    kept_terms_N = torch.exp(-sure_N) * ((vocab_size - 1) * (log_noised_N - sure_N) - (log_sum_N - log_noised_N))
    others_N = (vocab_size - 2) * log_noised_N - (log_sum_N - log_noised_N - log_clean_N)
    replaced_terms_N = others_N + torch.exp(sure_N) * (sure_N - log_clean_N + log_noised_N)
    terms_N = torch.where(kept_N, kept_terms_N, replaced_terms_N)
    return (rates_N + terms_N) / (vocab_size * (1.0 - levels_N))
