"""The configuration of a run: one dataclass for each group of `conf/`, the only place where a key is declared.

Only the keys of a kind of data are declared beside that kind: data/tasks.py.

Hydra composes YAML files and overrides; `validate` compares the result with these classes and names an unknown or
ill-typed key, its group and the closest valid one.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from nemo_diffgemma.config import ModelConfig
from nemo_diffgemma.data.tasks import KINDS, DataGroup, default_data, task_class
from nemo_diffgemma.diffusion.objective import ObjectiveConfig
from nemo_diffgemma.errors import ConfigurationError as ConfigurationError
from nemo_diffgemma.errors import UserError
from nemo_diffgemma.fields import group_of, options_of
from nemo_diffgemma.lora.config import LoraGroup
from nemo_diffgemma.parallel.layout import ParallelLayout
from nemo_diffgemma.repository import user_path

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # shares of replaced tokens at which canvas loss is measured
BUDGETS = (1, 2, 4, 8, 16, 48)  # numbers of denoising steps with which puzzles are solved
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # what a network can be loaded as
RECOMPUTE = ("none", "selective", "full")


@dataclass
class ModelGroup:
    """The source of the network. `checkpoint` wins; without one, `architecture` is trained from scratch."""

    checkpoint: str | None = None  # Hugging Face directory, sharded checkpoint, .nemo, or an adapter: trained on
    architecture: dict[str, Any] = field(default_factory=dict)  # fields of ModelConfig
    dtype: str = "float32"  # or bfloat16: weights and activations; the optimizer keeps float32
    recompute: str = "none"  # selective, full
    freeze: list[str] = field(default_factory=list)  # router, embeddings, experts, or patterns over tensor names
    lora: LoraGroup = field(default_factory=LoraGroup)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)

    def check(self) -> None:
        """Raise `ConfigurationError` for a dtype or a recomputation that there is not."""
        self.lora.check()
        if self.dtype not in DTYPES:
            raise ConfigurationError(f"model.dtype={self.dtype!r}; use one of {', '.join(DTYPES)}")
        if self.recompute not in RECOMPUTE:
            raise ConfigurationError(f"model.recompute={self.recompute!r}; use one of {', '.join(RECOMPUTE)}")


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
    clip_grad: float = 1.0  # largest norm of the gradient; 0: any
    ema: float = 0.0  # decay of an average of the weights, kept beside them; 0: none
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

    def layout(self) -> ParallelLayout:
        """Raises `LayoutError`."""
        return ParallelLayout(self.tensor, self.expert, self.expert_tensor, self.pipeline, self.context)


@dataclass
class TrainerGroup:
    """How long, and what happens meanwhile. Intervals are in optimizer steps; 0 switches one off."""

    max_steps: int = 100
    validate_every: int = 0
    validation_examples: int = 64
    checkpoint_every: int = 0  # besides the last step
    keep_last: int = (
        0  # checkpoints; all are kept unless keep_last, keep_best or keep_every says which, then one or more
    )
    keep_best: int = 0  # and so many, by keep_by
    keep_by: str = "canvas_loss"  # or bits_per_token, or what the task measures, such as solve_rate
    keep_every: int = 0  # and those whose step is a multiple of it
    hang_minutes: float = 30.0  # without a step (start, validation and saving included) until the run ends itself
    threads: int = 0  # CPU threads of each process; 0: the machine's cores divided by the processes on it
    progress: bool = True


@dataclass
class ExpManagerGroup:
    """The directory for results: `exp_dir/name/version` is the run directory."""

    exp_dir: str = "runs"
    name: str = "default"
    version: str | None = None  # None: the time of the start
    resume: bool = True  # continue from the last checkpoint of this run directory, if it has one
    tensorboard: bool = True
    wandb_project: str | None = None

    @property
    def run_dir(self) -> Path:
        """The run directory, once the version is fixed."""
        assert self.version is not None
        return user_path(self.exp_dir) / self.name / self.version


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
class PreflightGroup:
    """What a node must show before a job starts on it; one that does not is excluded."""

    scratch: str = "/tmp"  # must exist, be writable and have min_free_gb; %N is the node's name
    min_free_gb: float = 10.0
    min_shm_gb: float = 1.0
    max_clock_skew_s: float = 5.0
    timeout_s: float = 300.0


@dataclass
class ClusterGroup:
    """The cluster that does the work; without a scheduler, this machine. `slurm` submits a job: slurm/README.md."""

    scheduler: str | None = None
    gpu: str | None = None  # of conf/gpu
    device: str = "cuda"  # or cpu: what the pre-flight check expects
    nodes: int = 1
    gpus_per_node: int = 8  # one process each
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str = "04:00:00"
    cpus_per_task: int | None = None
    grace_seconds: int = 300  # before the time limit: time to finish a step and to save
    max_restarts: int = 20
    sbatch: dict[str, str] = field(default_factory=dict)  # more #SBATCH options: {constraint: h100}
    srun: list[str] = field(default_factory=list)  # more options of every srun
    container_image: str | None = None  # for pyxis and enroot; without one, `python`
    container_mounts: list[str] = field(default_factory=list)
    python: str | None = None  # interpreter on the nodes; None: this one, or the container's
    setup: list[str] = field(default_factory=list)  # lines of shell before anything runs: module load ...
    environment: dict[str, str] = field(default_factory=dict)
    jobs_dir: str = "runs/jobs"  # logs of jobs that have no run directory
    preflight: PreflightGroup = field(default_factory=PreflightGroup)


@dataclass
class TrainConfig:
    """Everything `launch/train.py` reads."""

    model: ModelGroup = field(default_factory=ModelGroup)
    data: DataGroup = field(default_factory=default_data)
    optim: OptimGroup = field(default_factory=OptimGroup)
    parallel: ParallelGroup = field(default_factory=ParallelGroup)
    trainer: TrainerGroup = field(default_factory=TrainerGroup)
    exp_manager: ExpManagerGroup = field(default_factory=ExpManagerGroup)
    cluster: ClusterGroup = field(default_factory=ClusterGroup)
    dry_run: bool = False  # show the script of a cluster, submit nothing
    seed: int = 0


# -- checks ----------------------------------------------------------------------------------------------------------

_ARCHITECTURE = tuple(f.name for f in dataclasses.fields(ModelConfig) if f.name != "source")


def validate[Schema](
    config: DictConfig | Mapping[str, Any], schema: type[Schema], restore: Callable[[Any], Any] = lambda values: values
) -> Schema:
    """`config` as an instance of `schema`. Raises `ConfigurationError` naming the key, group and closest one.

    `restore` puts texts that no grammar may see (nemo_diffgemma/cli/arguments.py) in place before anything looks at
    them.
    """
    try:
        # as plain values: a DictConfig to which Hydra's `+key=value` has added keys would bring them along
        plain: Any = OmegaConf.to_container(config) if isinstance(config, DictConfig) else dict(config)
        if not isinstance(plain, dict):
            raise ConfigurationError(f"expected keys and values, not a list: {', '.join(keys_of(schema))}")
        data = data_group(schema, restore(plain))
        check_values(plain, schema, data=data)
        merged = OmegaConf.merge(structured(schema, data), plain)
        _check_architecture(OmegaConf.select(merged, "model.architecture") or {})
        values = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigurationError(explain(error, schema, data)) from None
    assert isinstance(values, dict)
    return instance(schema, restore(values))


def instance[Schema](
    schema: type[Schema], values: Mapping[Any, Any], prefix: str = "", data: type[DataGroup] | None = None
) -> Schema:
    """`schema` from plain values as they are, without interpolation. Raises `ConfigurationError`."""
    data = data or data_group(schema, values)
    hints = get_type_hints(schema)
    arguments = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in hints:
            raise ConfigurationError(unknown_key(key, keys_of(schema, prefix, data)))
        kind = hints[name]
        if (group := _group(kind, data)) is not None and isinstance(value, Mapping):
            value = instance(group, value, f"{key}.", data)
        elif get_origin(kind) is tuple:  # read as lists of any length
            if len(value) != len(get_args(kind)):
                raise ConfigurationError(f"{key}={value} has {len(value)} values; expected {len(get_args(kind))}")
            value = tuple(value)
        _check_numbers(key, value)
        arguments[name] = value
    try:
        return schema(**arguments)
    except ConfigurationError:
        raise
    except UserError as error:  # a group's own check
        raise ConfigurationError(str(error)) from None


def _group(kind: Any, data: type[DataGroup] | None) -> Any:
    """The dataclass of a group of keys, of the data that of their kind; None where `kind` is no group."""
    group = group_of(kind)
    return data if group is DataGroup and data is not None else group


def check_values(
    values: Mapping[Any, Any], schema: type, prefix: str = "", data: type[DataGroup] | None = None
) -> None:
    """Raise `ConfigurationError` for unknown keys, values where a group is expected, and numbers out of range.

    Also for what would be converted without a word: text that YAML read as something else. `data` has the keys of the
    kind of data, of which there may be none above `values`.
    """
    data = data or data_group(schema, values)
    hints = _fields(schema, data)
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in hints:
            if data is not None and schema is data and name in _fields(DataGroup, None):
                raise ConfigurationError(
                    f"{key} is no key of data.kind={data.kind!r}; choose the kind with all of its keys: "
                    f"data={data.kind}"
                )
            raise ConfigurationError(unknown_key(key, keys_of(schema, prefix, data)))
        kind = hints[name]
        _check_numbers(key, value)
        group = _group(kind, data)
        if (group is not None or get_origin(kind) is dict) and not (value is None or isinstance(value, Mapping | str)):
            expected = f"the keys {', '.join(_fields(group, data))}" if group else "names and values"
            raise ConfigurationError(f"{key}={value}; expected {expected}")
        if group is not None and isinstance(value, Mapping):
            check_values(value, group, f"{key}.", data)
        elif get_origin(kind) is dict and get_args(kind)[1] is str and isinstance(value, Mapping):
            for part, given in value.items():
                _check_text(f"{key}.{part}", given)
        elif get_origin(kind) is list and get_args(kind)[0] is str and isinstance(value, list):
            for index, given in enumerate(value):
                _check_text(f"{key}[{index}]", given)
        elif str in options_of(kind) and value is not None:
            _check_text(key, value)


def _check_text(key: str, value: Any) -> None:
    if isinstance(value, str):
        return
    what = {bool: "true or false", int: "a number", float: "a number", type(None): "null"}
    raise ConfigurationError(
        f"{key}: {value!r} is {what.get(type(value), type(value).__name__)}, as YAML reads it; expected text: write it "
        "in quotes"
    )


def _check_numbers(key: str, value: Any) -> None:
    """Raise `ConfigurationError` for numbers that nothing here can count or compute with."""
    for number in value if isinstance(value, list | tuple) else (value,):
        if isinstance(number, int) and not -(2**63) <= number < 2**63:
            raise ConfigurationError(f"{key} is beyond 64 bits; expected a whole number from -2^63 to 2^63 - 1")
        if isinstance(number, float) and not math.isfinite(number):
            raise ConfigurationError(f"{key}={number}; expected a finite number")


def structured(schema: type, data: type[DataGroup] | None) -> DictConfig:
    """`schema` as OmegaConf has it, with the keys of a kind of data, where it has data."""
    node = OmegaConf.structured(schema)
    if data is not None:
        node.data = OmegaConf.structured(data)
    return node


def data_group(schema: type, values: Mapping[Any, Any]) -> type[DataGroup] | None:
    """The keys of the kind of data in `values`; None where the schema has no data.

    Raises `ConfigurationError` for a kind that does not exist.
    """
    if get_type_hints(schema).get("data") is not DataGroup:
        return None
    given = values.get("data")
    kind = given.get("kind", DataGroup.kind) if isinstance(given, Mapping) else DataGroup.kind
    return task_class(str(kind)).keys


def _fields(schema: type, data: type[DataGroup] | None) -> dict[str, Any]:
    """Types of the fields by name. `data` None: the kind is unknown, and `DataGroup` has the keys of all kinds."""
    if schema is not DataGroup:
        return get_type_hints(schema)
    groups = [data] if data is not None else [task_class(kind).keys for kind in KINDS]
    return {name: hint for group in groups for name, hint in get_type_hints(group).items()}


def explain(error: OmegaConfBaseException, schema: type, data: type[DataGroup] | None = None) -> str:
    """What is wrong with a key, in one paragraph. `data` has the keys of the kind of data, where that is known."""
    key = str(error.full_key or error.key or "")
    problem = (error.msg or str(error)).splitlines()[0]
    if key in keys_of(schema, data=data):
        if isinstance(error, MissingMandatoryValue):
            return f"{key} is not given and has no default; write {key}=..."
        return f"{key}: {problem}; expected {_expected(key, schema, data)}"
    if key.startswith("model.architecture."):
        return unknown_key(key, [f"model.architecture.{name}" for name in _ARCHITECTURE])
    return unknown_key(key, keys_of(schema, data=data))


def unknown_key(key: str, known: list[str]) -> str:
    """The error text for an unknown `key`: the closest known key and the keys of its group."""
    group, _, name = key.rpartition(".")
    others = [other.rpartition(".")[2] for other in known if other.rpartition(".")[0] == group]
    message = f"unknown key {key}"
    likely = [f"{group}.{near}" if group else near for near in difflib.get_close_matches(name, others, n=1, cutoff=0.7)]
    likely += [other for other in known if other.rpartition(".")[2] == name]  # right name, wrong group
    likely += [f"{group}.{near}" for near in difflib.get_close_matches(name, others, n=1, cutoff=0)] if group else []
    likely += difflib.get_close_matches(key, known, n=1, cutoff=0)
    message += f"; did you mean {likely[0]}?"
    if others:
        message += f" {f'Group {group}' if group else 'The top level'} has {', '.join(sorted(others))}."
    return message


def keys_of(schema: type, prefix: str = "", data: type[DataGroup] | None = None) -> list[str]:
    """Every key of a schema with dots, groups included; of `data` those of this kind, or of all (None)."""
    keys = []
    for name, kind in _fields(schema, data).items():
        keys.append(prefix + name)
        if (group := group_of(kind)) is not None:
            keys += keys_of(group, f"{prefix}{name}.", data)
    return keys


def _expected(key: str, schema: type, data: type[DataGroup] | None) -> str:
    kind: Any = schema
    for name in key.split("."):
        kind = _fields(group_of(kind) or kind, data)[name]
    kind = group_of(kind) or kind
    if dataclasses.is_dataclass(kind):
        return f"the keys {', '.join(_fields(kind, data))}"  # type: ignore[arg-type]
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return names.get(kind, str(kind).replace("tuple[", "[").replace("None", "null"))


def _check_architecture(architecture: Mapping[Any, Any]) -> None:
    for name in architecture:
        if name not in _ARCHITECTURE:
            raise ConfigurationError(
                unknown_key(f"model.architecture.{name}", [f"model.architecture.{known}" for known in _ARCHITECTURE])
            )
