"""Log-Linear Gated DeltaNet: the gated delta rule on a state for every block of a Fenwick tree (Guo et al., 2506.04761)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flame.kernels.log_linear_attention import log_linear_delta_rule
from flame.models.context import Context
from flame.models.delta import log_decay, write_strength
from flame.models.mixers.base import split_heads
from flame.models.mixers.gated_deltanet import GatedDeltaNet, GatedDeltaNetConfig
from flame.models.mixers.log_linear_mamba2 import cached_levels, level_count, level_weights, remember_levels
from flame.models.modules import Linear
from flame.models.registry import System, register
from flame.models.sharding import Plan


@dataclass(kw_only=True)
class LogLinearGatedDeltaNetConfig(GatedDeltaNetConfig):
    """Gated DeltaNet's keys, and `num_levels`: 1 + log2 of the longest context whose blocks all have weights of their
    own; the last level also weighs everything older."""

    model_type: ClassVar[str] = "log_linear_gated_deltanet"

    num_levels: int = 15

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.num_levels >= 2, "num_levels", "must be at least 2")


class LogLinearGatedDeltaNet(GatedDeltaNet):
    """Gated DeltaNet whose every state is read with the weight `softplus(L * l_proj(x))` of its level."""

    config_class = LogLinearGatedDeltaNetConfig

    def __init__(self, config: LogLinearGatedDeltaNetConfig | None = None, layer_idx: int = 0, **options: Any) -> None:
        super().__init__(config, layer_idx, **options)
        c = self.config
        self.l_proj = Linear(c.hidden_size, c.value_heads * c.num_levels, std=c.initializer_range)
        self.L = nn.Parameter(torch.ones(c.value_heads, c.num_levels))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "L" in self._parameters:  # not yet while Gated DeltaNet's own parts are built
            nn.init.ones_(self.L)

    def mix(self, x: Tensor, ctx: Context) -> Tensor:
        c = self.config
        q, k = (split_heads(self.project(name, x, ctx), c.num_heads) for name in ("q", "k"))
        o, state = log_linear_delta_rule(
            q,
            k,
            split_heads(self.project("v", x, ctx), c.value_heads),
            write_strength(self.b_proj(x), c.allow_neg_eigval),
            level_weights(self.l_proj(x), self.L),
            scalar_decay=log_decay(self.a_proj(x), self.A_log, self.dt_bias),
            normalize=True,
            initial_state=cached_levels(ctx),
            output_final_state=ctx.cache is not None,
            cu_seqlens=ctx.cu_seqlens,
            shard=ctx.shard,
        )
        remember_levels(ctx, state)
        return self.output(o, x)

    def tensor_parallel_plan(self, ranks: int) -> Plan:
        return self.plan_by_heads(ranks, value_heads=("a_proj", "b_proj", "A_log", "dt_bias", "l_proj", "L"))

    def flops(self, seq_len: int) -> float:
        """Gated DeltaNet's, and the reads of half as many more states as the sequence has levels."""
        c = self.config
        state = c.value_heads * c.head_dim * c.value_head_dim
        return super().flops(seq_len) + state * level_count(seq_len, c.num_levels)

    def no_weight_decay(self) -> set[str]:
        return {*super().no_weight_decay(), "L"}


register(System(LogLinearGatedDeltaNetConfig, LogLinearGatedDeltaNet))
