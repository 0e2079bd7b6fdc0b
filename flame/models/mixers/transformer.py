"""Transformer++: causal softmax attention with rotary positions, grouped key/value heads and an optional window.

Vaswani et al. 2017 (attention), Su et al. 2021 (rotary), Ainslie et al. 2023 (grouped heads), Beltagy et al. 2020 (window).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flame.kernels.rotary import rotary
from flame.kernels.softmax_attention import softmax_attention
from flame.models.context import Context
from flame.models.heads import SplitWidth
from flame.models.mixers.base import Mixer, cached, merge_heads, remember, split_heads
from flame.models.modules import Linear, RMSNorm, project
from flame.models.registry import System, register
from flame.models.sharding import Plan, columns, rows, shared_per_rank, whole_per_rank


@dataclass(kw_only=True)
class TransformerConfig(SplitWidth):
    """num_kv_heads None means as many as num_heads; window_size w lets a query see the w newest keys, itself included.

    attention_sinks gives each head a learned logit that takes part in its softmax and carries no value, so that a head can
    attend to nothing (Xiao et al., arXiv 2309.17453; the logit as in gpt-oss, arXiv 2508.10925).
    """

    model_type: ClassVar[str] = "transformer"

    num_heads: int = 32
    num_kv_heads: int | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    window_size: int | None = None
    rope_theta: float = 10000.0
    attention_sinks: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            self.head_dim % 2 == 0, "num_heads", f"gives heads of odd size {self.head_dim}, which rotary cannot pair"
        )
        self.require(self.window_size is None or self.window_size > 0, "window_size", "must be positive")


class Attention(Mixer):
    """Multi-head softmax attention; also the attention layers of hybrids."""

    config_class = TransformerConfig
    context_parallel = True

    def __init__(self, config: TransformerConfig | None = None, layer_idx: int = 0, **options: Any) -> None:
        super().__init__(config, layer_idx, **options)
        c = self.config
        kv_dim, std = c.kv_heads * c.head_dim, c.initializer_range
        self.q_proj = Linear(c.hidden_size, c.hidden_size, bias=c.qkv_bias, std=std)
        self.k_proj = Linear(c.hidden_size, kv_dim, bias=c.qkv_bias, std=std)
        self.v_proj = Linear(c.hidden_size, kv_dim, bias=c.qkv_bias, std=std)
        self.o_proj = Linear(c.hidden_size, c.hidden_size, std=std)
        if c.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(c.head_dim, eps=1e-5), RMSNorm(c.head_dim, eps=1e-5)
        self.sinks = nn.Parameter(torch.empty(c.num_heads)) if c.attention_sinks else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.sinks is not None:
            nn.init.zeros_(self.sinks)

    def mix(self, x: Tensor, ctx: Context) -> Tensor:
        c = self.config
        q, k, v = project(x, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = split_heads(q, c.num_heads), split_heads(k, c.kv_heads), split_heads(v, c.kv_heads)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotary(q, ctx.positions, c.rope_theta), rotary(k, ctx.positions, c.rope_theta)
        k, v = self.with_cached(k, v, ctx)
        o = softmax_attention(
            q,
            k,
            v,
            scale=c.head_dim**-0.5,
            window=c.window_size,
            cu_seqlens=ctx.cu_seqlens,
            shard=ctx.shard,
            max_seqlen=ctx.max_seqlen,
            sink=self.sinks,
        )
        return self.o_proj(merge_heads(o))

    def with_cached(self, k: Tensor, v: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """Cached keys and values [B, S, H, D] before the new ones; a windowed layer keeps only what later queries see."""
        if ctx.cache is None:
            return k, v
        past_k, past_v = cached(ctx, "k"), cached(ctx, "v")
        if past_k is not None and past_v is not None:
            k, v = torch.cat([past_k, k], 1), torch.cat([past_v, v], 1)
        keep = k.shape[1] if self.config.window_size is None else min(self.config.window_size, k.shape[1])
        remember(ctx, "k", k[:, k.shape[1] - keep :])
        remember(ctx, "v", v[:, v.shape[1] - keep :])
        return k, v

    def tensor_parallel_plan(self, ranks: int) -> Plan:
        c = self.config
        local = {
            "num_heads": whole_per_rank(c.num_heads, ranks, "num_heads"),
            "kv_heads": shared_per_rank(c.kv_heads, ranks, "num_kv_heads"),
        }
        grouped = rows(self, c.kv_heads, "k_proj", "v_proj")
        return Plan({**rows(self, c.num_heads, "q_proj", "sinks"), **grouped, **columns(self, "o_proj")}, local)

    def flops(self, seq_len: int) -> float:
        """Scores and weighted values: 4 operations for every visible key and channel."""
        return 4.0 * visible_keys(seq_len, self.config.window_size) * self.config.hidden_size


def visible_keys(seq_len: int, window: int | None) -> float:
    """Keys that a causal query sees on average over a row of `seq_len` tokens, at most `window` of them."""
    window = seq_len if window is None else min(window, seq_len)
    return window - window * (window - 1) / (2 * seq_len)


register(System(TransformerConfig, Attention))
