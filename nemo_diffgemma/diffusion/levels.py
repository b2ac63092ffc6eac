"""Noise levels of canvases: how those of a step are spread.

Shapes: M canvases.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nemo_diffgemma.diffusion.noise import ROTATION, keyed_bits, to_uniforms

STREAM = 1 << 40  # a sample's number modulo this is its place in the stream of examples
_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0
_BELOW_ONE = 1.0 - 2.0**-24


def spread(uniforms_M: Tensor, samples_M: Tensor, ranks_M: Tensor, batch: int, seed: int) -> Tensor:
    """Uniforms of the canvases of a step that leave no gap: of the first canvases of `batch` examples, one lies in each
    of as many equal intervals.

    Each example has the interval of its place in the batch, in which `uniforms_M` chooses; all are rotated by a number
    of the step, and canvas `ranks_M` of an example further by the golden ratio (Weyl's sequence). Each alone is still
    uniform in [0, 1). MDLM (arXiv 2406.07524) spreads its levels so. A function of (seed, sample, canvas), whatever
    the layout.
    """
    index_M = samples_M % STREAM
    rotations_M = to_uniforms(keyed_bits(seed, index_M // batch, ROTATION)).double()
    places_M = (index_M % batch + uniforms_M.double()) / batch
    return (places_M + rotations_M + ranks_M * _GOLDEN).remainder(1.0).float().clamp_max(_BELOW_ONE)
