"""PaTH attention: positions are products of data-dependent Householder reflections between query and key.

Yang et al., 2025 (arXiv 2505.16381).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flame.kernels.normalization import l2_norm
from flame.kernels.path_attention import path_attention, transport_keys
from flame.models.context import Context
from flame.models.heads import SplitWidth
from flame.models.mixers.base import Mixer, cached, merge_heads, remember, split_heads
from flame.models.mixers.transformer import visible_keys
from flame.models.modules import Linear, ShortConvolution
from flame.models.registry import System, register
from flame.models.sharding import Plan, columns, rows, shared_per_rank, whole_per_rank

LOW_RANK = 32
CONV_SIZE = 3


@dataclass(kw_only=True)
class PathAttentionConfig(SplitWidth):
    """The reflections' directions w come through a rank-32 projection and a convolution over 3 tokens unless turned off."""

    model_type: ClassVar[str] = "path_attn"

    num_heads: int = 32
    num_kv_heads: int | None = None
    use_forget_gate: bool = False
    use_w_shortconv: bool = True
    use_low_rank_w: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.attn is None, "attn", "does not combine with PaTH; use layer_types")


class PathAttention(Mixer):
    """softmax((k_j^T H_{j+1} ... H_i q_i + F_i - F_j) / sqrt(d)) v, H_t = I - beta_t w_t w_t^T, no other positions.

    The cache holds keys moved to the newest position, in fp32: each step moves them all, and rounding would add up.
    """

    config_class = PathAttentionConfig
    context_parallel = True

    def __init__(self, config: PathAttentionConfig | None = None, layer_idx: int = 0, **options: Any) -> None:
        super().__init__(config, layer_idx, **options)
        c, std = self.config, self.config.initializer_range
        kv_dim = c.kv_heads * c.head_dim
        self.q_proj = Linear(c.hidden_size, c.hidden_size, std=std)
        self.k_proj = Linear(c.hidden_size, kv_dim, std=std)
        self.v_proj = Linear(c.hidden_size, kv_dim, std=std)
        if c.use_low_rank_w:
            down, up = Linear(c.hidden_size, LOW_RANK, std=std), Linear(LOW_RANK, kv_dim, std=std)
            self.w_proj: nn.Module = nn.Sequential(down, up)
        else:
            self.w_proj = Linear(c.hidden_size, kv_dim, std=std)
        if c.use_w_shortconv:
            self.w_conv1d = ShortConvolution(kv_dim, CONV_SIZE)
        self.bt_proj = Linear(c.hidden_size, c.kv_heads, bias=True, std=std)
        if c.use_forget_gate:
            self.g_proj = Linear(c.hidden_size, c.num_heads, bias=True, std=std)
        self.o_proj = Linear(c.hidden_size, c.hidden_size, std=std)

    def mix(self, x: Tensor, ctx: Context) -> Tensor:
        c = self.config
        q = split_heads(self.q_proj(x), c.num_heads)
        k = split_heads(self.k_proj(x), c.kv_heads)
        v = split_heads(self.v_proj(x), c.kv_heads)
        w, beta = self.reflections(x, ctx)
        forget = F.logsigmoid(self.g_proj(x).float()) if c.use_forget_gate else None
        k, v, forget = self.with_cached(k, v, forget, ctx)
        if ctx.cache is not None:
            remember(ctx, "k", transport_keys(k, w, beta))
        o = path_attention(q, k, v, w, beta, log_forget=forget, cu_seqlens=ctx.cu_seqlens, shard=ctx.shard)
        return self.o_proj(merge_heads(o))

    def reflections(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """Unit directions w [B, T, Hk, d] and strengths beta in (0, 2) [B, T, Hk], fp32."""
        w = self.w_proj(x)
        if self.config.use_w_shortconv:
            w = self.w_conv1d(w, ctx, "w")
        beta = 2 * torch.sigmoid(self.bt_proj(x).float())
        return l2_norm(split_heads(w, self.config.kv_heads).float()), beta

    def with_cached(
        self, k: Tensor, v: Tensor, forget: Tensor | None, ctx: Context
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Cached keys, values and gates before the new ones. Remembers the last two; keys have yet to be moved on."""
        past_k, past_v, past_forget = cached(ctx, "k"), cached(ctx, "v"), cached(ctx, "forget")
        if past_k is not None and past_v is not None:
            k, v = torch.cat([past_k, k.to(past_k.dtype)], 1), torch.cat([past_v, v], 1)
        if past_forget is not None and forget is not None:
            forget = torch.cat([past_forget, forget], 1)
        remember(ctx, "v", v)
        remember(ctx, "forget", forget)
        return k, v, forget

    def tensor_parallel_plan(self, ranks: int) -> Plan:
        c = self.config
        local = {
            "num_heads": whole_per_rank(c.num_heads, ranks, "num_heads"),
            "kv_heads": shared_per_rank(c.kv_heads, ranks, "num_kv_heads"),
        }
        directions = "w_proj.1" if c.use_low_rank_w else "w_proj"
        grouped = rows(self, c.kv_heads, "k_proj", "v_proj", directions, "w_conv1d", "bt_proj")
        return Plan({**rows(self, c.num_heads, "q_proj", "g_proj"), **grouped, **columns(self, "o_proj")}, local)

    def flops(self, seq_len: int) -> float:
        """Scores and weighted values, and moving queries across the blocks of keys, which costs as much again."""
        return 8.0 * visible_keys(seq_len, None) * self.config.hidden_size


register(System(PathAttentionConfig, PathAttention))
