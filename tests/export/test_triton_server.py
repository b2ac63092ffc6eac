"""A bundle's repository on the real Triton server: its answers are those of `open_bundle(...).generate`.

Skipped where the server cannot be had (`triton_server.py` says from where); `make test-all` runs it.
"""

from __future__ import annotations

import json
import queue
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from export import open_bundle
from export.bundle import triton_request
from export.bundle.building import build_bundle
from export.bundle.format import Settings
from export.engine.engine import Limits
from nemo_diffgemma.data import build_tokenizer
from tests.export import triton_server
from tests.export.triton_server import CACHE, Server

pytestmark = [pytest.mark.usefixtures("single"), pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
PUZZLE = "1..4 ..3. 2... ...1"
IDS = np.array([[0, 0, 7, 9, 11], [3, 5, 8, 13, 21]])
MASK = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
LOOP = dict(max_denoising_steps=[8], confidence_threshold=[0.0])  # what the loop of this bundle was built for
LONG = dict(max_denoising_steps=[1024], confidence_threshold=[1e-30], max_new_tokens=[56])  # 14 canvases of all steps
DTYPES = {"TYPE_INT32": "INT32", "TYPE_INT64": "INT64", "TYPE_FP32": "FP32", "TYPE_BOOL": "BOOL"}
SECONDS = 120  # for an answer


# -- the server ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def obtained() -> None:
    triton_server.obtain()


@pytest.fixture(scope="module")
def bundle(obtained: None, traces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a tokenizer, and its engines for ONNX Runtime."""
    folder = tmp_path_factory.mktemp("triton")
    checkpoint = Path(shutil.copytree(traces, folder / "checkpoint"))
    build_tokenizer().save_pretrained(checkpoint)
    build_bundle(checkpoint, folder / "bundle", Settings(steps=8, limits=Limits(8, 64, 16)))
    return configure(folder / "bundle" / "triton", code=str(ROOT)).parent


@pytest.fixture(scope="module")
def environment(bundle: Path) -> Path:
    packages = [CACHE / "numpy", Path(sysconfig.get_paths()["purelib"])]
    return triton_server.environment(bundle.parent / "environment", packages)


@pytest.fixture(scope="module")
def server(bundle: Path, environment: Path) -> Iterator[Server]:
    with Server(bundle / "triton", environment, bundle.parent / "server.log") as server:
        yield server


@pytest.fixture(scope="module")
def engine(bundle: Path) -> Any:
    return open_bundle(bundle)


def configure(repository: Path, decoupled: bool = True, **parameters: str) -> Path:
    """Set parameters in config.pbtxt, and the transaction policy, as the guide says."""
    file = repository / "diffusion_gemma" / "config.pbtxt"
    text = file.read_text().replace("decoupled: true", f"decoupled: {str(decoupled).lower()}")
    for name, value in parameters.items():
        text = re.sub(f'(key: "{name}"\\s*value {{\\s*string_value: )"[^"]*"', f'\\1"{value}"', text)
    file.write_text(text)
    return repository


def elsewhere(bundle: Path, folder: Path, **settings: Any) -> Path:
    """A copy of the bundle's repository that names the bundle."""
    return configure(Path(shutil.copytree(bundle / "triton", folder / "triton")), bundle=str(bundle), **settings)


# -- clients -------------------------------------------------------------------------------------------------------


def arrays(**given: Any) -> dict[str, np.ndarray]:
    """Inputs in the types of config.pbtxt."""
    return {
        name: np.array([value.encode()], dtype=np.object_)
        if isinstance(value, str)
        else np.asarray(value).astype(triton_request.NUMPY_TYPES[triton_request.INPUTS[name][0]])
        for name, value in given.items()
    }


class Asked:
    """A request on a gRPC stream of its own; `cancel` ends it, `answers` waits for its end."""

    def __init__(self, server: Server, parameters: dict[str, Any] | None = None, **given: Any) -> None:
        grpc = triton_server.grpc_client()
        self._events: queue.Queue[Any] = queue.Queue()
        self._client = grpc.InferenceServerClient(f"127.0.0.1:{server.grpc_port}")
        self._client.start_stream(lambda result, error: self._events.put(error or result))
        self._client.async_stream_infer(
            "diffusion_gemma",
            _inputs(grpc, **given),
            enable_empty_final_response=True,
            parameters=parameters,
        )

    def first(self) -> Any:
        return self._events.get(timeout=SECONDS)

    def cancel(self) -> None:
        self._client.stop_stream(cancel_requests=True)

    def answers(self) -> list[Any]:
        """All responses, and last an exception where there was an error."""
        events: list[Any] = []
        while not events or not _is_last(events[-1]):
            events.append(self.first())
        self._client.stop_stream()
        return events


def _inputs(grpc: Any, **given: Any) -> list[Any]:
    inputs = []
    for name, array in arrays(**given).items():
        kind = DTYPES.get(triton_request.INPUTS[name][0], "BYTES")
        inputs.append(grpc.InferInput(name, list(array.shape), kind))
        inputs[-1].set_data_from_numpy(array)
    return inputs


def _is_last(event: Any) -> bool:
    if isinstance(event, Exception):
        return True
    return bool(event.get_response().parameters["triton_final_response"].bool_param)


def tokens_of(answers: list[Any]) -> list[list[int]]:
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return np.concatenate([answer.as_numpy("tokens") for answer in answers], axis=1).tolist()


def expected(engine: Any, **given: Any) -> list[list[int]]:
    """New tokens of the engine itself."""
    inputs = arrays(**given)
    prompt = inputs.pop("prompt", None)
    ids = torch.tensor(
        inputs.pop("input_ids") if prompt is None else [build_tokenizer()(prompt.item().decode()).input_ids]
    )
    mask = inputs.pop("attention_mask", None)
    inputs.pop("stream", None)
    count = inputs.pop("max_new_tokens", np.array([4])).item()
    seed = inputs.pop("seed", np.array([0])).item()
    sampler = engine.sampler_defaults.with_overrides({name: value.item() for name, value in inputs.items()})
    mask = None if mask is None else torch.tensor(mask)
    return engine.generate(ids, mask, count, sampler, seed=seed).sequences[:, ids.shape[1] :].tolist()


# -- claims --------------------------------------------------------------------------------------------------------

GRPC = {
    "nothing but ids": dict(input_ids=IDS),
    "another seed": dict(input_ids=IDS, seed=[7]),
    "a negative seed of 64 bits": dict(input_ids=IDS, seed=[-(2**63)]),
    "three canvases at once": dict(input_ids=IDS, max_new_tokens=[12], seed=[5]),
    "three canvases, one by one": dict(input_ids=IDS, max_new_tokens=[12], seed=[5], stream=[True]),
    "a left-padded batch": dict(input_ids=IDS, attention_mask=MASK, max_new_tokens=[8], stream=[True]),
    "eight rows": dict(input_ids=IDS.repeat(4, 0), seed=[3]),
    "the loop": dict(input_ids=IDS, max_new_tokens=[8], **LOOP),
    "the loop's steps, observed": dict(input_ids=IDS, max_new_tokens=[8], stream=[True], **LOOP),
    "settings": dict(input_ids=IDS, entropy_bound=[2.5], t_min=[0.2], t_max=[1.5], stability_threshold=[2]),
    "text": dict(prompt=PUZZLE, max_new_tokens=[8], seed=[2]),
    "text, canvas by canvas": dict(prompt=PUZZLE, max_new_tokens=[8], seed=[2], stream=[True]),
}


@pytest.mark.parametrize("case", GRPC)
def test_grpc_answers_are_those_of_the_bundle(server: Server, engine: Any, case: str) -> None:
    given = GRPC[case]
    answers = Asked(server, **given).answers()
    assert tokens_of(answers) == expected(engine, **given)
    canvases = given.get("max_new_tokens", [4])[0] // 4
    assert len(answers) == (canvases if given.get("stream") else 1)
    assert answers[-1].as_numpy("forwards").shape == (len(tokens_of(answers)),)
    decode = build_tokenizer().decode
    for answer in answers:
        text = [decode(row, skip_special_tokens=True).encode() for row in answer.as_numpy("tokens")]
        assert answer.as_numpy("text").tolist() == text


HTTP = {
    "nothing but ids": dict(input_ids=[3, 5, 8]),
    "three canvases": dict(input_ids=[3, 5, 8], max_new_tokens=12, seed=4),
    "text": dict(prompt=PUZZLE, max_new_tokens=8),
    "the loop": dict(prompt=PUZZLE, max_denoising_steps=8, confidence_threshold=0),
}


@pytest.mark.parametrize("case", HTTP)
@pytest.mark.parametrize("path", ["generate", "generate_stream"])
def test_http_answers_are_those_of_the_bundle(server: Server, engine: Any, case: str, path: str) -> None:
    given = HTTP[case] | ({"stream": True} if path == "generate_stream" else {})
    status, text = server.post(path, json.dumps(given).encode())
    assert status == 200
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
    inputs = {name: [value] for name, value in given.items()} | ({"prompt": PUZZLE} if "prompt" in given else {})
    found = [token for line in lines for token in json.loads(line)["tokens"]]
    assert [found] == expected(engine, **inputs)
    assert len(lines) == (given.get("max_new_tokens", 4) // 4 if path == "generate_stream" else 1)


def test_requests_at_once_get_the_answers_of_requests_alone(server: Server, engine: Any) -> None:
    given = [dict(input_ids=IDS, seed=[seed], max_new_tokens=[8], stream=[seed % 2 == 0]) for seed in range(8)]
    asked = [Asked(server, **one) for one in given]
    assert [tokens_of(one.answers()) for one in asked] == [expected(engine, **one) for one in given]


MALFORMED: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "give one of input_ids"),
    "ids and text": (dict(input_ids=IDS, prompt=PUZZLE), "give one of input_ids"),
    "no rows": (dict(input_ids=np.zeros((0, 3))), r"input_ids has shape \[0, 3\]"),
    "no tokens": (dict(input_ids=np.zeros((2, 0))), r"input_ids has shape \[2, 0\]"),
    "an id that is none": (dict(input_ids=IDS + 60), "token ids go from 0 to 63"),
    "nine rows": (dict(input_ids=IDS[:1].repeat(9, 0)), "9 rows, but the engines were built for batches of 1 to 8"),
    "too much context": (dict(input_ids=IDS, max_new_tokens=[2**31 - 1]), "need a context of"),
    "a negative bound": (dict(input_ids=IDS, entropy_bound=[-1]), "entropy_bound=-1.0; expected a finite number"),
    "a bound that is no number": (dict(input_ids=IDS, entropy_bound=[np.nan]), "entropy_bound=nan; expected"),
    "a mask of twos": (dict(input_ids=IDS, attention_mask=IDS * 0 + 2), "attention_mask must be zeros at the left"),
    "a mask of text": (dict(prompt=PUZZLE, attention_mask=MASK), "attention_mask goes with input_ids"),
    "a letter that the tokenizer lacks": (dict(prompt="∃"), "cannot read prompt="),
    "two seeds": (dict(input_ids=IDS, seed=[1, 2]), r"expected \[1\]|unexpected shape"),
    "a misspelt key": (dict(input_ids=IDS, parameters={"max_new_token": 8}), "nothing here reads max_new_token"),
    "a parameter": (dict(input_ids=IDS, parameters={"seed": 8}), "seed came as a parameter"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_request_is_refused_and_the_next_one_served(server: Server, engine: Any, case: str) -> None:
    given, message = MALFORMED[case]
    error = Asked(server, **given).answers()[-1]
    assert isinstance(error, Exception) and re.search(message, str(error)), str(error)
    assert tokens_of(Asked(server, input_ids=IDS).answers()) == expected(engine, input_ids=IDS)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"input_ids": [3, 5], "max_new_token": 8}', "nothing here reads max_new_token"),
        (b'{"input_ids": []}', r"input_ids has shape \[1, 0\]"),
        (b'{"input_ids": [3, 5], "entropy_bound": -1}', "entropy_bound=-1.0; expected"),
        (b'{"prompt": "\xff"}', ""),
    ],
)
def test_malformed_http_is_a_bad_request(server: Server, body: bytes, message: str) -> None:
    status, text = server.post("generate", body)
    assert 400 <= status < 500 and re.search(message, text), (status, text)


def test_a_cancelled_request_makes_room_for_the_next(server: Server, engine: Any) -> None:
    running, waiting = (Asked(server, input_ids=IDS, stream=[True], **LONG) for _ in range(2))
    running.first()  # 13 canvases are to come
    following = Asked(server, input_ids=IDS, seed=[9])
    running.cancel()
    waiting.cancel()
    assert tokens_of(following.answers()) == expected(engine, input_ids=IDS, seed=[9])
    assert "a cancelled request was ended" in server.tail()


def test_the_server_knows_the_table_of_inputs(server: Server) -> None:
    configuration = json.loads(server.get("models/diffusion_gemma/config"))
    assert configuration["model_transaction_policy"] == {"decoupled": True}
    found = {one["name"]: (one["data_type"], [int(n) for n in one["dims"]]) for one in configuration["input"]}
    assert found == triton_request.INPUTS
    assert all(one["optional"] for one in configuration["input"])
    assert [one["name"] for one in configuration["output"]] == ["tokens", "text", "forwards", "tokens_per_forward"]


def test_decoupled_it_answers_no_infer(server: Server) -> None:
    assert server.post("infer", b'{"inputs": []}')[0] == 501
    grpc = triton_server.grpc_client()
    client = grpc.InferenceServerClient(f"127.0.0.1:{server.grpc_port}")
    with pytest.raises(Exception, match="UNIMPLEMENTED.*decoupled"):
        client.infer("diffusion_gemma", _inputs(grpc, input_ids=IDS))


def test_not_decoupled_it_answers_infer(bundle: Path, environment: Path, engine: Any, tmp_path: Path) -> None:
    repository = elsewhere(bundle, tmp_path, decoupled=False)
    with Server(repository, environment, tmp_path / "log") as server:
        inputs = [dict(name="input_ids", datatype="INT64", shape=[2, 5], data=IDS.tolist())]
        inputs += [dict(name="max_new_tokens", datatype="INT32", shape=[1], data=[8])]
        status, text = server.post("infer", json.dumps({"inputs": inputs}).encode())
        assert status == 200, text
        outputs = {one["name"]: one for one in json.loads(text)["outputs"]}
        found = np.array(outputs["tokens"]["data"]).reshape(outputs["tokens"]["shape"]).tolist()
        assert found == expected(engine, input_ids=IDS, max_new_tokens=[8])
        grpc = triton_server.grpc_client()
        client = grpc.InferenceServerClient(f"127.0.0.1:{server.grpc_port}")
        answer = client.infer("diffusion_gemma", _inputs(grpc, prompt=PUZZLE, seed=[3]))
        assert answer.as_numpy("tokens").tolist() == expected(engine, prompt=PUZZLE, seed=[3])
        status, text = server.post("generate", b'{"input_ids": [3, 5], "stream": true}')
        assert status == 400 and "stream=true needs `decoupled: true`" in text
        with pytest.raises(Exception, match="prompt is not UTF-8 text"):
            bytes_given = grpc.InferInput("prompt", [1], "BYTES")
            bytes_given.set_data_from_numpy(np.array([b"\xff"], dtype=np.object_))
            client.infer("diffusion_gemma", [bytes_given])


def test_stopping_finishes_what_is_in_flight(bundle: Path, environment: Path, engine: Any, tmp_path: Path) -> None:
    with Server(bundle / "triton", environment, tmp_path / "log") as server:
        given = [dict(input_ids=IDS, seed=[seed], max_new_tokens=[12], stream=[True]) for seed in range(9)]
        asked = [Asked(server, **one) for one in given]
        first, stubs = asked[0].first(), server.stubs()
        server.terminate()
        answers = [[first, *asked[0].answers()], *(one.answers() for one in asked[1:])]
        exit_code = server.wait()
    assert exit_code == 0, server.tail()
    for one, found in zip(given, answers, strict=True):
        assert tokens_of(found) == expected(engine, **one)
    assert stubs and not [pid for pid in stubs if psutil.pid_exists(pid)]
    assert "Signal (11)" not in server.tail()


def test_stopping_waits_for_no_cancelled_request(bundle: Path, environment: Path, tmp_path: Path) -> None:
    with Server(bundle / "triton", environment, tmp_path / "log") as server:
        running, waiting = (Asked(server, input_ids=IDS, **LONG) for _ in range(2))
        stubs = server.stubs()
        server.terminate()
        running.cancel()
        waiting.cancel()
        assert server.wait() == 0, server.tail()
    assert stubs and not [pid for pid in stubs if psutil.pid_exists(pid)]


def test_a_killed_server_leaves_no_process(bundle: Path, environment: Path, tmp_path: Path) -> None:
    with Server(bundle / "triton", environment, tmp_path / "log") as server:
        asked = Asked(server, input_ids=IDS, stream=[True], **LONG)
        asked.first()  # 13 canvases are to come
        stubs = [psutil.Process(pid) for pid in server.stubs()]
        assert stubs and server.process is not None
        server.process.kill()
        server.wait()
        assert not psutil.wait_procs(stubs, timeout=SECONDS)[1]


LACKS = {
    # the environment of this process is found, and with it the NumPy that this release misreads
    "NumPy 1.26": (
        Path(sys.prefix),
        {},
        r"misreads NumPy 2.*: the integers \[0, 1, 2\] came .*; use Triton >= 24\.11,",
    ),
    "PYTHONPATH": (
        None,
        {"PYTHONPATH": "/elsewhere"},
        "PYTHONPATH=/elsewhere is not read, .*; use Triton >= 24.11, or",
    ),
    "packages": (None, {}, "No module named '[a-z]+', asked of the Python in .*/environment; install it there"),
}


@pytest.mark.parametrize("lacks", LACKS)
def test_what_is_lacking_is_told_in_the_log(lacks: str, bundle: Path, tmp_path: Path) -> None:
    environment, variables, message = LACKS[lacks]
    environment = environment or triton_server.environment(tmp_path / "environment", [CACHE / "numpy"])
    server = Server(bundle / "triton", environment, tmp_path / "log", variables)
    server.start()
    assert server.wait() == 1
    assert re.search(message, server.log.read_text()), server.tail()
