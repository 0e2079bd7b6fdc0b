"""DeltaNet: a fast-weight memory that replaces what it holds under a key (Yang et al., 2406.06484)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from flame.kernels.delta_rule import delta_rule
from flame.models.context import Context
from flame.models.delta import DeltaMixer, write_strength
from flame.models.heads import ScaledWidths
from flame.models.mixers.base import cached, remember, split_heads
from flame.models.modules import Linear, ShortConvolution, project
from flame.models.registry import System, register
from flame.models.sharding import Plan, columns, rows, whole_per_rank


@dataclass(kw_only=True)
class DeltaNetConfig(ScaledWidths):
    """expand_k and expand_v scale the key and value widths; use_output_norm changes nothing (the norm is always on)."""

    model_type: ClassVar[str] = "delta_net"

    attn_mode: str = "chunk"
    expand_k: float = 1.0
    expand_v: float = 1.0
    use_gate: bool = False
    use_short_conv: bool = True
    conv_size: int = 4
    use_beta: bool = True
    use_output_norm: bool = True
    num_heads: int = 16
    qk_norm: Literal["l2", "sum"] = "l2"
    qk_activation: Literal["silu", "relu", "elu", "identity"] = "silu"
    allow_neg_eigval: bool = False

    @property
    def value_head_dim(self) -> int:
        return self.value_dim // self.num_heads


class DeltaNet(DeltaMixer):
    """S_t = (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, o_t = S_t^T q_t / sqrt(K), q and k of unit length."""

    config_class = DeltaNetConfig
    context_parallel = True

    def __init__(self, config: DeltaNetConfig | None = None, layer_idx: int = 0, **options: Any) -> None:
        super().__init__(config, layer_idx, **options)
        c = self.config
        self.add_projections(q=c.key_dim, k=c.key_dim, v=c.value_dim)
        if c.use_short_conv and c.qk_activation != "silu":
            for name in ("q", "k"):
                conv = ShortConvolution(c.key_dim, c.conv_size, activation=None, std=c.initializer_range)
                self.add_module(f"{name}_conv1d", conv)
        if c.use_beta:
            self.b_proj = Linear(c.hidden_size, c.num_heads, std=c.initializer_range)
        self.add_output(c.use_gate)

    def mix(self, x: Tensor, ctx: Context) -> Tensor:
        c = self.config
        rates = [self.b_proj] if c.use_beta else []
        gates = [self.g_proj] if c.use_gate else []
        q, k, v, *others = project(x, self.q_proj, self.k_proj, self.v_proj, *rates, *gates)
        o, state = delta_rule(
            self.key_features("q", q, ctx),
            self.key_features("k", k, ctx),
            split_heads(self.convolve("v", v, ctx), c.num_heads),
            write_strength(others[0], c.allow_neg_eigval) if c.use_beta else None,
            normalize=c.qk_norm == "l2",
            initial_state=cached(ctx, "state"),
            output_final_state=ctx.cache is not None,
            cu_seqlens=ctx.cu_seqlens,
            shard=ctx.shard,
        )
        remember(ctx, "state", state)
        return self.gated_output(o, others[-1] if c.use_gate else None)

    def key_features(self, name: str, y: Tensor, ctx: Context) -> Tensor:
        """q or k [B, T, H, K] of its projection: convolution, activation, division by its absolute sum for qk_norm "sum"."""
        c = self.config
        if c.use_short_conv or c.qk_activation == "silu":
            y = self.convolve(name, y, ctx)
        if c.qk_activation == "relu":
            y = F.relu(y)
        elif c.qk_activation == "elu":
            y = F.elu(y) + 1
        y = split_heads(y, c.num_heads)
        return F.normalize(y, p=1, dim=-1, eps=1e-6) if c.qk_norm == "sum" else y

    def tensor_parallel_plan(self, ranks: int) -> Plan:
        c = self.config
        local = {"num_heads": whole_per_rank(c.num_heads, ranks, "num_heads")}
        names = ("q_proj", "k_proj", "v_proj", "b_proj", "g_proj", "q_conv1d", "k_conv1d", "v_conv1d")
        return Plan({**rows(self, c.num_heads, *names), **columns(self, "o_proj")}, local)

    def flops(self, seq_len: int) -> float:
        """Erase, write and read of the state: 6 operations for each of its H * K * V entries."""
        c = self.config
        return 6.0 * c.key_dim * c.value_head_dim


register(System(DeltaNetConfig, DeltaNet))
