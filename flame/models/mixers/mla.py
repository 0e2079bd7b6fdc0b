"""Multi-head latent attention: keys and values come from a low-rank latent, positions from a shared rotary key.

DeepSeek-AI, 2024 (DeepSeek-V2), section 2.1. The decode cache holds the latent and the rotary key, not per-head keys and
values.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flame.kernels.rotary import rotary
from flame.kernels.softmax_attention import softmax_attention
from flame.models.config import ModelConfig
from flame.models.context import Context
from flame.models.mixers.base import Mixer, cached, merge_heads, remember, split_heads
from flame.models.mixers.transformer import visible_keys
from flame.models.modules import Linear, RMSNorm
from flame.models.registry import System, register
from flame.models.sharding import Plan, columns, rows, whole_per_rank

LATENT_NORM_EPS = 1e-5


@dataclass(kw_only=True)
class MLAConfig(ModelConfig):
    """q_lora_rank None projects queries directly. qk_head_dim is the sum of its two parts; rope_scaling changes nothing."""

    model_type: ClassVar[str] = "mla"

    num_heads: int = 16
    q_lora_rank: int | None = 64
    qk_rope_head_dim: int = 64
    kv_lora_rank: int = 512
    v_head_dim: int = 128
    qk_nope_head_dim: int = 128
    qk_head_dim: int | None = 192
    window_size: int | None = None
    rope_theta: float = 10000.0
    rope_scaling: dict | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        total = self.qk_nope_head_dim + self.qk_rope_head_dim
        self.require(
            self.qk_head_dim in (None, total), "qk_head_dim", f"is not qk_nope_head_dim + qk_rope_head_dim = {total}"
        )
        self.require(self.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim", "must be even, rotary turns pairs")
        self.require(self.window_size is None or self.window_size > 0, "window_size", "must be positive")
        self.require(self.attn is None, "attn", "does not combine with latent attention; use layer_types")


class MultiheadLatentAttention(Mixer):
    """softmax(q k^T / sqrt(dn + dr)) v with q = [q_nope, rope(q_rope)] and k = [k_nope(latent), rope(k_rope)]."""

    config_class = MLAConfig
    context_parallel = True

    def __init__(self, config: MLAConfig | None = None, layer_idx: int = 0, **options: Any) -> None:
        super().__init__(config, layer_idx, **options)
        c, std = self.config, self.config.initializer_range
        self.score_dim = c.qk_nope_head_dim + c.qk_rope_head_dim
        query_dim = c.num_heads * self.score_dim
        if c.q_lora_rank is None:
            self.q_proj: nn.Module = Linear(c.hidden_size, query_dim, std=std)
        else:
            self.q_proj = low_rank(c.hidden_size, c.q_lora_rank, query_dim, std)
        self.k_rope = Linear(c.hidden_size, c.qk_rope_head_dim, std=std)
        self.kv_proj = low_rank(c.hidden_size, c.kv_lora_rank, c.num_heads * (c.qk_nope_head_dim + c.v_head_dim), std)
        self.o_proj = Linear(c.num_heads * c.v_head_dim, c.hidden_size, std=std)

    def mix(self, x: Tensor, ctx: Context) -> Tensor:
        c = self.config
        q_nope, q_rope = split_heads(self.q_proj(x), c.num_heads).split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        q = torch.cat([q_nope, rotary(q_rope, ctx.positions, c.rope_theta)], -1)
        latent = self.kv_proj[1](self.kv_proj[0](x))
        k_rope = rotary(self.k_rope(x)[:, :, None], ctx.positions, c.rope_theta)
        latent, k_rope = self.with_cached(latent, k_rope, ctx)
        k_nope, v = split_heads(self.kv_proj[2](latent), c.num_heads).split([c.qk_nope_head_dim, c.v_head_dim], -1)
        k = torch.cat([k_nope, k_rope.expand(-1, -1, c.num_heads, -1)], -1)
        o = softmax_attention(
            q,
            k,
            v,
            scale=self.score_dim**-0.5,
            window=c.window_size,
            cu_seqlens=ctx.cu_seqlens,
            shard=ctx.shard,
            max_seqlen=ctx.max_seqlen,
        )
        return self.o_proj(merge_heads(o))

    def with_cached(self, latent: Tensor, k_rope: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """The latents [B, S, r] and rotary keys [B, S, 1, dr] that queries may see, cached ones first."""
        past = cached(ctx, "latent"), cached(ctx, "k_rope")
        if past[0] is not None and past[1] is not None:
            latent, k_rope = torch.cat([past[0], latent], 1), torch.cat([past[1], k_rope], 1)
        drop = 0 if self.config.window_size is None else max(0, latent.shape[1] - self.config.window_size)
        remember(ctx, "latent", latent[:, drop:])
        remember(ctx, "k_rope", k_rope[:, drop:])
        return latent, k_rope

    def tensor_parallel_plan(self, ranks: int) -> Plan:
        c = self.config
        local = {"num_heads": whole_per_rank(c.num_heads, ranks, "num_heads")}
        heads = rows(self, c.num_heads, "q_proj.2" if c.q_lora_rank is not None else "q_proj", "kv_proj.2")
        return Plan({**heads, **columns(self, "o_proj")}, local)

    def flops(self, seq_len: int) -> float:
        """Scores over dn + dr channels and values over dv, for every visible key and head."""
        c = self.config
        return 2.0 * visible_keys(seq_len, c.window_size) * c.num_heads * (self.score_dim + c.v_head_dim)


def low_rank(inputs: int, rank: int, outputs: int, std: float) -> nn.Sequential:
    """Down-projection, norm of the latent, up-projection."""
    return nn.Sequential(Linear(inputs, rank, std=std), RMSNorm(rank, LATENT_NORM_EPS), Linear(rank, outputs, std=std))


register(System(MLAConfig, MultiheadLatentAttention))
