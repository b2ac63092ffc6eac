"""The NeMo model class: configuration, data, archives and the training step; Megatron does the rest.

    model = DiffusionGemmaModel(ModelSettings.of(config), trainer)     # after parallel.initialize(layout)
    trainer.fit(model)
    model.save_to("model.nemo");  DiffusionGemmaModel.restore_from("model.nemo")     # in any layout

One optimizer step: the replica's share of the global batch is split into micro-batches, whose losses are shares of the
global mean, so that gradients only ever add up. Everything random is keyed by (seed, sample): the batch of a step, its
noise and its loss do not depend on the layout.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from nemo.core import ModelPT
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils.data import DataLoader

from nemo_diffgemma import non_finite
from nemo_diffgemma.checkpoint import nemo_archive, sharded
from nemo_diffgemma.config import ModelConfig
from nemo_diffgemma.data import Batches, PackedBatches, collate, collate_packed
from nemo_diffgemma.data.packing import Size
from nemo_diffgemma.data.tasks import DataGroup, Task, default_data, fill_id, task_of
from nemo_diffgemma.diffusion.generate import Generation
from nemo_diffgemma.diffusion.objective import Scored
from nemo_diffgemma.diffusion.rows import Rows
from nemo_diffgemma.diffusion_gemma import DiffusionGemma
from nemo_diffgemma.lora.opening import prepare, resume
from nemo_diffgemma.lora.peft_files import is_adapter
from nemo_diffgemma.parallel.groups import process_groups
from nemo_diffgemma.schema import (
    DTYPES,
    ConfigurationError,
    ModelGroup,
    OptimGroup,
    TrainConfig,
    TrainerGroup,
    data_group,
    structured,
)
from nemo_diffgemma.training import average, flops, overlap
from nemo_diffgemma.training import optimizer as optimizers
from nemo_diffgemma.training.step import StepSums, accumulate
from nemo_diffgemma.training.step_result import StepResult


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step and what to change."""


@dataclass
class ModelSettings:
    """Settings of a run that the model class needs. NeMo forbids a group named `model` here, so it is `network`."""

    network: ModelGroup = field(default_factory=ModelGroup)
    data: DataGroup = field(default_factory=default_data)
    optim: OptimGroup = field(default_factory=OptimGroup)
    trainer: TrainerGroup = field(default_factory=TrainerGroup)
    seed: int = 0

    @classmethod
    def of(cls, config: TrainConfig) -> ModelSettings:
        return cls(config.model, config.data, config.optim, config.trainer, config.seed)

    @classmethod
    def read(cls, values: Any) -> ModelSettings:
        """From a configuration as NeMo keeps it; raises `ConfigurationError` for keys that do not exist."""
        plain = OmegaConf.to_container(values) if isinstance(values, DictConfig) else dict(values)
        known = {k: v for k, v in plain.items() if k not in ("target", "nemo_version")}  # type: ignore[union-attr]
        try:
            return OmegaConf.to_object(OmegaConf.merge(structured(cls, data_group(cls, known)), known))  # type: ignore[return-value]
        except Exception as error:  # OmegaConf's many kinds
            raise ConfigurationError(f"the model's configuration cannot be used: {error}") from None


class DiffusionGemmaModel(ModelPT):
    """DiffusionGemma under NeMo. `network` exists after `configure_model`, in the layout of `parallel.initialize`."""

    network: DiffusionGemma | None
    result: StepResult | None

    def __init__(self, cfg: ModelSettings | DictConfig, trainer: Any = None) -> None:
        self.settings = cfg if isinstance(cfg, ModelSettings) else ModelSettings.read(cfg)
        super().__init__(cfg=OmegaConf.create(asdict(self.settings)), trainer=trainer)
        self.automatic_optimization = False
        self.network = self.result = None

    @classmethod
    def list_available_models(cls) -> list:
        return []

    @classmethod
    def from_config_dict(cls, config: DictConfig, trainer: Any = None) -> DiffusionGemmaModel:
        """A configuration never chooses the class."""
        return cls(cfg=config, trainer=trainer)

    # -- network and optimizer -----------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Build the network and fill it: from `network.checkpoint`, else with the initial weights of the seed."""
        if self.network is None:
            self.network = build_network(self.settings.network, self.settings.seed)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        assert self.network is not None
        optim = self.settings.optim
        optimizers.check(optim)
        wrapped = optimizers.data_parallel(self.network, optim)
        self.__dict__["_wrapped"] = wrapped  # not a submodule: its parameters are the network's
        self._adapter = optimizers.MegatronAdapter(optimizers.build(wrapped, optim, self.network.dtype))
        return self._adapter

    @property
    def megatron_optimizer(self) -> MegatronOptimizer:
        return self._adapter.megatron

    # -- data ----------------------------------------------------------------------------------------------------

    @cached_property
    def task(self) -> Task:
        """What the network learns. Raises `ConfigurationError`."""
        return task_of(self.settings.data)

    def _ready(self, data: DataGroup | None) -> Task:
        """The task of `data` (None: of the run), which has read what it needs. Collective."""
        assert self.network is not None
        task = self.task if data is None else task_of(data)
        task.open(self.network.assets)
        task.prepare(self.network.model_config)
        return task

    def setup_training_data(self, train_data_config: DataGroup | None = None) -> None:
        """Endless stream of this replica's batches from the next step on; process groups must exist."""
        data, groups = train_data_config or self.settings.data, process_groups()
        done = 0 if self._trainer is None else self.trainer.global_step
        share = (data.global_batch_size, groups.dp_cp.rank(), groups.dp_cp.size())
        task = self._ready(train_data_config)
        batches: Any = Batches(*share, first_step=done)
        if budget := data.tokens_per_micro_batch:
            batches = PackedBatches(*share, budget, partial(self._size, task), first_step=done)
        self._train_dl = self._loader(task, task.training_examples(self.settings.seed), batches)

    def _size(self, task: Task, index: int) -> Size:
        """What a training example takes of a pass."""
        assert self.network is not None
        length, wanted = self.network.model_config.canvas_length, self.settings.network.objective.canvases_per_example
        tokens, canvases = task.size(self.settings.seed, index, length)
        return Size(tokens, length * (min(canvases, wanted) if wanted else canvases))

    def setup_validation_data(self, val_data_config: DataGroup | None = None) -> None:
        """Held-out examples, whole on every replica."""
        data = val_data_config or self.settings.data
        task = self._ready(val_data_config)
        rows = task.held_out_examples(self.settings.trainer.validation_examples)
        size = min(len(rows), data.micro_batch_size or data.global_batch_size)
        indices = [list(range(len(rows))[start : start + size]) for start in range(0, len(rows), size)]
        self._validation_dl = self._loader(task, rows, indices)

    def _loader(self, task: Task, examples: Any, batches: Iterable[list[Any]]) -> DataLoader:
        assert self.network is not None
        model = self.network.model_config
        to_rows = partial(
            collate_packed if isinstance(batches, PackedBatches) else collate,
            canvas_length=model.canvas_length,
            fill_id=fill_id(model),
            fills_rows=task.fills_rows,
        )
        return DataLoader(examples, batch_sampler=batches, collate_fn=to_rows)

    def train_dataloader(self) -> DataLoader:
        self.setup_training_data()  # now, when a resumed run knows its step
        return self._train_dl

    def val_dataloader(self) -> Any:
        if self._trainer is not None and self.trainer.limit_val_batches == 0:  # a run measures by a callback
            return []  # NeMo's setup asks all the same; there may be no held-out examples
        self.setup_validation_data()
        return self._validation_dl

    # -- steps ---------------------------------------------------------------------------------------------------

    def training_step(self, batch: Rows, batch_idx: int) -> None:
        """One optimizer step on this replica's share of the global batch."""
        started = time.perf_counter()
        settings, step = self.settings, self.trainer.global_step + 1
        assert self.network is not None
        wrapped: DistributedDataParallel = self.__dict__["_wrapped"]
        wrapped.zero_grad_buffer()
        self._adapter.zero_grad()
        numbers = self.accumulate(batch, self._backward, settings.data.micro_batch_size).read()
        # that waited for the losses, on a GPU not for the backward passes
        if not math.isfinite(numbers.loss):  # equal on every rank, as the norm is: a sum over all
            raise _failure("loss", numbers.loss, step, self._origin_of_loss(batch))
        overlap.finalize_gradients(wrapped)
        self._adapter.lr = optimizers.learning_rate(settings.optim, step, settings.trainer.max_steps)
        if settings.optim.ema:
            self._adapter.average_decay = average.decay_at(settings.optim.ema, step)
        self.optimizers().step()
        overlap.start_gather(wrapped)
        grad_norm = self._adapter.grad_norm  # waits for it, on a GPU not for the update
        if not math.isfinite(grad_norm):  # before it enters metrics or a checkpoint
            gradient = non_finite.non_finite_gradient(self.network)
            where = None if gradient is None else f"the gradient of {gradient}"
            raise _failure("gradient norm", grad_norm, step, where)
        seconds = time.perf_counter() - started
        self.result = StepResult.of(step, numbers, grad_norm, self._adapter.lr, seconds, settings.network.dtype)

    def _origin_of_loss(self, batch: Rows) -> str | None:
        """The first weight, or else the first output, that is not finite. Collective."""
        assert self.network is not None
        weight = non_finite.non_finite_weight(self.network)
        if weight is not None:
            return f"the weight {weight}"
        size = self.settings.data.micro_batch_size
        output = non_finite.non_finite_output(self.network, lambda: self.accumulate(batch, micro_batch_size=size))
        return None if output is None else f"the output of {output}"

    @torch.no_grad()
    def validation_step(self, batch: Rows, batch_idx: int) -> dict[str, Tensor]:
        """The objective on held-out rows, which every replica holds alike."""
        value = torch.tensor(self.accumulate(batch).read().loss)
        self.log("val_loss", value, batch_size=len(batch))
        return {"val_loss": value}

    def accumulate(
        self, batch: Rows, backward: Callable[[Scored, bool], None] | None = None, micro_batch_size: int = 0
    ) -> StepSums:
        """The passes of a step: losses of the global batch and more, with gradients by `backward`. Collective."""
        assert self.network is not None
        return accumulate(
            self.network,
            batch,
            self.settings.network.objective,
            self.settings.seed,
            global_batch_size=self.settings.data.global_batch_size,
            micro_batch_size=micro_batch_size,
            weight_gradients=self._trained_share,
            backward=backward,
        )

    @cached_property
    def _trained_share(self) -> float:
        return flops.trained_share(self.network)

    def _backward(self, scored: Scored, last: bool) -> None:
        """Gradients of a micro-batch; the last pass of the last one lets them be summed over replicas."""
        wrapped: DistributedDataParallel = self.__dict__["_wrapped"]
        with wrapped.no_sync():
            scored.backward_canvases()
        with nullcontext() if last else wrapped.no_sync():
            scored.backward_context()

    def on_train_end(self) -> None:
        self.finish_gather()

    def finish_gather(self) -> None:
        """Weights are whole afterwards."""
        if self.network is not None:
            self.network.finish_gather()

    def generate(self, *args: Any, **kwargs: Any) -> Generation:
        """`DiffusionGemma.generate` of the network."""
        self.configure_model()
        assert self.network is not None
        return self.network.generate(*args, **kwargs)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def saved_tensors(self) -> dict[str, ShardedTensor]:
        """What a run saves besides optimizer state, by keys `<kind>.<name>`; resuming fills the same.

        Of a base with adapters nothing: they have a file of their own.
        """
        assert self.network is not None
        return sharded.sharded_state_dict(self.network) if self.network.lora is None else {}

    # -- archives ------------------------------------------------------------------------------------------------

    def save_to(self, save_path: str | Path) -> None:
        """Write a `.nemo` archive. Collective: every rank of the layout calls it."""
        assert self.network is not None
        nemo_archive.write_archive(self.network, save_path, OmegaConf.to_yaml(self.cfg))

    @classmethod
    def restore_from(
        cls,
        restore_path: str | Path,
        override_config_path: str | Path | DictConfig | None = None,
        map_location: Any = None,
        strict: bool = True,
        return_config: bool = False,
        save_restore_connector: Any = None,
        trainer: Any = None,
        validate_access_integrity: bool = True,
    ) -> Any:
        """The model of an archive in the current layout, or its configuration where `return_config`. Collective.

        NeMo's signature; the network always goes where this rank computes, is always read strictly, and a connector
        is refused: `checkpoint/nemo_archive.py` reads weights only. `override_config_path` replaces the configuration.
        """
        if save_restore_connector is not None:
            raise ValueError("DiffusionGemmaModel reads its own archives; leave save_restore_connector out")
        root = nemo_archive.unpack(restore_path)
        config = override_config_path if override_config_path is not None else root / nemo_archive.CONFIG
        if not isinstance(config, DictConfig):
            config = OmegaConf.load(config)  # type: ignore[assignment]
        if return_config:
            return config
        settings = ModelSettings.read(config)
        settings.network.checkpoint = str(root / nemo_archive.WEIGHTS)
        model = cls(settings, trainer)
        model.configure_model()
        return model


# -- pieces ----------------------------------------------------------------------------------------------------------


def build_network(group: ModelGroup, seed: int) -> DiffusionGemma:
    """The network that `group` describes, with its weights. Raises on every rank alike where there is none."""
    if group.checkpoint is not None:
        group.check()
        network = DiffusionGemma.from_checkpoint(group.checkpoint, DTYPES[group.dtype])
        network.recompute = group.recompute
    else:
        network = empty_network(group)
        network.init_weights(seed)
    prepare(network, group, seed)
    return network


def resumed_network(group: ModelGroup, seed: int, checkpoint: Path) -> DiffusionGemma:
    """The network of a run that goes on from `checkpoint`, which Lightning then fills.

    That of adapters is their base, loaded again. Raises on every rank alike.
    """
    if is_adapter(checkpoint):
        network = build_network(group, seed)
        resume(network, checkpoint)  # refuses another base here, before anything else is made
        return network
    network = empty_network(group, checkpoint / sharded.ASSETS)
    prepare(network, group, seed)
    return network


def empty_network(group: ModelGroup, assets: Path | None = None) -> DiffusionGemma:
    """The network without weights, of `group.architecture` or of the config.json in `assets`."""
    group.check()
    network = DiffusionGemma(model_config(group, assets), DTYPES[group.dtype])
    network.assets, network.recompute = assets, group.recompute
    return network


def model_config(group: ModelGroup, assets: Path | None) -> ModelConfig:
    """The sizes of that network. Raises `ConfigurationError` or `ConfigError`."""
    try:
        return ModelConfig(**group.architecture) if assets is None else ModelConfig.from_pretrained(assets)
    except TypeError as error:
        raise ConfigurationError(
            f"model.architecture has a key that no network has ({error}); see the fields of ModelConfig"
        ) from None


def _failure(name: str, value: float, step: int, where: str | None) -> TrainingError:
    place = "" if where is None else f"; what is not finite first is {where}"
    return TrainingError(
        f"the {name} of step {step} is {value}{place}; the last checkpoint is from before it. Use a smaller optim.lr "
        "or optim.clip_grad, or more optim.warmup_steps"
    )
