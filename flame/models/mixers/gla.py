"""Gated linear attention: linear attention with a data-dependent decay for every key channel (Yang et al., 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from flame.kernels.linear_attention import linear_attention
from flame.models.context import Context
from flame.models.heads import GroupedHeads, ScaledWidths
from flame.models.mixers.base import Mixer, cached, merge_heads, remember, split_heads
from flame.models.modules import GatedRMSNorm, Linear, RMSNorm, ShortConvolution, project
from flame.models.registry import System, register
from flame.models.sharding import Plan, columns, rows, shared_per_rank, whole_per_rank

GATE_RANK = 16
GATE_NORMALIZER = 16.0

FEATURE_MAPS = {
    "relu": F.relu,
    "sigmoid": F.sigmoid,
    "logsigmoid": F.logsigmoid,
    "silu": F.silu,
    "swish": F.silu,
    "sqrelu": lambda x: F.relu(x).square(),
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
}


@dataclass(kw_only=True)
class GLAConfig(GroupedHeads, ScaledWidths):
    """expand_k and expand_v scale the key and value widths against hidden_size; use_gk and use_gv change nothing."""

    model_type: ClassVar[str] = "gla"

    expand_k: float = 0.5
    expand_v: float = 1.0
    num_heads: int = 4
    num_kv_heads: int | None = None
    feature_map: Literal["relu", "sigmoid", "logsigmoid", "silu", "swish", "sqrelu", "gelu"] | None = None
    attn_mode: Literal["chunk", "fused_recurrent", "fused_chunk"] = "chunk"
    use_short_conv: bool = False
    conv_size: int = 4
    use_output_gate: bool = True
    clamp_min: float | None = None
    use_gk: bool = True
    use_gv: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.hidden_act != "powlu", "hidden_act", "is no output gate; use 'swish'")


class GatedLinearAttention(Mixer):
    """S_t = diag(exp(a_t)) S_{t-1} + k_t v_t^T, o_t = S_t^T q_t / sqrt(K), with a_t = logsigmoid(W x_t) / 16."""

    config_class = GLAConfig
    context_parallel = True

    def __init__(self, config: GLAConfig | None = None, layer_idx: int = 0, **options: Any) -> None:
        super().__init__(config, layer_idx, **options)
        c = self.config
        groups, std = c.num_heads // c.kv_heads, c.initializer_range
        kv_key_dim, kv_value_dim = c.key_dim // groups, c.value_dim // groups
        self.q_proj = Linear(c.hidden_size, c.key_dim, std=std)
        self.k_proj = Linear(c.hidden_size, kv_key_dim, std=std)
        self.v_proj = Linear(c.hidden_size, kv_value_dim, std=std)
        self.gk_proj = nn.Sequential(
            Linear(c.hidden_size, GATE_RANK, std=std), Linear(GATE_RANK, kv_key_dim, bias=True, std=std)
        )
        self.o_proj = Linear(c.value_dim, c.hidden_size, std=std)
        if c.use_short_conv:
            self.q_conv1d = ShortConvolution(c.key_dim, c.conv_size, std=std)
            self.k_conv1d = ShortConvolution(kv_key_dim, c.conv_size, std=std)
            self.v_conv1d = ShortConvolution(kv_value_dim, c.conv_size, std=std)
        if c.use_output_gate:
            self.g_proj = Linear(c.hidden_size, c.value_dim, std=std)
        self.add_module(
            self.norm_name,
            (GatedRMSNorm if c.use_output_gate else RMSNorm)(
                self.value_head_dim, c.norm_eps, bool(c.elementwise_affine)
            ),
        )

    @property
    def value_head_dim(self) -> int:
        return self.config.value_dim // self.config.num_heads

    @property
    def norm_name(self) -> str:
        """The reference names the output norm after the kernel it would use."""
        fused = self.config.use_output_gate and self.config.fuse_norm
        return "g_norm_swish_gate" if fused else "g_norm"

    def mix(self, x: Tensor, ctx: Context) -> Tensor:
        c = self.config
        gates = [self.g_proj] if c.use_output_gate else []
        q, k, v, low_rank, *gate = project(x, self.q_proj, self.k_proj, self.v_proj, self.gk_proj[0], *gates)
        if c.use_short_conv:
            q, k, v = self.q_conv1d(q, ctx, "q_conv"), self.k_conv1d(k, ctx, "k_conv"), self.v_conv1d(v, ctx, "v_conv")
        q, k, v = split_heads(q, c.num_heads), split_heads(k, c.kv_heads), split_heads(v, c.kv_heads)
        if c.feature_map is not None:
            q, k = FEATURE_MAPS[c.feature_map](q), FEATURE_MAPS[c.feature_map](k)
        o, state = linear_attention(
            q,
            k,
            v,
            key_decay=split_heads(self.log_decay(self.gk_proj[1](low_rank)), c.kv_heads),
            initial_state=cached(ctx, "state"),
            output_final_state=ctx.cache is not None,
            cu_seqlens=ctx.cu_seqlens,
            shard=ctx.shard,
        )
        remember(ctx, "state", state)
        norm = getattr(self, self.norm_name)
        o = norm(o, split_heads(gate[0], c.num_heads)) if gate else norm(o)
        return self.o_proj(merge_heads(o))

    def log_decay(self, logits: Tensor) -> Tensor:
        """[B, T, key channels] log decay, <= 0, fp32."""
        decay = F.logsigmoid(logits.float()) / GATE_NORMALIZER
        return decay if self.config.clamp_min is None else decay.clamp_min(self.config.clamp_min)

    def tensor_parallel_plan(self, ranks: int) -> Plan:
        c = self.config
        local = {
            "num_heads": whole_per_rank(c.num_heads, ranks, "num_heads"),
            "kv_heads": shared_per_rank(c.kv_heads, ranks, "num_kv_heads"),
        }
        heads = rows(self, c.num_heads, "q_proj", "g_proj", "q_conv1d")
        grouped = rows(self, c.kv_heads, "k_proj", "v_proj", "gk_proj.1", "k_conv1d", "v_conv1d")
        return Plan({**heads, **grouped, **columns(self, "o_proj")}, local)

    def flops(self, seq_len: int) -> float:
        """Decay, update and read of the state: 5 operations for each of its H * K * V entries."""
        c = self.config
        return 5.0 * c.key_dim * self.value_head_dim


register(System(GLAConfig, GatedLinearAttention))
