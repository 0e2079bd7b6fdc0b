"""Linear attention without decay, with a choice of feature maps (Katharopoulos et al., 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from flame.kernels.elementwise_scan import elementwise_scan
from flame.kernels.linear_attention import linear_attention
from flame.models.context import Context
from flame.models.feature_maps import feature_map
from flame.models.heads import GroupedHeads, ScaledWidths
from flame.models.mixers.base import Mixer, cached, merge_heads, remember, split_heads
from flame.models.modules import Linear, RMSNorm
from flame.models.registry import System, register
from flame.models.sharding import Plan, columns, rows, shared_per_rank, whole_per_rank


@dataclass(kw_only=True)
class LinearAttentionConfig(GroupedHeads, ScaledWidths):
    """`norm_feature_map` divides by the sum of the weights; `norm_q`, `norm_k` scale features to sum to one."""

    model_type: ClassVar[str] = "linear_attn"

    attn_mode: str = "fused_chunk"
    expand_k: float = 1.0
    expand_v: float = 1.0
    num_heads: int = 4
    num_kv_heads: int | None = None
    feature_map: str = "elementwise_product"
    tie_feature_map_qk: bool = False
    norm_q: bool = False
    norm_k: bool = False
    norm_feature_map: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        feature_map(self.feature_map, 1)


class LinearAttention(Mixer):
    """`S_t = S_{t-1} + phi(k_t) v_t^T`, `o_t = F^-1/2 S_t^T phi(q_t)` with F features after the map."""

    config_class = LinearAttentionConfig
    context_parallel = True

    def __init__(self, config: LinearAttentionConfig | None = None, layer_idx: int = 0, **options: Any) -> None:
        super().__init__(config, layer_idx, **options)
        c = self.config
        groups, std, head_dim = c.num_heads // c.kv_heads, c.initializer_range, c.key_dim // c.num_heads
        self.feature_map_q = feature_map(c.feature_map, head_dim, std)
        self.feature_map_k = self.feature_map_q if c.tie_feature_map_qk else feature_map(c.feature_map, head_dim, std)
        self.q_proj = Linear(c.hidden_size, c.key_dim, std=std)
        self.k_proj = Linear(c.hidden_size, c.key_dim // groups, std=std)
        self.v_proj = Linear(c.hidden_size, c.value_dim // groups, std=std)
        self.norm = RMSNorm(c.value_dim // c.num_heads, c.norm_eps, bool(c.elementwise_affine))
        self.o_proj = Linear(c.value_dim, c.hidden_size, std=std)

    def mix(self, x: Tensor, ctx: Context) -> Tensor:
        c = self.config
        q = self.feature_map_q(split_heads(self.q_proj(x), c.num_heads))
        k = self.feature_map_k(split_heads(self.k_proj(x), c.kv_heads))
        v = split_heads(self.v_proj(x), c.kv_heads)
        if c.norm_q:
            q = q / (q.sum(-1, keepdim=True) + 1e-4)
        if c.norm_k:
            k = k / (k.sum(-1, keepdim=True) + 1e-4)
        scale = q.shape[-1] ** -0.5
        o, state = linear_attention(
            q,
            k,
            v,
            scale=scale,
            initial_state=cached(ctx, "state"),
            output_final_state=ctx.cache is not None,
            cu_seqlens=ctx.cu_seqlens,
            shard=ctx.shard,
        )
        remember(ctx, "state", state)
        if c.norm_feature_map:
            o = (o / (scale * weight_sum(q, k, ctx) + 1e-10)).to(v.dtype)
        return self.o_proj(merge_heads(self.norm(o)))

    def tensor_parallel_plan(self, ranks: int) -> Plan:
        c = self.config
        local = {
            "num_heads": whole_per_rank(c.num_heads, ranks, "num_heads"),
            "kv_heads": shared_per_rank(c.kv_heads, ranks, "num_kv_heads"),
        }
        grouped = rows(self, c.kv_heads, "k_proj", "v_proj")
        return Plan({**rows(self, c.num_heads, "q_proj"), **grouped, **columns(self, "o_proj")}, local)

    def flops(self, seq_len: int) -> float:
        """Write and read of every head's state (4 operations an entry), and the maps' own matrices beyond one head."""
        c = self.config
        features = self.feature_map_q.feature_dim
        shared = sum(p.numel() for p in self.feature_map_q.parameters() if p.ndim == 2)
        maps = 2.0 * shared * (c.num_heads + c.kv_heads - 2)
        return 4.0 * features * c.value_dim + maps


def weight_sum(q: Tensor, k: Tensor, ctx: Context) -> Tensor:
    """`phi(q_t) . sum_{j <= t} phi(k_j)`, `[B, T, H, 1]` fp32, for q `[B, T, H, F]` and k `[B, T, HKV, F]`."""
    keys = k.float().flatten(2)
    total, state = elementwise_scan(
        keys,
        torch.zeros_like(keys),
        initial_state=cached(ctx, "key_sum"),
        output_final_state=ctx.cache is not None,
        cu_seqlens=ctx.cu_seqlens,
        shard=ctx.shard,
    )
    remember(ctx, "key_sum", state)
    total = total.unflatten(-1, k.shape[2:])[:, :, :, None]
    grouped = q.float().unflatten(2, (k.shape[2], -1))  # [B, T, HKV, H / HKV, F]
    return (grouped * total).sum(-1).flatten(2)[..., None]


register(System(LinearAttentionConfig, LinearAttention))
