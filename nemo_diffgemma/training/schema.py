"""The configuration of a run: one dataclass for each group of `conf/`, the only place where a key is declared.

Hydra composes YAML files and overrides; `validate` compares the result with these classes and names an unknown or
ill-typed key, its group and the closest valid one.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any



class ConfigurationError(ValueError):
    """A run configuration that cannot be used; the message names the key and what to write."""


@dataclass
class ObjectiveGroup:
    """What is minimised; see `nemo_diffgemma/diffusion/objective.py`."""

    canvases_per_example: int = 1  # scored at once, chosen uniformly; 0: all of them
    autoregressive_weight: float = 1.0
    self_conditioning_probability: float = 0.5
    noise_floor: float = 1e-3  # noise levels are uniform in [noise_floor, 1)
    reduction: str = "example"  # mean over examples of means over tokens, or "token": mean over all tokens


@dataclass
class ModelGroup:
    """Where the network comes from. `checkpoint` wins; without one, `architecture` is trained from scratch."""

    checkpoint: str | None = None  # Hugging Face directory, sharded checkpoint or .nemo
    architecture: dict[str, Any] = field(default_factory=dict)  # fields of ModelConfig
    dtype: str = "float32"  # or bfloat16: weights and activations; the optimizer keeps float32
    recompute: str = "none"  # selective, full
    objective: ObjectiveGroup = field(default_factory=ObjectiveGroup)


@dataclass
class DataGroup:
    """What is trained on. `global_batch_size` counts examples of one optimizer step over all replicas."""

    kind: str = "sudoku"
    global_batch_size: int = 64
    micro_batch_size: int = 0  # examples of one forward pass of one replica; 0: its whole share
    held_out: int = 28  # grids kept for tests
    clues: tuple[int, int] = (0, 12)
    test_clues: tuple[int, int] = (4, 8)
    test_puzzles: int = 400


@dataclass
class OptimGroup:
    """AdamW with warm-up, a flat part and a decay."""

    lr: float = 1e-4
    min_lr: float = 0.0
    warmup_steps: int = 0
    decay: str = "cosine"  # or linear, constant
    decay_start: float = 0.0  # part of the run after which the decay begins
    weight_decay: float = 0.0  # on matrices only
    betas: tuple[float, float] = (0.95, 0.99)
    eps: float = 1e-8
    clip_grad: float = 1.0
    distributed: bool = True  # optimizer state cut over replicas


@dataclass
class ParallelGroup:
    """Sizes of the parallel axes; the number of processes follows from them."""

    tensor: int = 1
    expert: int = 1
    expert_tensor: int = 1
    pipeline: int = 1
    context: int = 1
    replicas: int = 1  # data-parallel copies of the smallest world, where we start the processes ourselves


@dataclass
class TrainerGroup:
    """How long, and what happens meanwhile. Intervals are in optimizer steps; 0 switches one off."""

    max_steps: int = 100
    validate_every: int = 0
    validation_examples: int = 64
    checkpoint_every: int = 0  # besides the last step, which is always kept
    threads: int = 0  # CPU threads of each process; 0: the machine's cores divided by the processes on it
    progress: bool = True


@dataclass
class ExpManagerGroup:
    """Where results go: `exp_dir/name/version` is the run directory."""

    exp_dir: str = "runs"
    name: str = "default"
    version: str | None = None  # None: the time of the start
    resume: bool = True  # continue from the last checkpoint of this run directory, if it has one
    tensorboard: bool = True
    wandb_project: str | None = None


@dataclass
class SamplerGroup:
    """Overrides of the checkpoint's sampler settings; fields of SamplerConfig, None keeps the checkpoint's."""

    max_denoising_steps: int | None = None
    entropy_bound: float | None = None
    t_min: float | None = None
    t_max: float | None = None
    stability_threshold: int | None = None
    confidence_threshold: float | None = None
    eos_token_id: Any = None
    pad_token_id: int | None = None


@dataclass
class TrainConfig:
    """Everything `launch/train.py` reads."""

    model: ModelGroup = field(default_factory=ModelGroup)
    data: DataGroup = field(default_factory=DataGroup)
    optim: OptimGroup = field(default_factory=OptimGroup)
    parallel: ParallelGroup = field(default_factory=ParallelGroup)
    trainer: TrainerGroup = field(default_factory=TrainerGroup)
    exp_manager: ExpManagerGroup = field(default_factory=ExpManagerGroup)
    sampler: SamplerGroup = field(default_factory=SamplerGroup)
    seed: int = 0
