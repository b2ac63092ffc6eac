"""One replica of a server: a network in its layout that takes requests from a front end, on this node or another.

    python launch/replica.py checkpoint=google/... front=tcp://node0:5570 parallel=tp2_ep2
    srun --ntasks=4 python launch/replica.py checkpoint=google/... front=tcp://node0:5570 parallel=tp2_ep2
    python launch/replica.py bundle=bundles/mine provider=tensorrt front=tcp://node0:5570

launch/serve.py starts those of its own node by itself, and takes others where it is given an address to listen at:
address=tcp://0.0.0.0:5570. The port is for a network of trusted machines: whoever reaches it can serve answers.
SIGTERM drains: what is being answered is answered, then the replica ends. The last line is JSON: passes, seconds.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from omegaconf import MISSING

from nemo_diffgemma.cli.child_process import end_with_parent
from nemo_diffgemma.cli.output import Results
from nemo_diffgemma.cli.start import start
from nemo_diffgemma.schema import ParallelGroup
from nemo_diffgemma.serving.engine_config import EngineConfig, ServedModel
from nemo_diffgemma.serving.supervisor import STARTED_BY


@dataclass
class ReplicaConfig(ServedModel):
    """Configuration of `launch/replica.py`."""

    front: str = MISSING  # the front end's address: tcp://host:port
    name: str = ""  # in messages; empty: of this machine and process
    lonely_seconds: float = 60.0  # without a word of the front end, after which it ends
    parallel: ParallelGroup = field(default_factory=ParallelGroup)
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        self.check_model()


def replica(config: ReplicaConfig, results: Results) -> dict[str, Any]:
    """Serve until drained."""
    import socket

    from nemo_diffgemma.serving.replica import run

    name = config.name or f"{socket.gethostname()}-{os.getpid()}"
    where = config.front, name, config.lonely_seconds
    if config.bundle is not None:
        from export import open_bundle
        from export.engine.batching import BundleEngine

        return run(open_bundle(config.bundle, config.provider), config.engine, *where, BundleEngine)
    from nemo_diffgemma import DiffusionGemma
    from nemo_diffgemma.checkpoint.open import dtype_of
    from nemo_diffgemma.lora.opening import load_beside

    assert config.checkpoint is not None
    network = DiffusionGemma.from_checkpoint(config.checkpoint, dtype_of(config.dtype))
    load_beside(network, config.adapters)
    return run(network, config.engine, *where)


if __name__ == "__main__":
    if os.environ.get(STARTED_BY) == str(os.getppid()):
        end_with_parent()  # or a front end that was killed and starts again would find its GPUs taken
    start(replica, ReplicaConfig, "replica", distributed=True)
