"""Kimi Delta Attention: the delta rule on a state whose key channels decay each at their own rate (2510.26692)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flame.kernels.delta_rule import delta_rule
from flame.models.context import Context
from flame.models.delta import DeltaHeadsConfig, DeltaMixer, init_decay, log_decay, write_strength
from flame.models.mixers.base import cached, remember, split_heads
from flame.models.modules import GatedRMSNorm, Linear, project
from flame.models.registry import System, register
from flame.models.sharding import Plan


@dataclass(kw_only=True)
class KDAConfig(DeltaHeadsConfig):
    """lower_bound lb < 0 selects the bounded gate, log decay in (lb, 0); safe_gate then starts it at A = 1."""

    model_type: ClassVar[str] = "kda"

    num_hidden_layers: int = 24
    head_dim: int = 128
    num_heads: int = 16
    expand_v: float = 1.0
    num_v_heads: int | None = None
    allow_neg_eigval: bool = False
    safe_gate: bool = False
    lower_bound: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.lower_bound is None or self.lower_bound < 0, "lower_bound", "must be negative")
        bounded = self.lower_bound is not None and self.lower_bound >= -5
        self.require(not self.safe_gate or bounded, "safe_gate", "needs a lower_bound from -5 to below 0")


class KimiDeltaAttention(DeltaMixer):
    """S_t = (I - beta_t k_t k_t^T) diag(exp(g_t)) S_{t-1} + beta_t k_t v_t^T, o_t = S_t^T q_t / sqrt(K)."""

    config_class = KDAConfig
    context_parallel = True

    def __init__(self, config: KDAConfig | None = None, layer_idx: int = 0, **options: Any) -> None:
        super().__init__(config, layer_idx, **options)
        c, std = self.config, self.config.initializer_range
        rank, decays = c.value_head_dim, c.value_heads * c.head_dim
        self.add_projections(q=c.key_dim, k=c.key_dim, v=c.value_dim)
        self.f_proj = nn.Sequential(Linear(c.hidden_size, rank, std=std), Linear(rank, decays, std=std))
        self.b_proj = Linear(c.hidden_size, c.value_heads, std=std)
        self.A_log = nn.Parameter(torch.empty(c.value_heads))
        self.dt_bias = nn.Parameter(torch.empty(decays))
        self.g_proj = nn.Sequential(Linear(c.hidden_size, rank, std=std), Linear(rank, c.value_dim, bias=True, std=std))
        self.o_norm = GatedRMSNorm(c.value_head_dim, c.norm_eps, activation="sigmoid")
        self.o_proj = Linear(c.value_dim, c.hidden_size, std=std)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init_decay(self.A_log, self.dt_bias, 1.0, 16.0)
        if self.config.safe_gate:
            nn.init.zeros_(self.A_log)

    def mix(self, x: Tensor, ctx: Context) -> Tensor:
        c = self.config
        down = (self.f_proj[0], self.g_proj[0])  # the first halves of the low-rank maps
        q, k, v, b, f, g = project(x, self.q_proj, self.k_proj, self.v_proj, self.b_proj, *down)
        o, state = delta_rule(
            split_heads(self.convolve("q", q, ctx), c.num_heads),
            split_heads(self.convolve("k", k, ctx), c.num_heads),
            split_heads(self.convolve("v", v, ctx), c.value_heads),
            write_strength(b, c.allow_neg_eigval),
            key_decay=self.key_decay(self.f_proj[1](f)),
            normalize=True,
            initial_state=cached(ctx, "state"),
            output_final_state=ctx.cache is not None,
            cu_seqlens=ctx.cu_seqlens,
            shard=ctx.shard,
        )
        remember(ctx, "state", state)
        return self.gated_output(o, self.g_proj[1](g))

    def key_decay(self, f: Tensor) -> Tensor:
        """[B, T, H, K] log decay, fp32, of the gate's logits f [B, T, H * K]."""
        c = self.config
        raw, A_log = split_heads(f, c.value_heads), self.A_log[:, None]
        bias = self.dt_bias.view(c.value_heads, c.head_dim)
        if c.lower_bound is None:
            return log_decay(raw, A_log, bias)
        return c.lower_bound * torch.sigmoid(A_log.float().exp() * (raw.float() + bias.float()))

    def tensor_parallel_plan(self, ranks: int) -> Plan:
        plan = self.plan_by_heads(ranks, value_heads=("f_proj.1", "b_proj", "A_log", "dt_bias", "g_proj.1"))
        del plan.parameters["g_proj.0.weight"]  # the low-rank half of the gate is the same for all heads
        return plan

    def flops(self, seq_len: int) -> float:
        return self.config.state_flops(steps=1, decay=True)


register(System(KDAConfig, KimiDeltaAttention))
