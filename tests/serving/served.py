"""A tiny model with a tokenizer and a chat template, as a checkpoint, and a server of it in processes of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import msgspec

from nemo_diffgemma.repository import ROOT
from nemo_diffgemma.serving.settings import FrontSettings
from tests.commands import Command
from tests.serving import cases

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('no such role') }}{% endif %}"
    "<{{ message.role }}>{% generation %}{{ message.content | trim }}{% endgeneration %}\n"
    "{% endfor %}{% if add_generation_prompt %}<model>{% endif %}"
)


def tokenizer() -> Any:
    """Bytes as tokens, behind ten special ones, and words that only answers have."""
    return byte_tokenizer(("<pad>", "<eos>", "<bos>", *(f"<s{index}>" for index in range(3, 10))), TEMPLATE)


def byte_tokenizer(special: Sequence[str], template: str) -> Any:
    """Special tokens, the first three as usual, then bytes, then words, to as many ids as the network has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"Ġw{index}" for index in range(cases.IDS - len(special) - len(letters))]
    made = Tokenizer(models.BPE({word: id for id, word in enumerate([*special, *letters, *words])}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(special))
    made.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", chat_template=template
    )


def write_checkpoint(directory: Path, read: Any = None) -> Path:
    """The network of `cases` in the released layout."""
    cases.network().save_huggingface(directory)
    (read or tokenizer()).save_pretrained(directory)
    return directory


class Server:
    """`python -m nemo_diffgemma.serving.front`, or a command that becomes it, in a process of its own."""

    def __init__(self, command: list[str], folder: Path, **given: Any) -> None:
        self.log = folder / f"front-{time.time_ns()}.log"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, env=environment, text=True, **given
            )
        self.url, self.facts = "", {}
        self._clients: list[Any] = []

    def wait(self) -> Server:
        """Until it is ready."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the server has ended: {self.log.read_text()}"
        self.facts = json.loads(line)
        self.url = self.facts["url"]
        self.http = httpx.Client(base_url=self.url, timeout=300)
        self._clients.append(self.http)
        return self

    def openai(self) -> Any:
        """A client of the official package."""
        import openai

        self._clients.append(openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=500))
        return self._clients[-1]

    def children(self) -> list[int]:
        """Processes that the front end has started."""
        task = f"/proc/{self.process.pid}/task/{self.process.pid}/children"
        return [int(pid) for pid in Path(task).read_text().split()]

    def metric(self, name: str) -> float:
        """A figure of /metrics, labels included."""
        lines = self.http.get("/metrics").text.splitlines()
        return next((float(line.split()[-1]) for line in lines if line.startswith(f"diffgemma_{name} ")), 0.0)

    def until(self, name: str, fine: Callable[[float], bool], seconds: float = 300.0) -> None:
        """Wait for a figure."""
        end = time.monotonic() + seconds
        while not fine(value := self.metric(name)):
            assert time.monotonic() < end, f"{name} is {value}: {self.log.read_text()}"
            time.sleep(0.05)

    def stop(self) -> int:
        """SIGTERM -> exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(300)

    def close(self) -> None:
        """However the tests went."""
        for client in self._clients:
            client.close()
        for pid in self.children() if self.process.poll() is None else []:
            os.killpg(pid, signal.SIGKILL)
        self.process.kill()
        self.process.communicate()


def streamed(client: Any, begun: threading.Semaphore, **given: Any) -> list[int]:
    """Token ids of a completion, which releases `begun` at each chunk: who asks for a figure can miss short work."""
    tokens = []
    for chunk in client.completions.create(**given, stream=True):
        begun.release()
        tokens += (getattr(chunk.choices[0], "diffusion", None) or {}).get("token_ids", [])
    return tokens


def launched(checkpoint: Path, *arguments: str) -> Server:
    """As a user starts it: launch/serve.py, which starts its replicas."""
    command = [sys.executable, str(ROOT / "launch/serve.py"), f"checkpoint={checkpoint}", "port=0", *arguments]
    return Server(command, checkpoint.parent)


class Split:
    """A front end, and replicas that join it: forked from a process that has imported everything.

    What they run is a `checkpoint`, or what else `kind` says.
    """

    def __init__(
        self, checkpoint: Path, replicas: int, engine: dict[str, Any], kind: str = "checkpoint", **settings: Any
    ) -> None:
        self.checkpoint, self.engine, self.kind = checkpoint, engine, kind
        self.address = f"ipc://{checkpoint.parent}/join-{time.time_ns()}"
        given = FrontSettings(
            host="127.0.0.1", port=0, names=["tiny", "default"], replicas=[], environments=[], address=self.address,
            **settings,
        )  # fmt: skip
        reader, writer = os.pipe()
        os.write(writer, msgspec.json.encode(given))
        os.close(writer)
        command = [sys.executable, "-P", "-m", "nemo_diffgemma.serving.front", str(reader)]
        self.server = Server(command, checkpoint.parent, pass_fds=[reader])
        os.close(reader)
        self.replicas = [self.join() for _ in range(replicas)]

    def ready(self, replicas: int) -> Server:
        """Wait for so many."""
        self.server.wait()
        self.server.until("replicas", lambda count: count == replicas)
        return self.server

    def join(self) -> Command:
        """One more replica."""
        engine = [f"engine.{name}={value}" for name, value in self.engine.items()]
        return Command("launch/replica.py", f"{self.kind}={self.checkpoint}", f"front={self.address}", *engine)

    def close(self) -> None:
        self.server.close()
        for replica in self.replicas:
            if replica.poll() is None:
                os.kill(replica.pid, signal.SIGKILL)


def serve_in_layout(layout: dict[str, int], checkpoint: str, address: str, engine: dict[str, Any]) -> int:
    """A replica in ranks of a pool, until it is drained -> requests it has ever had that still run."""
    from nemo_diffgemma import DiffusionGemma, ParallelLayout
    from nemo_diffgemma.parallel import initialize
    from nemo_diffgemma.serving.engine_config import EngineConfig
    from nemo_diffgemma.serving.replica import Replica

    initialize(ParallelLayout(**layout))
    network = DiffusionGemma.from_checkpoint(checkpoint)
    replica = Replica(network, EngineConfig(**engine), address, "ranks", lonely_seconds=60.0)
    replica.serve()
    return len(replica.engine.running)


def chat_in_layout(layout: dict[str, int], checkpoint: str) -> tuple[list[int], list[int], int]:
    """What a chat in ranks of a pool gives, what `generate` gives there, and the drafts that this rank saw."""
    import torch

    from nemo_diffgemma import DiffusionGemma, ParallelLayout
    from nemo_diffgemma.parallel import initialize
    from nemo_diffgemma.serving.local_chat import text_of

    initialize(ParallelLayout(**layout))
    network, drafts = DiffusionGemma.from_checkpoint(checkpoint), []
    sampler = network.sampler_defaults.with_overrides({"max_denoising_steps": 3, "entropy_bound": 20.0})
    answer = network.chat("Hi", seed=3, max_tokens=60, canvas_length=16, sampler=sampler, on_draft=drafts.append)
    prompt = text_of(network).encode_chat([{"role": "user", "content": "Hi"}])
    result = network.generate(torch.tensor([prompt]), max_new_tokens=60, sampler=sampler, seed=[3], canvas_length=16)
    return answer.token_ids, result.sequences[0, len(prompt) :].tolist(), len(drafts) - answer.steps
