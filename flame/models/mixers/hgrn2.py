"""HGRN2: HGRN's bounded forget gates with an outer-product state (Qin et al., 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from flame.kernels.linear_attention import linear_attention
from flame.models.config import ModelConfig
from flame.models.context import Context
from flame.models.mixers.base import Mixer, cached, merge_heads, remember, split_heads
from flame.models.mixers.hgrn import LowerBoundBackbone, log_forget_gate
from flame.models.modules import Linear, RMSNorm, ShortConvolution
from flame.models.registry import System, register
from flame.models.sharding import Plan, columns, rows, whole_per_rank


@dataclass(kw_only=True)
class HGRN2Config(ModelConfig):
    """`expand_ratio` is the key size of a head. Given, it decides the number of heads; else `num_heads` decides it."""

    model_type: ClassVar[str] = "hgrn2"

    attn_mode: str = "chunk"
    num_heads: int | None = None
    expand_ratio: int | None = 128
    use_short_conv: bool = False
    conv_size: int = 4
    use_lower_bound: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.expand_ratio is not None or self.num_heads is not None
        self.require(given, "expand_ratio", "and num_heads are both None; give one")
        self.require(
            self.heads > 0 and self.hidden_size % self.heads == 0,
            "expand_ratio" if self.expand_ratio is not None else "num_heads",
            f"does not cut hidden_size {self.hidden_size} into whole heads",
        )
        self.require(
            not self.use_lower_bound or self.forget_dim == self.hidden_size,
            "expand_ratio",
            f"must divide hidden_size {self.hidden_size} when use_lower_bound is on",
        )

    @property
    def key_size(self) -> int:
        return self.expand_ratio if self.expand_ratio is not None else self.hidden_size // (self.num_heads or 1)

    @property
    def heads(self) -> int:
        return self.hidden_size // self.key_size

    @property
    def forget_dim(self) -> int:
        return self.heads * self.key_size


class HGRN2(Mixer):
    """`S_t = diag(f_t) S_{t-1} + (1 - f_t) i_t^T`, `o_t = K^-1/2 S_t^T silu(q_t)`."""

    config_class = HGRN2Config
    context_parallel = True

    def __init__(self, config: HGRN2Config | None = None, layer_idx: int = 0, **options: Any) -> None:
        super().__init__(config, layer_idx, **options)
        c = self.config
        dim, std = c.forget_dim, c.initializer_range
        self.q_proj = Linear(c.hidden_size, dim, std=std)
        self.f_proj = Linear(c.hidden_size, dim, std=std)
        self.i_proj = Linear(c.hidden_size, c.hidden_size, std=std)
        if c.use_short_conv:
            self.q_conv1d = ShortConvolution(dim, c.conv_size, activation=None, std=std)
            self.f_conv1d = ShortConvolution(dim, c.conv_size, activation=None, std=std)
            self.i_conv1d = ShortConvolution(c.hidden_size, c.conv_size, activation=None, std=std)
        self.g_norm = RMSNorm(c.hidden_size, 1e-5, bool(c.elementwise_affine))
        self.o_proj = Linear(c.hidden_size, c.hidden_size, std=std)

    def mix(self, x: Tensor, ctx: Context) -> Tensor:
        c = self.config
        q, f, i = self.q_proj(x), self.f_proj(x), self.i_proj(x)
        if c.use_short_conv:
            q, f, i = self.q_conv1d(q, ctx, "conv_q"), self.f_conv1d(f, ctx, "conv_f"), self.i_conv1d(i, ctx, "conv_i")
        log_decay = log_forget_gate(self, f, ctx)
        o, state = linear_attention(
            split_heads(F.silu(q), c.heads),
            split_heads((-torch.expm1(log_decay)).to(x.dtype), c.heads),
            split_heads(i, c.heads),
            key_decay=split_heads(log_decay, c.heads),
            initial_state=cached(ctx, "state"),
            output_final_state=ctx.cache is not None,
            cu_seqlens=ctx.cu_seqlens,
            shard=ctx.shard,
        )
        remember(ctx, "state", state)
        return self.o_proj(self.g_norm(merge_heads(o)))

    def tensor_parallel_plan(self, ranks: int) -> Plan:
        local = {"heads": whole_per_rank(self.config.heads, ranks, "the number of heads")}
        names = ("q_proj", "f_proj", "i_proj", "q_conv1d", "f_conv1d", "i_conv1d", "g_norm")
        return Plan({**rows(self, self.config.heads, *names), **columns(self, "o_proj")}, local, spanning=("g_norm",))

    def flops(self, seq_len: int) -> float:
        """Write and read of every head's state: 4 operations an entry."""
        return 4.0 * self.config.key_size * self.config.hidden_size


register(System(HGRN2Config, HGRN2, backbone=LowerBoundBackbone))
