"""MoBA: mixture of block attention (Lu et al., 2025, arXiv 2502.13189), each head on its own choice of chunks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from flame.kernels.moba import moba
from flame.kernels.rotary import rotary
from flame.models.context import Context
from flame.models.heads import SplitWidth
from flame.models.mixers.base import Mixer, merge_heads, split_heads
from flame.models.mixers.nsa import means_with_past, with_past
from flame.models.mixers.transformer import visible_keys
from flame.models.modules import GatedRMSNorm, Linear, RMSNorm
from flame.models.registry import System, register
from flame.models.sharding import Plan, columns, rows, shared_per_rank, whole_per_rank

QK_NORM_EPS, OUTPUT_NORM_EPS = 1e-5, 1e-6


@dataclass(kw_only=True)
class MoBAConfig(SplitWidth):
    """moba_topk counts the query's own chunk; 1 or less is full attention, as in the reference.

    window_size and use_flash_moba are accepted and change nothing: a chunk chosen may lie anywhere in the past.
    """

    model_type: ClassVar[str] = "moba"

    num_heads: int = 32
    num_kv_heads: int | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    window_size: int | None = None
    rope_theta: float = 10000.0
    moba_chunk_size: int = 256
    moba_topk: int = 4
    use_output_gate: bool = False
    use_flash_moba: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            self.head_dim % 2 == 0, "num_heads", f"gives heads of odd size {self.head_dim}, which rotary cannot pair"
        )
        self.require(self.moba_chunk_size > 0, "moba_chunk_size", "must be positive")
        self.require(self.attn is None, "attn", "does not combine with sparse attention; use layer_types")


class MixtureOfBlockAttention(Mixer):
    """Softmax attention over each query's own chunk and its best earlier ones, then a norm of every head."""

    config_class = MoBAConfig
    context_parallel = True

    def __init__(self, config: MoBAConfig | None = None, layer_idx: int = 0, **options: Any) -> None:
        super().__init__(config, layer_idx, **options)
        c, std = self.config, self.config.initializer_range
        kv_dim = c.kv_heads * c.head_dim
        self.q_proj = Linear(c.hidden_size, c.hidden_size, bias=c.qkv_bias, std=std)
        self.k_proj = Linear(c.hidden_size, kv_dim, bias=c.qkv_bias, std=std)
        self.v_proj = Linear(c.hidden_size, kv_dim, bias=c.qkv_bias, std=std)
        self.o_proj = Linear(c.hidden_size, c.hidden_size, std=std)
        if c.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(c.head_dim, QK_NORM_EPS), RMSNorm(c.head_dim, QK_NORM_EPS)
        if c.use_output_gate:
            self.g_proj = nn.Sequential(
                Linear(c.hidden_size, c.head_dim, std=std), Linear(c.head_dim, c.hidden_size, std=std)
            )
            self.o_norm: RMSNorm = GatedRMSNorm(c.head_dim, OUTPUT_NORM_EPS, activation="sigmoid")
        else:
            self.o_norm = RMSNorm(c.head_dim, OUTPUT_NORM_EPS)

    def mix(self, x: Tensor, ctx: Context) -> Tensor:
        c = self.config
        q = split_heads(self.q_proj(x), c.num_heads)
        k = split_heads(self.k_proj(x), c.kv_heads)
        v = split_heads(self.v_proj(x), c.kv_heads)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotary(q, ctx.positions, c.rope_theta), rotary(k, ctx.positions, c.rope_theta)
        means = None
        if ctx.cache is not None:
            k, v = with_past(ctx, "k", k), with_past(ctx, "v", v)
            means = means_with_past(ctx, "k_means", k, c.moba_chunk_size) if ctx.cu_seqlens is None else None
        o = moba(
            q,
            k,
            v,
            chunk_size=c.moba_chunk_size,
            topk=c.moba_topk,
            cu_seqlens=ctx.cu_seqlens,
            max_seqlen=ctx.max_seqlen,
            means=means,
            shard=ctx.shard,
        )
        if c.use_output_gate:
            return self.o_proj(merge_heads(self.o_norm(o, split_heads(self.g_proj(x), c.num_heads))))
        return self.o_proj(merge_heads(self.o_norm(o)))

    def tensor_parallel_plan(self, ranks: int) -> Plan:
        c = self.config
        local = {
            "num_heads": whole_per_rank(c.num_heads, ranks, "num_heads"),
            "kv_heads": shared_per_rank(c.kv_heads, ranks, "num_kv_heads"),
        }
        grouped = rows(self, c.kv_heads, "k_proj", "v_proj")
        return Plan({**rows(self, c.num_heads, "q_proj", "g_proj.1"), **grouped, **columns(self, "o_proj")}, local)

    def flops(self, seq_len: int) -> float:
        """4 operations for every visible key and channel."""
        c = self.config
        seen = seq_len if c.moba_topk <= 1 else min(seq_len, c.moba_topk * c.moba_chunk_size)
        return 4.0 * visible_keys(seq_len, seen) * c.hidden_size


register(System(MoBAConfig, MixtureOfBlockAttention))
