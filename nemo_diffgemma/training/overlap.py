"""Communication of data parallelism behind computation: gradients while the backward runs, weights while the forward.

Megatron's DDP sums a bucket of gradients as soon as its last one is there. Its own hooks for the other way, gathering
the weights that the distributed optimizer has updated, wait where a module is called; ours wait once for all of a
layer, whatever the layer calls, and all gathers are under way when the update returns.
"""

from __future__ import annotations

import functools
from typing import Any

from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from torch import nn

from nemo_diffgemma.model.network import Network


def finalize_gradients(wrapped: DistributedDataParallel) -> None:
    """Sums over replicas are complete afterwards, also of weights that the last pass of the backward has not used."""
    for parameter, group in wrapped.param_to_bucket_group.items():
        if parameter not in group.per_param_grad_ready_counts:
            group.register_grad_ready(parameter)
    finalize_model_grads([wrapped])


def wait_for_weights_where_they_are_used(wrapped: DistributedDataParallel, network: Network) -> None:
    """Have every layer wait for its own weights only, and `network.finish_gather`, as its `state_dict`, for all."""
    if not wrapped.use_forward_hook:
        return
    network.finish_gather = functools.partial(_finish_all, wrapped)
    network.register_state_dict_pre_hook(lambda *_: network.finish_gather())
    wrapped.disable_forward_pre_hook(param_sync=False)
    for module in (network.embed_tokens, *network.layers, network.norm, network.self_conditioning):
        used = (wrapped.param_to_bucket_group.get(parameter) for parameter in module.parameters())
        groups = [group for group in dict.fromkeys(used) if group is not None]

        def wait(_: nn.Module, *unused: Any, groups: Any = groups) -> None:
            for group in groups:
                _finish(group)

        module.register_forward_pre_hook(wait)


def start_gather(wrapped: DistributedDataParallel) -> None:
    """Gather the updated weights, those that the forward pass needs first ahead of the others."""
    if wrapped.use_forward_hook:
        for groups in (wrapped.bucket_groups, wrapped.expert_parallel_bucket_groups):
            for group in reversed(groups):  # Megatron fills them from the last weight to the first
                group.start_param_sync()


def _finish_all(wrapped: DistributedDataParallel) -> None:
    for group in (*wrapped.bucket_groups, *wrapped.expert_parallel_bucket_groups):
        _finish(group)


def _finish(group: Any) -> None:
    if group.param_gather_handle is not None:
        group.finish_param_sync(skip_next_bucket_dispatch=True)
