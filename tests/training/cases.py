"""Jobs for the pool of ranks: small training runs and what is asked of them."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

ARCHITECTURE: dict[str, Any] = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_global_key_value_heads=2,
    global_head_dim=16,
    num_experts=8,
    top_k_experts=2,
    moe_intermediate_size=16,
    sliding_window=16,
    canvas_length=16,
    layer_types=["sliding_attention", "full_attention"],
)


def config(steps: int = 4, every: int = 0, layout: dict | None = None, **keys: Any) -> Any:
    """A tiny Sudoku run; `keys` are dotted, as `optim.lr` with `__` for the dot."""
    from nemo_diffgemma.schema import TrainConfig

    made = TrainConfig()
    made.model.architecture = dict(ARCHITECTURE)
    made.data.global_batch_size = 8
    made.data.test_puzzles = 8
    made.optim.lr = 1e-2
    made.optim.weight_decay = 0.01
    made.optim.warmup_steps = min(2, steps)
    made.trainer.max_steps = steps
    made.trainer.checkpoint_every = every
    made.trainer.threads = 1
    made.trainer.progress = False
    made.exp_manager.tensorboard = False
    for axis, size in (layout or {}).items():
        setattr(made.parallel, axis, size)
    for name, value in keys.items():
        *groups, key = name.split("__")
        setattr(functools.reduce(getattr, groups, made), key, value)
    return made


def run(directory: str, **settings: Any) -> list[dict[str, Any]]:
    """Train and return the lines of the metrics file."""
    from nemo_diffgemma.training.run import train

    result = train(config(**settings), directory)
    lines = [json.loads(line) for line in (Path(directory) / "metrics.jsonl").read_text().splitlines()]
    assert result.step == settings.get("steps", 4) and result.loss == lines[-1]["loss"]
    return lines


def interrupted(directory: str, stop_after: int, **settings: Any) -> None:
    """Train, and leave what a kill after `stop_after` steps leaves: metrics up to it, checkpoints from before it."""
    import shutil

    import torch.distributed as dist

    from nemo_diffgemma.training import callbacks
    from nemo_diffgemma.training.run import train

    before = callbacks.MetricsFile.on_train_batch_end

    def stop(self: Any, trainer: Any, *rest: Any) -> None:
        before(self, trainer, *rest)
        trainer.should_stop = trainer.global_step == stop_after

    callbacks.MetricsFile.on_train_batch_end = stop  # type: ignore[method-assign]
    try:
        result = train(config(**settings), directory)
    finally:
        callbacks.MetricsFile.on_train_batch_end = before  # type: ignore[method-assign]
    assert result.step == stop_after
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(result.checkpoint)
    dist.barrier()


def losses(directory: str, **settings: Any) -> list[tuple[float, float]]:
    """Loss and gradient norm of every step of a run."""
    return [(line["loss"], line["grad_norm"]) for line in run(directory, **settings)]


def interrupted_and_resumed(directory: str, **settings: Any) -> list[dict[str, Any]]:
    """Metrics of a run of 6 steps that stopped after 5 and went on from the checkpoint of step 3."""
    return resumed_elsewhere(directory, settings, settings)


def resumed_elsewhere(directory: str, before: dict[str, Any], after: dict[str, Any]) -> list[dict[str, Any]]:
    """Metrics of a run that stopped with the settings `before` and went on with those of `after`."""
    interrupted(directory, stop_after=5, steps=6, every=3, **before)
    written = (Path(directory) / "checkpoints" / "step-3" / "manifest.json").stat().st_ino
    lines = run(directory, steps=6, every=3, **after)
    assert (Path(directory) / "checkpoints" / "step-3" / "manifest.json").stat().st_ino == written, "it began anew"
    return lines


def _restored(path: str) -> Any:
    from nemo_diffgemma.training.nemo_model import DiffusionGemmaModel

    return DiffusionGemmaModel.restore_from(path)


def save_archive(directory: str, path: str, layout: dict[str, int]) -> None:
    """Train a little and write the last checkpoint as a `.nemo`."""
    from nemo_diffgemma.training.nemo_model import DiffusionGemmaModel, ModelSettings

    run(directory, steps=2, layout=layout)
    settings = config(layout=layout, model__checkpoint=f"{directory}/checkpoints/step-2")
    model = DiffusionGemmaModel(ModelSettings.of(settings))
    model.configure_model()
    model.save_to(path)


def weights_of_archive(path: str, layout: dict[str, int]) -> dict[str, Any]:
    """Whole tensors of a restored archive, on rank 0."""
    from nemo_diffgemma.parallel import ParallelLayout, initialize

    initialize(ParallelLayout(**layout))
    return whole(_restored(path).network)


def weights_of(path: str, layout: dict[str, int]) -> dict[str, Any]:
    """Whole tensors of any checkpoint, on rank 0."""
    from nemo_diffgemma import DiffusionGemma
    from nemo_diffgemma.parallel import ParallelLayout, initialize

    initialize(ParallelLayout(**layout))
    return whole(DiffusionGemma.from_checkpoint(path))


def whole(network: Any) -> dict[str, Any]:
    from nemo_diffgemma.checkpoint.huggingface import full_tensors
    from nemo_diffgemma.checkpoint.names import text_tensors

    names = [name for name, _ in text_tensors(network)]
    return {name: tensor.numpy() for name, tensor in full_tensors(network, names)}


def message(directory: str, **settings: Any) -> str:
    """What a run that cannot start says on this rank."""
    try:
        run(directory, **settings)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def validation_losses(micro_batch_size: int) -> list[float]:
    """Of each batch of six held-out examples, with weights of a seed."""
    from nemo_diffgemma.parallel import ParallelLayout, initialize
    from nemo_diffgemma.training.nemo_model import DiffusionGemmaModel, ModelSettings

    initialize(ParallelLayout())
    settings = config(data__micro_batch_size=micro_batch_size, trainer__validation_examples=6)
    model = DiffusionGemmaModel(ModelSettings.of(settings))
    model.configure_model()
    model.log = lambda *_, **__: None  # there is no trainer
    return [float(model.validation_step(batch, i)["val_loss"]) for i, batch in enumerate(model.val_dataloader())]


def message_while_another_works(directory: str) -> str:
    """What a run says on this rank while somebody else holds the lock of its directory."""
    import contextlib

    from nemo_diffgemma.parallel.agreement import is_rank_zero
    from nemo_diffgemma.training.run_directory import lock_of

    with contextlib.ExitStack() as stack:
        if is_rank_zero():
            other = lock_of(Path(directory))
            other.acquire()
            stack.callback(other.release)
        return message(directory, steps=1)


def message_when_rank_0_cannot_write(directory: str, error: Exception) -> str:
    """What a run says on this rank when writing its assets fails on rank 0 with `error`."""
    from unittest import mock

    from nemo_diffgemma.checkpoint import sharded

    with mock.patch.object(sharded, "write_assets", side_effect=error):
        return message(directory, steps=1)


def messages_of_what_is_not_finite(directory: str, layout: dict[str, int]) -> list[str]:
    """What runs say on this rank when on rank 1 a weight, an output, a gradient is not finite."""
    from unittest import mock

    import torch
    import torch.distributed as dist

    from nemo_diffgemma.training.nemo_model import DiffusionGemmaModel

    configure = DiffusionGemmaModel.configure_model

    def weight(network: Any) -> None:
        network.layers[1].mlp.down_proj.weight.data.view(-1)[3] = torch.nan

    def output(network: Any) -> None:
        network.layers[0].mlp.register_forward_hook(lambda module, inputs, result: result * torch.inf)

    def gradient(network: Any) -> None:
        network.layers[0].mlp.down_proj.weight.register_hook(lambda values: values * torch.inf)

    told = []
    for number, poison in enumerate((weight, output, gradient)):

        def poisoned(self: Any, poison: Any = poison) -> None:
            configure(self)
            if dist.get_rank() == 1:
                poison(self.network)

        with mock.patch.object(DiffusionGemmaModel, "configure_model", poisoned):
            told.append(message(f"{directory}/{number}", steps=1, layout=layout))
    return told


def messages_of_a_writer_that_fails(directory: str, rank: int, step: int) -> str:
    """What a run says on this rank whose disk is full on one rank when the files of `step` are written.

    The step after the next one begins when that has happened.
    """
    import errno
    from unittest import mock

    import torch.distributed as dist

    from nemo_diffgemma.checkpoint import sharded_writer
    from nemo_diffgemma.training import callbacks

    write, written = sharded_writer._Plan.write, callbacks.MetricsFile.on_train_batch_end

    def late(self: Any, trainer: Any, *rest: Any) -> None:
        if trainer.global_step == step + 1:
            trainer.strategy.saver._thread.join()
        written(self, trainer, *rest)

    def full(self: Any) -> Any:
        if dist.get_rank() == rank and f"step-{step}." in str(self.writer.path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self)

    with (
        mock.patch.object(sharded_writer._Plan, "write", full),
        mock.patch.object(callbacks.MetricsFile, "on_train_batch_end", late),
    ):
        return message(directory, steps=10, every=3)


def kept_beside(directory: str, frozen: str, **settings: Any) -> dict[str, Any]:
    """Train while sums of weights are kept beside them and parameters with `frozen` in their name stay as they are.

    Whole sums at the end, on rank 0, losses, and the names of the tensors of the last checkpoint.
    """
    from unittest import mock

    from nemo_diffgemma.checkpoint import sharded
    from nemo_diffgemma.training.nemo_model import DiffusionGemmaModel

    tensors, step = DiffusionGemmaModel.saved_tensors, DiffusionGemmaModel.training_step
    optimizers, seen = DiffusionGemmaModel.configure_optimizers, []

    def configure_optimizers(self: Any) -> Any:
        for name, parameter in self.network.named_parameters():
            parameter.requires_grad_(frozen not in name)
        self.__dict__["sums"] = {n: p.detach() * 0 for n, p in self.network.named_parameters()}
        return optimizers(self)

    def saved_tensors(self: Any) -> dict[str, Any]:
        like, sums = dict(self.network.named_parameters()), self.__dict__["sums"]
        return tensors(self) | {
            f"sum.{name}": sharded.sharded_tensor(f"sum.{name}", sums[name], like[name]) for name in sums
        }

    def training_step(self: Any, *arguments: Any) -> None:
        step(self, *arguments)
        self.finish_gather()
        for name, parameter in self.network.named_parameters():
            self.__dict__["sums"][name].add_(parameter.detach())
        seen[:] = [self]

    with (
        mock.patch.object(DiffusionGemmaModel, "configure_optimizers", configure_optimizers),
        mock.patch.object(DiffusionGemmaModel, "saved_tensors", saved_tensors),
        mock.patch.object(DiffusionGemmaModel, "training_step", training_step),
    ):
        lines = run(directory, **settings)
    last = Path(directory) / "checkpoints" / f"step-{len(lines)}"
    (model,) = seen
    for name, parameter in model.network.named_parameters():
        parameter.data.copy_(model.__dict__["sums"][name])
    return {"sums": whole(model.network), "keys": sorted(sharded.keys(last)), "losses": [one["loss"] for one in lines]}
