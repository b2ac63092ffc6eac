"""The slow truth: transformers' DiffusionGemma at tiny sizes, for our own implementation to be compared with.

Nothing here imports our code; torch and transformers only. One question per module:

- `models`: which tiny configurations there are, with every weight random, and how a released checkpoint lies on disk;
- `forward`: the logits of a canvas after a prefix, and the encoder's states;
- `sampling`: the tokens of `generate()` when its random numbers are given, and which rows are safe to compare;
- `objective`: the training loss with gradient, one canvas of one row at a time.

`test_reference.py` shows that each is what transformers does: `pytest tests/reference`.
Letters of shapes, everywhere: B rows, S tokens of a row, C positions of a canvas, V vocabulary, H hidden.
"""

from tests.reference.forward import denoise, encode, encode_and_denoise, encoder_states, head, multi_canvas
from tests.reference.models import SIZES, randomised_model, save_released_layout, tiny_config
from tests.reference.objective import objective
from tests.reference.sampling import RecordedNoise, generate, inverse_cdf

__all__ = [
    "SIZES",
    "RecordedNoise",
    "denoise",
    "encode",
    "encode_and_denoise",
    "encoder_states",
    "generate",
    "head",
    "inverse_cdf",
    "multi_canvas",
    "objective",
    "randomised_model",
    "save_released_layout",
    "tiny_config",
]
