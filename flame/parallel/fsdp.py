"""FSDP2 and HSDP: parameters sharded over dp_shard, replicated over dp_replicate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from flame.errors import ConfigError, unknown_name

RESHARD_POLICIES = ("default", "always", "never")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def parse_dtype(name: str, key: str) -> torch.dtype:
    if name not in DTYPES:
        raise ConfigError(f"{key}: {unknown_name('dtype', name, DTYPES)}")
    return DTYPES[name]


@dataclass(frozen=True)
class ShardingOptions:
    """
    Attributes:
        param_dtype: dtype of gathered parameters, hence of the computation.
        reduce_dtype: dtype in which gradients are summed over ranks and micro-batches.
        reshard_after_forward: ``default`` frees gathered blocks after their forward but keeps the root, and keeps all where
            parameters are not sharded; ``always`` frees the root too; ``never`` keeps everything until the backward (ZeRO-2).
        cpu_offload: keep sharded parameters, gradients and optimizer state in host memory.
    """

    param_dtype: torch.dtype = torch.bfloat16
    reduce_dtype: torch.dtype = torch.float32
    reshard_after_forward: str = "default"
    cpu_offload: bool = False

    def __post_init__(self) -> None:
        if self.reshard_after_forward not in RESHARD_POLICIES:
            text = unknown_name("policy", self.reshard_after_forward, RESHARD_POLICIES)
            raise ConfigError(f"parallelism.fsdp_reshard_after_forward: {text}")


def apply_fsdp(model: nn.Module, blocks: Sequence[nn.Module], mesh: DeviceMesh, options: ShardingOptions) -> None:
    """Shard each block, then the root, in place.

    Embeddings, final norm and head stay together in the root unit: they may share weights, and the loss reads the head's
    weight without calling the head.

    Args:
        mesh: [dp_shard x cp], or [dp_replicate, dp_shard x cp] for HSDP; see `Mesh.fsdp`.
    """
    # Inputs are not cast: the residual stream already has the parameters' dtype, and what blocks pass on beside it
    # may have to stay in fp32.
    precision = MixedPrecisionPolicy(
        param_dtype=options.param_dtype, reduce_dtype=options.reduce_dtype, cast_forward_inputs=False
    )
    pin = torch.cuda.is_available()
    offload = CPUOffloadPolicy(pin_memory=pin) if options.cpu_offload else OffloadPolicy()
    policy, unsharded = options.reshard_after_forward, mesh.size(-1) == 1
    # Without sharding, gathering is only a cast, and doing it twice costs more time than the copy costs memory.
    keep_blocks = policy == "never" or (policy == "default" and unsharded)
    for block in blocks:
        fully_shard(
            block, mesh=mesh, mp_policy=precision, offload_policy=offload, reshard_after_forward=not keep_blocks
        )
    fully_shard(model, mesh=mesh, mp_policy=precision, offload_policy=offload, reshard_after_forward=policy == "always")
    for module in fsdp_modules(model):
        if mesh.size() == 1:
            module.set_custom_reduce_scatter(OneRank())
            continue
        # The loss is already divided by the token count of all ranks, so gradients are summed, never averaged. The
        # factor alone would ask for a scaled reduction, which gloo lacks.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    prefetch_neighbours(blocks)


class OneRank:
    """The reduction of gradients over one rank: what goes in is what comes out, in the same memory.

    torch would copy, and divide into yet another copy where a factor is set: 16 of the 22 bytes that it moves a parameter.
    """

    def __init__(self) -> None:
        self.pending: torch.Tensor | None = None

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Called for the input, and then for the output of the same reduction."""
        pending, self.pending = self.pending, None
        if pending is not None and pending.numel() == math.prod(size) and pending.dtype == dtype:
            return pending
        self.pending = torch.empty(*size, dtype=dtype, device=device)
        return self.pending

    def __call__(self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, *_: Any, **__: Any) -> None:
        if output_tensor is not input_tensor:
            output_tensor.copy_(input_tensor)


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Free all gathered parameters, so that the next forward gathers the shards as they then are."""
    for module in fsdp_modules(model):
        module.reshard()


def prefetch_neighbours(blocks: Sequence[nn.Module]) -> None:
    """Gather the next block while this one computes, in both directions."""
    for block, following in zip(blocks, blocks[1:]):
        block.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([block])


def set_accumulation(model: FSDPModule, last: bool, reduce_every: bool) -> None:
    """Prepare the backward of one micro-batch.

    Args:
        last: this is the last micro-batch of the step, after which gradients must be complete.
        reduce_every: reduce-scatter after every micro-batch, which needs memory for sharded gradients only; otherwise
            once a step, and unsharded gradients in the reduce dtype are kept in between. Replicas are reduced once a
            step in either case.
    """
    model.set_requires_all_reduce(last)
    if not reduce_every:
        model.set_requires_gradient_sync(last)
    model.set_is_last_backward(last)
