"""What an engine call is checked for, before any GPU sees it."""

from __future__ import annotations

import pytest
import torch

from export.engine.engine import EngineError
from export.engine.tensorrt_session import EngineSession, Slot, check_inputs, geometry

SLOTS = {
    "canvas": Slot("INT64", (1, 4), (8, 4)),
    "temperature": Slot("FLOAT", (1,), (8,)),
    "past_key_values.0.key": Slot("BF16", (1, 2, 1, 16), (8, 2, 256, 16)),
    "temperatures": Slot("FLOAT", (8, 1), (8, 8)),
    "model.experts": Slot("INT4", (6, 64), (6, 64)),
}


def call(**changes) -> dict[str, torch.Tensor]:
    given = {
        "canvas": torch.zeros(2, 4, dtype=torch.int64),
        "temperature": torch.tensor([0.8, 0.7]),
        "past_key_values.0.key": torch.zeros(2, 2, 256, 16, dtype=torch.bfloat16),
        "temperatures": torch.zeros(8, 2),
        "model.experts": torch.zeros(6, 32, dtype=torch.uint8),
    }
    return {name: tensor for name, tensor in {**given, **changes}.items() if tensor is not None}


def test_call_within_the_profile_is_accepted():
    check_inputs(SLOTS, call())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"canvas": None}, "the call lacks canvas; inputs of the engine are canvas"),
        ({"canvass": torch.zeros(1)}, "does not take canvass"),
        ({"canvas": torch.zeros(2, 4)}, "canvas is torch.float32, but the engine was built for torch.int64"),
        ({"canvas": torch.zeros(9, 4, dtype=torch.int64)}, r"\[1..8, 4\]: axis 0 has 9.*max_batch_size=9"),
        ({"canvas": torch.zeros(4, dtype=torch.int64)}, r"has shape \[4\]; expected \[1..8, 4\]"),
        (
            {"past_key_values.0.key": torch.zeros(2, 2, 300, 16, dtype=torch.bfloat16)},
            "axis 2 has 300, and 1 to 256 is allowed; shorten the context, or build with max_context=300",
        ),
        (
            {"past_key_values.0.key": torch.zeros(2, 2, 0, 16, dtype=torch.bfloat16)},
            "axis 2 has 0, and 1 to 256",
        ),
        ({"temperatures": torch.zeros(9, 2)}, "axis 0 has 9, and 8 is allowed.*steps=9"),
        ({"temperatures": torch.zeros(8, 9)}, "axis 1 has 9, and 1 to 8 is allowed.*max_batch_size=9"),
        ({"model.experts": torch.zeros(6, 64, dtype=torch.uint8)}, r"shape \[6, 128\].*other sizes"),
    ],
)
def test_call_beyond_the_engine_says_what_it_takes(changes, message):
    with pytest.raises(EngineError, match=message):
        check_inputs(SLOTS, call(**changes))


def test_calls_share_a_captured_graph_exactly_when_names_and_shapes_agree():
    same = dict(reversed(call(temperature=torch.tensor([0.1, 0.2])).items()))
    assert geometry(call()) == geometry(same)
    assert geometry(call()) != geometry(call(canvas=torch.zeros(1, 4, dtype=torch.int64)))
    assert geometry(call()) != geometry(call(temperature=None))


def test_without_a_gpu_the_session_names_the_provider_that_works(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(EngineError, match="provider=tensorrt_rtx needs an NVIDIA GPU.*provider=onnxruntime"):
        EngineSession("tensorrt_rtx", tmp_path / "step.engine")
