"""Gated DeltaProduct: several delta-rule steps a token, so that its transition is a product of Householder-like matrices.

Siems et al., "DeltaProduct: Improving State-Tracking in Linear RNNs via Householder Products", 2502.10297.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flame.kernels.delta_rule import delta_rule
from flame.models.context import Context
from flame.models.delta import DeltaHeadsConfig, DeltaMixer, init_decay, log_decay, write_strength
from flame.models.mixers.base import cached, remember, split_heads
from flame.models.modules import Linear
from flame.models.registry import System, register
from flame.models.sharding import Plan, columns, packed, rows, whole_per_rank


@dataclass(kw_only=True)
class GatedDeltaProductConfig(DeltaHeadsConfig):
    """num_householder steps a token; use_forget_gate adds the decay of Gated DeltaNet before a token's first step."""

    model_type: ClassVar[str] = "gated_deltaproduct"

    use_output_gate: bool = True
    use_forget_gate: bool = False
    allow_neg_eigval: bool = False
    num_householder: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.num_householder > 0, "num_householder", "must be positive")


class GatedDeltaProduct(DeltaMixer):
    """S <- exp(g_t) S, then n times S <- S + beta k (v - k^T S)^T with its own k, v, beta; o_t = S^T q_t / sqrt(K)."""

    config_class = GatedDeltaProductConfig
    context_parallel = True

    def __init__(self, config: GatedDeltaProductConfig | None = None, layer_idx: int = 0, **options: Any) -> None:
        super().__init__(config, layer_idx, **options)
        c, n = self.config, self.config.num_householder
        self.add_projections(q=c.key_dim, k=n * c.key_dim, v=n * c.value_dim)
        self.b_proj = Linear(c.hidden_size, n * c.num_heads, std=c.initializer_range)
        if c.use_forget_gate:
            self.a_proj = Linear(c.hidden_size, c.num_heads, std=c.initializer_range)
            self.A_log = nn.Parameter(torch.empty(c.num_heads))
            self.dt_bias = nn.Parameter(torch.empty(c.num_heads))
        self.add_output(c.use_output_gate)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.config.use_forget_gate:
            init_decay(self.A_log, self.dt_bias)

    def mix(self, x: Tensor, ctx: Context) -> Tensor:
        c = self.config
        decay = log_decay(self.a_proj(x), self.A_log, self.dt_bias) if c.use_forget_gate else None
        o, state = delta_rule(
            split_heads(self.project("q", x, ctx), c.num_heads),
            self.steps(self.project("k", x, ctx)).unflatten(-1, (c.num_heads, -1)),
            self.steps(self.project("v", x, ctx)).unflatten(-1, (c.num_heads, -1)),
            self.steps(write_strength(self.b_proj(x), c.allow_neg_eigval)),
            scalar_decay=decay,
            normalize=True,
            initial_state=cached(ctx, "state"),
            output_final_state=ctx.cache is not None,
            cu_seqlens=ctx.cu_seqlens,
            shard=ctx.shard,
        )
        remember(ctx, "state", state)
        return self.output(o, x)

    def steps(self, x: Tensor) -> Tensor:
        """[B, T, n * C] -> [B, T * n, C]: the steps of a token lie side by side in the channels."""
        return x.unflatten(-1, (self.config.num_householder, -1)).flatten(1, 2)

    def tensor_parallel_plan(self, ranks: int) -> Plan:
        c = self.config
        local = {"num_heads": whole_per_rank(c.num_heads, ranks, "num_heads")}
        steps, heads = c.num_householder, c.num_heads
        parameters = rows(self, heads, "q_proj", "q_conv1d", "a_proj", "g_proj", "A_log", "dt_bias")
        for name, width in {"k": c.key_dim, "v": c.value_dim, "b": heads}.items():
            parameters |= packed(self, [(width, heads)] * steps, f"{name}_proj", f"{name}_conv1d")
        return Plan({**parameters, **columns(self, "o_proj")}, local)

    def flops(self, seq_len: int) -> float:
        return self.config.state_flops(steps=self.config.num_householder, decay=self.config.use_forget_gate)


register(System(GatedDeltaProductConfig, GatedDeltaProduct))
