"""The contract of a token mixer."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flame.models.config import ModelConfig
from flame.models.context import Context, make_context
from flame.schema import build


class Mixer(nn.Module):
    """Mixes tokens along the sequence: `forward(x [B, T, D], ctx) -> [B, T, D]`.

    A subclass
    - sets `config_class`, builds its modules in `__init__`, and implements `mix`;
    - with `ctx.cache` (a dict of its own naming) starts from the state found there and leaves the new state, so that a
      prefill followed by single tokens computes the same as one pass;
    - never lets documents meet when `ctx.cu_seqlens` is given;
    - initialises parameters that it holds itself (not those of its modules, unless they differ from their default) in
      `reset_parameters`, which must write every one of them;
    - counts its own arithmetic in `flops` and names undecayed parameters in `no_weight_decay`.

    Works alone in any torch model: ``GatedLinearAttention(hidden_size=512, num_heads=4)(x)``.
    """

    config_class: ClassVar[type[ModelConfig]]

    def __init__(self, config: ModelConfig | None = None, layer_idx: int = 0, **options: Any) -> None:
        super().__init__()
        self.config: Any = build(self.config_class, options, type(self).__name__) if config is None else config
        self.layer_idx = layer_idx

    def forward(self, x: Tensor, ctx: Context | None = None) -> Tensor:
        return self.mix(x, make_context(x.shape[1], x.device) if ctx is None else ctx)

    def mix(self, x: Tensor, ctx: Context) -> Tensor:
        raise NotImplementedError

    def flops(self, seq_len: int) -> float:
        """Forward floating-point operations a token, beyond the nn.Linear weights, at sequences of `seq_len` tokens."""
        raise NotImplementedError

    def no_weight_decay(self) -> set[str]:
        """Names, relative to the mixer, of matrices that weight decay must leave alone (vectors never decay)."""
        return set()


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, H * D] -> [B, T, H, D]."""
    return x.unflatten(-1, (heads, -1))


def merge_heads(x: Tensor) -> Tensor:
    """[B, T, H, D] -> [B, T, H * D]."""
    return x.flatten(-2)


def cached(ctx: Context, name: str) -> Tensor | None:
    """The tensor that this layer's cache holds under `name`, or None."""
    return None if ctx.cache is None else ctx.cache.get(name)


def remember(ctx: Context, name: str, value: Tensor | None) -> None:
    """Keep `value` in this layer's cache when there is one."""
    if ctx.cache is not None and value is not None:
        ctx.cache[name] = value.detach() if not torch.is_grad_enabled() else value
