"""JSON files of checkpoints with anything in them: read, or refused in one paragraph that names the file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemo_diffgemma import DiffusionGemma
from nemo_diffgemma.checkpoint.open import save_network
from nemo_diffgemma.checkpoint.tensor_files import INDEX
from nemo_diffgemma.errors import UserError
from tests.distributed import cases

VALUES = (
    *(None, True, 0, -1, 1, 2, 3, 63, 10**9, 10**30, 0.5, 1e400, float("nan"), "", "8", "x.safetensors", "../x", "/x"),
    *("F32", "F8_E4M3", [], [1], [[]], {}, {"a": 1}),
)


@pytest.fixture(scope="module")
def places(single, checkpoint, tmp_path_factory) -> dict[str, Path]:
    """A Hugging Face directory with an index, and a sharded checkpoint; tests change copies of single files."""
    folder = tmp_path_factory.mktemp("places")
    shutil.copytree(checkpoint("odd_vocab"), folder / "huggingface")
    save_network(cases.load(folder / "huggingface", {}), folder / "sharded", "sharded")
    return {"huggingface": folder / "huggingface", "sharded": folder / "sharded"}


FILES = (
    ("huggingface", "config.json"),
    ("huggingface", "generation_config.json"),
    ("huggingface", INDEX),
    ("sharded", "assets/config.json"),
    ("sharded", "assets/generation_config.json"),
    ("sharded", "dtypes.json"),
    ("sharded", "metadata.json"),
)


def paths_of(value: Any, path: tuple = ()) -> list[tuple]:
    """Of every value in a JSON document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(deep for key, part in inner for deep in paths_of(part, (*path, key)))]


def changed(document: Any, path: tuple, value: Any) -> Any:
    if not path:
        return value
    copy = dict(document) if isinstance(document, dict) else list(document)
    copy[path[0]] = changed(copy[path[0]], path[1:], value)
    return copy


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    file=st.sampled_from(FILES),
    where=st.integers(0, 10**6),
    value=st.sampled_from(VALUES),
    damage=st.sampled_from(["value", "value", "value", "cut", "byte"]),
    position=st.floats(0, 1),
)
def test_any_change_is_read_or_named(places, file, where, value, damage, position):
    place = places[file[0]] / file[1]
    content = place.read_bytes()
    document = json.loads(content)
    paths = paths_of(document)
    at = int(position * (len(content) - 1))
    bad = {
        "value": json.dumps(changed(document, paths[where % len(paths)], value)).encode(),
        "cut": content[:at],
        "byte": content[:at] + b"\xe9" + content[at + 1 :],
    }[damage]
    try:
        place.write_bytes(bad)
        network = DiffusionGemma.from_checkpoint(places[file[0]])
        network.sampler_defaults  # noqa: B018 (reads generation_config.json)
    except UserError as error:
        assert "\n" not in str(error) and str(places[file[0]]) in str(error), error
    finally:
        place.write_bytes(content)
