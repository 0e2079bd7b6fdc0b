"""Comba: a delta rule with closed-loop control, whose erase read and query correction have keys of their own.

Hu et al., "Comba: Improving Bilinear RNNs with Closed-loop Control", 2506.02475.
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
from flame.models.sharding import Plan


@dataclass(kw_only=True)
class CombaConfig(DeltaHeadsConfig):
    """use_output_correction, use_inner_decay and correction_factor change nothing: the model always has both, factor 1."""

    model_type: ClassVar[str] = "comba"

    num_v_heads: int | None = None
    use_output_gate: bool = True
    use_output_correction: bool = True
    correction_factor: float = 1.0
    use_inner_decay: bool = True


class Comba(DeltaMixer):
    """S_t = exp(g_t) S_{t-1} + beta_t k_t (v_t - S_{t-1}^T p_t)^T, p = sigmoid(decay) k, o_t = S_t^T (q_t - D p_t) / sqrt(K).

    q - D p, k and p are brought to unit length before the recurrence.
    """

    config_class = CombaConfig
    context_parallel = True

    def __init__(self, config: CombaConfig | None = None, layer_idx: int = 0, **options: Any) -> None:
        super().__init__(config, layer_idx, **options)
        c = self.config
        self.add_projections(q=c.key_dim, k=c.key_dim, v=c.value_dim)
        self.a_proj = Linear(c.hidden_size, c.value_heads, std=c.initializer_range)
        self.b_proj = Linear(c.hidden_size, c.value_heads, std=c.initializer_range)
        self.decay = nn.Parameter(torch.empty(c.num_heads))
        self.D = nn.Parameter(torch.empty(c.num_heads))
        self.A_log = nn.Parameter(torch.empty(c.value_heads))
        self.dt_bias = nn.Parameter(torch.empty(c.value_heads))
        self.add_output(c.use_output_gate, "sigmoid")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.decay)
        nn.init.ones_(self.D)
        init_decay(self.A_log, self.dt_bias)

    def mix(self, x: Tensor, ctx: Context) -> Tensor:
        c = self.config
        q, k = (split_heads(self.project(name, x, ctx), c.num_heads) for name in ("q", "k"))
        erase = (k * self.decay.float().sigmoid()[:, None]).to(k.dtype)
        o, state = delta_rule(
            (q - self.D[:, None] * erase).to(k.dtype),
            k,
            split_heads(self.project("v", x, ctx), c.value_heads),
            write_strength(self.b_proj(x), doubled=False),
            scalar_decay=log_decay(self.a_proj(x), self.A_log, self.dt_bias),
            erase_key=erase,
            exclusive=True,
            normalize=True,
            initial_state=cached(ctx, "state"),
            output_final_state=ctx.cache is not None,
            cu_seqlens=ctx.cu_seqlens,
            shard=ctx.shard,
        )
        remember(ctx, "state", state)
        return self.output(o, x)

    def tensor_parallel_plan(self, ranks: int) -> Plan:
        return self.plan_by_heads(ranks, key_heads=("decay", "D"), value_heads=("a_proj", "b_proj", "A_log", "dt_bias"))

    def flops(self, seq_len: int) -> float:
        return self.config.state_flops(steps=1, decay=True)


register(System(CombaConfig, Comba))
