"""Gated DeltaNet: the delta rule on a state that decays by a scalar of the token (Yang et al., 2412.06464)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from flame.kernels.delta_rule import delta_rule
from flame.models.context import Context
from flame.models.delta import DeltaHeadsConfig, DeltaMixer, init_decay, log_decay, write_strength
from flame.models.mixers.base import cached, remember, split_heads
from flame.models.modules import Linear, project
from flame.models.registry import System, register
from flame.models.sharding import Plan


@dataclass(kw_only=True)
class GatedDeltaNetConfig(DeltaHeadsConfig):
    """With num_v_heads above num_heads, several value heads share a query and key head."""

    model_type: ClassVar[str] = "gated_deltanet"

    num_v_heads: int | None = None
    use_gate: bool = True
    output_gate_activation: Literal["swish", "silu", "sigmoid"] = "swish"
    allow_neg_eigval: bool = False


class GatedDeltaNet(DeltaMixer):
    """S_t = (I - beta_t k_t k_t^T) exp(g_t) S_{t-1} + beta_t k_t v_t^T, g_t = -exp(A_log) softplus(a_t + dt_bias)."""

    config_class = GatedDeltaNetConfig
    context_parallel = True

    def __init__(self, config: GatedDeltaNetConfig | None = None, layer_idx: int = 0, **options: Any) -> None:
        super().__init__(config, layer_idx, **options)
        c = self.config
        self.add_projections(q=c.key_dim, k=c.key_dim, v=c.value_dim)
        self.a_proj = Linear(c.hidden_size, c.value_heads, std=c.initializer_range)
        self.b_proj = Linear(c.hidden_size, c.value_heads, std=c.initializer_range)
        self.A_log = nn.Parameter(torch.empty(c.value_heads))
        self.dt_bias = nn.Parameter(torch.empty(c.value_heads))
        self.add_output(c.use_gate, "sigmoid" if c.output_gate_activation == "sigmoid" else "silu")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init_decay(self.A_log, self.dt_bias)

    def mix(self, x: Tensor, ctx: Context) -> Tensor:
        c = self.config
        gates = [self.g_proj] if c.use_gate else []
        q, k, v, a, b, *gate = project(x, self.q_proj, self.k_proj, self.v_proj, self.a_proj, self.b_proj, *gates)
        o, state = delta_rule(
            split_heads(self.convolve("q", q, ctx), c.num_heads),
            split_heads(self.convolve("k", k, ctx), c.num_heads),
            split_heads(self.convolve("v", v, ctx), c.value_heads),
            write_strength(b, c.allow_neg_eigval),
            scalar_decay=log_decay(a, self.A_log, self.dt_bias),
            normalize=True,
            initial_state=cached(ctx, "state"),
            output_final_state=ctx.cache is not None,
            cu_seqlens=ctx.cu_seqlens,
            shard=ctx.shard,
        )
        remember(ctx, "state", state)
        return self.gated_output(o, gate[0] if gate else None)

    def tensor_parallel_plan(self, ranks: int) -> Plan:
        return self.plan_by_heads(ranks, value_heads=("a_proj", "b_proj", "A_log", "dt_bias"))

    def flops(self, seq_len: int) -> float:
        return self.config.state_flops(steps=1, decay=True)


register(System(GatedDeltaNetConfig, GatedDeltaNet))
