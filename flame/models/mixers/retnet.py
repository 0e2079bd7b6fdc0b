"""RetNet: linear attention with a fixed decay per head and rotary positions (Sun et al., 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from flame.kernels.linear_attention import linear_attention
from flame.kernels.rotary import rotary
from flame.models.context import Context
from flame.models.feature_maps import HUGGING_FACE_ACTIVATIONS, activation
from flame.models.heads import GroupedHeads, ScaledWidths
from flame.models.mixers.base import Mixer, cached, merge_heads, remember, split_heads
from flame.models.modules import GatedRMSNorm, Linear, RMSNorm
from flame.models.registry import System, register
from flame.models.sharding import Plan, columns, rows, shared_per_rank, whole_per_rank


@dataclass(kw_only=True)
class RetNetConfig(GroupedHeads, ScaledWidths):
    """`use_short_conv`, `conv_size` and `attn_mode` are accepted and change nothing, as in the reference's model."""

    model_type: ClassVar[str] = "retnet"

    hidden_ratio: int | float | None = 2
    attn_mode: str = "chunk"
    expand_k: float = 1.0
    expand_v: float = 2.0
    num_heads: int = 8
    num_kv_heads: int | None = None
    feature_map: str | None = None
    use_short_conv: bool = False
    conv_size: int = 4
    use_output_gate: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        activation(self.feature_map, HUGGING_FACE_ACTIVATIONS)
        self.require(self.key_dim // self.num_heads % 2 == 0, "expand_k", "gives odd heads, which rotary cannot pair")
        self.require(self.hidden_act != "powlu", "hidden_act", "is also the output gate, which has no 'powlu'")


class MultiScaleRetention(Mixer):
    """Per head `S_t = gamma_h S_{t-1} + k_t v_t^T`, `o_t = K^-1/2 S_t^T q_t`, `gamma_h = 1 - 2^(-5-h)`."""

    config_class = RetNetConfig
    context_parallel = True

    def __init__(self, config: RetNetConfig | None = None, layer_idx: int = 0, **options: Any) -> None:
        super().__init__(config, layer_idx, **options)
        c = self.config
        groups, std, self.all_heads = c.num_heads // c.kv_heads, c.initializer_range, c.num_heads
        self.q_proj = Linear(c.hidden_size, c.key_dim, std=std)
        self.k_proj = Linear(c.hidden_size, c.key_dim // groups, std=std)
        self.v_proj = Linear(c.hidden_size, c.value_dim // groups, std=std)
        if c.use_output_gate:
            self.g_proj = Linear(c.hidden_size, c.value_dim, std=std)
        self.o_proj = Linear(c.value_dim, c.hidden_size, std=std)
        norm = GatedRMSNorm if c.use_output_gate else RMSNorm
        # The reference names the fused norm-and-gate module differently.
        fused = c.use_output_gate and c.fuse_norm and c.hidden_act == "swish"
        self.norm_name = "g_norm_swish_gate" if fused else "g_norm"
        self.add_module(self.norm_name, norm(c.value_dim // c.num_heads, c.norm_eps, bool(c.elementwise_affine)))
        self.feature_map = activation(c.feature_map, HUGGING_FACE_ACTIVATIONS)

    def mix(self, x: Tensor, ctx: Context) -> Tensor:
        c = self.config
        q = self.feature_map(split_heads(self.q_proj(x), c.num_heads))
        k = self.feature_map(split_heads(self.k_proj(x), c.kv_heads))
        v = split_heads(self.v_proj(x), c.kv_heads)
        o, state = linear_attention(
            rotary(q, ctx.positions),
            rotary(k, ctx.positions),
            v,
            head_decay=self.own_part(log_retention(self.all_heads, x.device)),
            initial_state=cached(ctx, "state"),
            output_final_state=ctx.cache is not None,
            cu_seqlens=ctx.cu_seqlens,
            shard=ctx.shard,
        )
        remember(ctx, "state", state)
        norm = getattr(self, self.norm_name)
        o = norm(o, split_heads(self.g_proj(x), c.num_heads)) if c.use_output_gate else norm(o)
        return self.o_proj(merge_heads(o))

    def tensor_parallel_plan(self, ranks: int) -> Plan:
        c = self.config
        local = {
            "num_heads": whole_per_rank(c.num_heads, ranks, "num_heads"),
            "kv_heads": shared_per_rank(c.kv_heads, ranks, "num_kv_heads"),
        }
        heads, grouped = rows(self, c.num_heads, "q_proj", "g_proj"), rows(self, c.kv_heads, "k_proj", "v_proj")
        return Plan({**heads, **grouped, **columns(self, "o_proj")}, local)

    def flops(self, seq_len: int) -> float:
        """Write and read of every head's state: 4 operations an entry."""
        c = self.config
        return 4.0 * c.key_dim * c.value_dim / c.num_heads


def log_retention(heads: int, device: torch.device) -> Tensor:
    """`log(1 - 2^(-5-h))` for every head, `[H]` fp32."""
    return torch.log1p(-torch.exp2(-5.0 - torch.arange(heads, device=device, dtype=torch.float32)))


register(System(RetNetConfig, MultiScaleRetention))
