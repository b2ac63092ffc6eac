"""A world of ranks of which only one is there: torch's fake process groups, whose collectives do nothing."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_map

from nemo_diffgemma import parallel
from nemo_diffgemma.dry_run import flex, products, shadows, streams
from nemo_diffgemma.dry_run.ledger import Ledger, place
from nemo_diffgemma.dry_run.mode import DryRun
from nemo_diffgemma.parallel.layout import ParallelLayout


@contextmanager
def one_rank(dry: DryRun, layout: ParallelLayout, world: int, rank: int) -> Iterator[None]:
    """Inside the block this process is `rank` of `world` in process groups of `layout`, on the GPU of the driver."""
    import torch.nn.attention.flex_attention as flex_module

    with ExitStack() as stack:
        # torch.tensor(..., device="cuda") makes a CPU tensor, and its move is an operation like others
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        replace = functools.partial(_replace, stack)
        replace(torch, "tensor", functools.partial(_tensor, torch.tensor))
        replace(torch.Tensor, "isfinite", _finite)
        replace(torch, "isfinite", _finite)
        # AdamW as for CUDA tensors
        types = [torch.Tensor, torch.nn.Parameter, FakeTensor]
        replace(import_module("torch.optim.optimizer"), "_foreach_supported_types", types)
        replace(torch.utils._foreach_utils, "_foreach_supported_types", types)
        replace(flex_module, "flex_attention", flex.flex_attention)
        sdpa = functools.partial(_attention, dry.ledger, functional.scaled_dot_product_attention)
        replace(functional, "scaled_dot_product_attention", sdpa)
        new_group = functools.partial(_fake_group, dist.new_group)
        replace(dist, "new_group", new_group)
        replace(dist.distributed_c10d, "new_group", new_group)
        stack.enter_context(streams.followed(dry.ledger))
        dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
        stack.callback(parallel.shutdown)
        with dry:
            parallel.initialize(layout)
            yield


def _replace(stack: ExitStack, owner: Any, name: str, stand_in: Any) -> None:
    stack.enter_context(mock.patch.object(owner, name, stand_in))


def _tensor(make: Any, data: Any, **options: Any) -> torch.Tensor:
    """`torch.tensor`: of a list of GPU scalars it reads them one by one."""
    return make(tree_map(lambda x: x.item() if isinstance(x, FakeTensor) else x, data), **options)


def _finite(x: torch.Tensor) -> torch.Tensor:
    """`torch.isfinite`: what has no values is taken for finite."""
    finite = (x == x) & (x.abs() != float("inf")) if x.is_floating_point() else torch.ones_like(x, dtype=torch.bool)
    if isinstance(x, FakeTensor) and shadows.of(x) is None:
        shadows.give(finite, torch.ones(finite.shape, dtype=torch.bool))
    return finite


def _attention(ledger: Ledger, inner: Any, query: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
    """`scaled_dot_product_attention`: where torch runs none of its kernels, it has chosen the mathematical form."""
    before = ledger.attention_calls
    out = inner(query, *args, **options)
    if isinstance(out, FakeTensor) and ledger.attention_calls == before:
        products.attention(ledger, "math", query)
        ledger.violate(f"the math kernel in attention, queries {list(query.shape)} at {place()}")
    return out


def _fake_group(new_group: Any, *args: Any, **options: Any) -> Any:
    """`new_group` for Megatron, which asks for nccl and gloo groups."""
    return new_group(*args, **{**options, "backend": "fake", "pg_options": None})
