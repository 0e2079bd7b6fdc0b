"""Activation checkpointing by block: keep less in the forward, compute it again in the backward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from flame.errors import ConfigError
from flame.models.context import Context

KERNEL_NAMESPACE = "flame"  # every kernel of ours is registered there
# Kernels that cost about as much as reading their inputs: cheaper to run again than to keep.
CHEAP_KERNELS = frozenset({"norm", "rotary", "swiglu", "token_shift", "token_mix", "log_gate", "short_convolution"})


def is_expensive(op: Any) -> bool:
    """Operations whose results are worth their memory: matrix products, attention, state kernels, communication."""
    if not isinstance(op, torch._ops.OpOverload):
        return False
    if op.namespace == KERNEL_NAMESPACE:
        return op._opname not in CHEAP_KERNELS
    return op.namespace == "_c10d_functional" or (op.namespace == "aten" and op._opname in SAVED_ATEN_OPS)


SAVED_ATEN_OPS = frozenset(
    {
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "_scaled_mm",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    }
)


def selective_policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if is_expensive(op) else CheckpointPolicy.PREFER_RECOMPUTE


def apply_activation_checkpointing(blocks: Sequence[nn.Module], mode: str, selective_option: str) -> None:
    """Checkpoint decoder blocks in place; parameter names stay as they are.

    Args:
        mode: ``none``; ``full`` recomputes every block; ``selective`` follows `selective_option`.
        selective_option: ``op`` keeps the results of matrix products and kernels and recomputes the rest; a number n
            recomputes every n-th block in full.

    Raises:
        ConfigError: mode or option is none of these.
    """
    if mode == "none":
        return
    if mode not in ("full", "selective"):
        raise ConfigError(f"activation_checkpoint.mode = {mode!r}; it is one of none, full, selective.")
    by_op = mode == "selective" and selective_option == "op"
    every = 1 if mode == "full" or by_op else block_interval(selective_option)
    contexts = functools.partial(create_selective_checkpoint_contexts, selective_policy) if by_op else None
    for index, block in enumerate(blocks):
        if index % every == 0:
            recompute_in_backward(block, contexts)


def block_interval(option: str) -> int:
    if not option.isdecimal() or int(option) < 1:
        raise ConfigError(
            f"activation_checkpoint.selective_ac_option = {option!r}; it is 'op' or a positive number of blocks."
        )
    return int(option)


def recompute_in_backward(block: nn.Module, context_fn: Callable[[], Any] | None) -> None:
    """Run `block.forward` under torch's checkpoint.

    The forward of this one instance is replaced, rather than the module wrapped, because a wrapper would put its own
    name into every parameter name.
    """
    original = block.forward

    def inner(x: Tensor, ctx: Context) -> Any:
        # Blocks add to what they carry on. The second run must find what the first one found, not what it left.
        return original(x, ctx.at_layer(ctx.cache, ctx.carried))

    options: dict[str, Any] = {"use_reentrant": False}
    if context_fn is not None:
        options["context_fn"] = context_fn

    def forward(x: Tensor, ctx: Context) -> Any:
        return checkpoint(inner, x, ctx, **options)

    block.forward = forward
