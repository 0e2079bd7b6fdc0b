"""FoX, the forgetting transformer: softmax attention with a forget gate for every head instead of positions.

Lin et al., 2025 (arXiv 2503.02130).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from flame.kernels.forgetting_attention import forgetting_attention
from flame.models.context import Context
from flame.models.heads import SplitWidth
from flame.models.mixers.base import Mixer, cached, merge_heads, remember, split_heads
from flame.models.mixers.transformer import visible_keys
from flame.models.modules import Linear, RMSNorm
from flame.models.registry import System, register
from flame.models.sharding import Plan, columns, rows, shared_per_rank, whole_per_rank

QK_NORM_EPS = 1e-5


@dataclass(kw_only=True)
class ForgettingTransformerConfig(SplitWidth):
    """window_size changes nothing: the gates decide how far back a head looks."""

    model_type: ClassVar[str] = "forgetting_transformer"

    num_heads: int = 32
    num_kv_heads: int | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    window_size: int | None = None
    use_output_gate: bool = False


class HeadRMSNorm(RMSNorm):
    """RMS norm of each head with a weight for every channel of all heads, [H * D]."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, T, H, D]."""
        assert self.weight is not None
        normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return (normed * self.weight.unflatten(0, x.shape[-2:]).float()).to(x.dtype)


class ForgettingAttention(Mixer):
    """softmax(q k^T / sqrt(d) + F_i - F_j) v with F the running sum of logsigmoid(f(x)); no positions."""

    config_class = ForgettingTransformerConfig
    context_parallel = True

    def __init__(self, config: ForgettingTransformerConfig | None = None, layer_idx: int = 0, **options: Any) -> None:
        super().__init__(config, layer_idx, **options)
        c, std = self.config, self.config.initializer_range
        kv_dim = c.kv_heads * c.head_dim
        self.q_proj = Linear(c.hidden_size, c.hidden_size, bias=c.qkv_bias, std=std)
        self.k_proj = Linear(c.hidden_size, kv_dim, bias=c.qkv_bias, std=std)
        self.v_proj = Linear(c.hidden_size, kv_dim, bias=c.qkv_bias, std=std)
        self.f_proj = Linear(c.hidden_size, c.num_heads, bias=True, std=std)
        if c.use_output_gate:
            self.g_proj = Linear(c.hidden_size, c.hidden_size, std=std)
        self.o_proj = Linear(c.hidden_size, c.hidden_size, std=std)
        if c.qk_norm:
            self.q_norm = HeadRMSNorm(c.hidden_size, QK_NORM_EPS)
            self.k_norm = HeadRMSNorm(kv_dim, QK_NORM_EPS)

    def mix(self, x: Tensor, ctx: Context) -> Tensor:
        c = self.config
        q = split_heads(self.q_proj(x), c.num_heads)
        k = split_heads(self.k_proj(x), c.kv_heads)
        v = split_heads(self.v_proj(x), c.kv_heads)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        log_forget = F.logsigmoid(self.f_proj(x).float())
        k, v, log_forget = (
            self.with_cached(name, new, ctx) for name, new in (("k", k), ("v", v), ("forget", log_forget))
        )
        o = merge_heads(forgetting_attention(q, k, v, log_forget, cu_seqlens=ctx.cu_seqlens, shard=ctx.shard))
        if c.use_output_gate:
            o = o * torch.sigmoid(self.g_proj(x).float()).to(o.dtype)
        return self.o_proj(o)

    def with_cached(self, name: str, new: Tensor, ctx: Context) -> Tensor:
        """[B, S + T, ...]: what the cache holds under `name`, then the new rows."""
        past = cached(ctx, name)
        whole = new if past is None else torch.cat([past, new], 1)
        remember(ctx, name, whole)
        return whole

    def tensor_parallel_plan(self, ranks: int) -> Plan:
        c = self.config
        local = {
            "num_heads": whole_per_rank(c.num_heads, ranks, "num_heads"),
            "kv_heads": shared_per_rank(c.kv_heads, ranks, "num_kv_heads"),
        }
        heads = rows(self, c.num_heads, "q_proj", "f_proj", "g_proj", "q_norm")
        grouped = rows(self, c.kv_heads, "k_proj", "v_proj", "k_norm")
        return Plan({**heads, **grouped, **columns(self, "o_proj")}, local)

    def flops(self, seq_len: int) -> float:
        """Scores and weighted values: 4 operations for every visible key and channel."""
        return 4.0 * visible_keys(seq_len, None) * self.config.hidden_size


register(System(ForgettingTransformerConfig, ForgettingAttention))
