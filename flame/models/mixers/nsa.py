"""NSA: native sparse attention, with compressed, selected and window branches (Yuan et al., 2025, arXiv 2502.11089)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from flame.kernels.block_attention.chunked import block_means
from flame.kernels.native_sparse_attention import SparsePattern, native_sparse_attention
from flame.kernels.rotary import rotary
from flame.models.context import Context
from flame.models.heads import GroupedHeads
from flame.models.mixers.base import Mixer, cached, merge_heads, remember, split_heads
from flame.models.mixers.transformer import visible_keys
from flame.models.modules import Linear
from flame.models.registry import System, register
from flame.models.sharding import Plan, columns, rows, whole_per_rank


@dataclass(kw_only=True)
class NSAConfig(GroupedHeads):
    """block_counts is the number of selected blocks, taken as it is: the reference rounds it up to a power of two.

    window_size 0 leaves the window branch out. num_kv_heads None means as many as num_heads.
    """

    model_type: ClassVar[str] = "nsa"

    num_heads: int = 64
    num_kv_heads: int | None = 4
    head_dim: int = 32
    qkv_bias: bool = False
    block_size: int = 64
    block_counts: int = 16
    window_size: int = 512
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.head_dim > 0 and self.head_dim % 2 == 0, "head_dim", "must be even, rotary turns pairs")
        self.require(self.block_size > 0, "block_size", "must be positive")
        self.require(self.block_counts > 0, "block_counts", "must be positive")
        self.require(self.window_size >= 0, "window_size", "must be positive, or 0 for no window branch")
        self.require(self.attn is None, "attn", "does not combine with sparse attention; use layer_types")


class NativeSparseAttention(Mixer):
    """Three attentions on the same rotary queries and keys, added under a sigmoid gate for each head and branch."""

    config_class = NSAConfig
    context_parallel = True

    def __init__(self, config: NSAConfig | None = None, layer_idx: int = 0, **options: Any) -> None:
        super().__init__(config, layer_idx, **options)
        c, std = self.config, self.config.initializer_range
        q_dim, kv_dim = c.num_heads * c.head_dim, c.kv_heads * c.head_dim
        self.pattern = SparsePattern(c.block_size, c.block_counts, c.window_size)
        self.q_proj = Linear(c.hidden_size, q_dim, bias=c.qkv_bias, std=std)
        self.k_proj = Linear(c.hidden_size, kv_dim, bias=c.qkv_bias, std=std)
        self.v_proj = Linear(c.hidden_size, kv_dim, bias=c.qkv_bias, std=std)
        self.g_proj = Linear(c.hidden_size, 3 * c.num_heads, std=std)
        self.o_proj = Linear(q_dim, c.hidden_size, std=std)

    def mix(self, x: Tensor, ctx: Context) -> Tensor:
        c = self.config
        q = split_heads(self.q_proj(x), c.num_heads)
        k = split_heads(self.k_proj(x), c.kv_heads)
        v = split_heads(self.v_proj(x), c.kv_heads)
        q, k = rotary(q, ctx.positions, c.rope_theta), rotary(k, ctx.positions, c.rope_theta)
        gates = split_heads(torch.sigmoid(self.g_proj(x)), c.num_heads)  # [B, T, H, 3]
        means = None
        if ctx.cache is not None:
            k, v = with_past(ctx, "k", k), with_past(ctx, "v", v)
            if ctx.cu_seqlens is None:
                means = (
                    means_with_past(ctx, "k_means", k, c.block_size),
                    means_with_past(ctx, "v_means", v, c.block_size),
                )
        o = native_sparse_attention(
            q,
            k,
            v,
            gates,
            self.pattern,
            cu_seqlens=ctx.cu_seqlens,
            max_seqlen=ctx.max_seqlen,
            means=means,
            shard=ctx.shard,
        )
        return self.o_proj(merge_heads(o))

    def tensor_parallel_plan(self, ranks: int) -> Plan | None:
        """None where ranks would share a key head: the blocks are chosen by all of its query heads together."""
        c = self.config
        if c.kv_heads % ranks:
            return None
        local = {
            "num_heads": whole_per_rank(c.num_heads, ranks, "num_heads"),
            "kv_heads": whole_per_rank(c.kv_heads, ranks, "num_kv_heads"),
        }
        heads, grouped = rows(self, c.num_heads, "q_proj", "g_proj"), rows(self, c.kv_heads, "k_proj", "v_proj")
        return Plan({**heads, **grouped, **columns(self, "o_proj")}, local)

    def flops(self, seq_len: int) -> float:
        """4 operations for every key or block mean that a query sees, and channel, in each branch."""
        c = self.config
        compressed = seq_len / (2 * c.block_size)
        selected = visible_keys(seq_len, min(seq_len, c.block_counts * c.block_size))
        window = visible_keys(seq_len, c.window_size) if c.window_size else 0.0
        return 4.0 * (compressed + selected + window) * c.num_heads * c.head_dim


def with_past(ctx: Context, name: str, new: Tensor) -> Tensor:
    """[B, S + T, ...]: what the cache holds under `name`, then the new rows; both stay there."""
    past = cached(ctx, name)
    whole = new if past is None else torch.cat([past, new], 1)
    remember(ctx, name, whole)
    return whole


def means_with_past(ctx: Context, name: str, x: Tensor, size: int) -> Tensor:
    """Means of x [B, S, H, D] over its complete blocks; those in the cache are not computed again."""
    past = cached(ctx, name)
    done = 0 if past is None else past.shape[1]
    new = block_means(x[:, done * size :], size)
    means = new if past is None else torch.cat([past, new], 1)
    remember(ctx, name, means)
    return means


register(System(NSAConfig, NativeSparseAttention))
