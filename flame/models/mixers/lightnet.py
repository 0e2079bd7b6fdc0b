"""LightNet: linear attention whose state is a cumulative-softmax average of the values (Qin et al., 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from flame.kernels.linear_attention import linear_attention
from flame.kernels.log_gate import log_gate
from flame.models.config import ModelConfig
from flame.models.context import Context
from flame.models.mixers.base import Mixer, cached, merge_heads, remember, split_heads
from flame.models.modules import GatedRMSNorm, Linear, ShortConvolution
from flame.models.registry import System, register
from flame.models.sharding import Plan, columns, rows, whole_per_rank


@dataclass(kw_only=True)
class LightNetConfig(ModelConfig):
    """`expand_ratio` is the key size of a head; `num_heads` None means hidden_size / expand_ratio of them."""

    model_type: ClassVar[str] = "lightnet"

    attn_mode: str = "chunk"
    num_heads: int | None = None
    expand_ratio: int | None = 128
    use_short_conv: bool = False
    conv_size: int = 4
    gate_low_rank_dim: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.expand_ratio is not None or self.num_heads is not None
        self.require(given, "expand_ratio", "and num_heads are both None; give one")
        self.require(
            self.heads > 0 and self.hidden_size % self.heads == 0,
            "expand_ratio" if self.num_heads is None else "num_heads",
            f"does not cut hidden_size {self.hidden_size} into whole heads",
        )

    @property
    def heads(self) -> int:
        return self.num_heads if self.num_heads is not None else self.hidden_size // (self.expand_ratio or 1)

    @property
    def key_size(self) -> int:
        return self.expand_ratio if self.expand_ratio is not None else self.hidden_size // self.heads


class LightNetAttention(Mixer):
    """`S_t = diag(exp(z_{t-1} - z_t)) S_{t-1} + exp(k_t - z_t) v_t^T` with z the running log-sum-exp of the keys."""

    config_class = LightNetConfig
    context_parallel = True

    def __init__(self, config: LightNetConfig | None = None, layer_idx: int = 0, **options: Any) -> None:
        super().__init__(config, layer_idx, **options)
        c = self.config
        dim, key_dim, std = c.hidden_size, c.heads * c.key_size, c.initializer_range
        self.q_proj = Linear(dim, key_dim, std=std)
        self.k_proj = Linear(dim, key_dim, std=std)
        self.v_proj = Linear(dim, dim, std=std)
        if c.use_short_conv:
            self.q_conv1d = ShortConvolution(key_dim, c.conv_size, activation=None, std=std)
            self.k_conv1d = ShortConvolution(key_dim, c.conv_size, activation=None, std=std)
            self.v_conv1d = ShortConvolution(dim, c.conv_size, activation=None, std=std)
        self.g_proj = nn.Sequential(
            Linear(dim, c.gate_low_rank_dim, std=std), Linear(c.gate_low_rank_dim, dim, std=std)
        )
        self.g_norm = GatedRMSNorm(dim, 1e-6, bool(c.elementwise_affine))
        self.o_proj = Linear(dim, dim, std=std)

    def mix(self, x: Tensor, ctx: Context) -> Tensor:
        c = self.config
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if c.use_short_conv:
            q, k, v = self.q_conv1d(q, ctx, "conv_q"), self.k_conv1d(k, ctx, "conv_k"), self.v_conv1d(v, ctx, "conv_v")
        weight, log_decay, normalizer = log_gate(
            split_heads(k, c.heads),
            initial_state=cached(ctx, "normalizer"),
            output_final_state=ctx.cache is not None,
            cu_seqlens=ctx.cu_seqlens,
            shard=ctx.shard,
        )
        remember(ctx, "normalizer", normalizer)
        o, state = linear_attention(
            split_heads(F.silu(q), c.heads),
            weight,
            split_heads(v, c.heads),
            key_decay=log_decay,
            initial_state=cached(ctx, "state"),
            output_final_state=ctx.cache is not None,
            cu_seqlens=ctx.cu_seqlens,
            shard=ctx.shard,
        )
        remember(ctx, "state", state)
        return self.o_proj(self.g_norm(merge_heads(o), self.g_proj(x)))

    def tensor_parallel_plan(self, ranks: int) -> Plan:
        local = {"heads": whole_per_rank(self.config.heads, ranks, "the number of heads")}
        names = ("q_proj", "k_proj", "v_proj", "q_conv1d", "k_conv1d", "v_conv1d", "g_proj.1", "g_norm")
        return Plan({**rows(self, self.config.heads, *names), **columns(self, "o_proj")}, local, spanning=("g_norm",))

    def flops(self, seq_len: int) -> float:
        """Write and read of every head's state: 4 operations an entry."""
        return 4.0 * self.config.key_size * self.config.hidden_size


register(System(LightNetConfig, LightNetAttention))
