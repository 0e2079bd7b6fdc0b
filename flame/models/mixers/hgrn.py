"""HGRN: an elementwise gated recurrence whose forget gates have a lower bound that grows with depth (Qin et al., 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flame.kernels.elementwise_scan import elementwise_scan
from flame.models.config import ModelConfig
from flame.models.context import Context
from flame.models.decoder import Backbone
from flame.models.mixers.base import Mixer, cached, remember
from flame.models.modules import GatedRMSNorm, Linear, ShortConvolution
from flame.models.registry import System, register
from flame.models.sharding import Plan, columns, rows, whole_per_rank

BOUNDS = "lower_bounds"
FLOOR = "lower_bound"  # of one layer


@dataclass(kw_only=True)
class HGRNConfig(ModelConfig):
    """`expand_ratio` widens the recurrence; `use_lower_bound` learns a floor of the forget gate per layer and channel."""

    model_type: ClassVar[str] = "hgrn"

    attn_mode: str = "fused_recurrent"
    expand_ratio: int | float | None = 1
    use_short_conv: bool = False
    conv_size: int = 4
    use_lower_bound: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.forget_dim > 0, "expand_ratio", "gives no channels")

    @property
    def forget_dim(self) -> int:
        return int(self.hidden_size * (1 if self.expand_ratio is None else self.expand_ratio))


class LowerBoundBackbone(Backbone):
    """Backbone with `lower_bounds [L, E]`: the softmax over layers, summed up to a layer, is that layer's floor.

    Layer 0 has floor 0, and a new model's floors rise evenly. The blocks find them in `ctx.carried`.
    """

    config: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        if config.use_lower_bound:
            self.lower_bounds = nn.Parameter(torch.empty(config.num_hidden_layers, config.forget_dim))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.config.use_lower_bound:
            nn.init.zeros_(self.lower_bounds)

    def initial_carried(self) -> dict[str, Tensor]:
        if not self.config.use_lower_bound:
            return {}
        shares = torch.softmax(self.lower_bounds.float(), dim=0)
        return {BOUNDS: shares.cumsum(0) - shares[0]}

    def carried_to(self, index: int, carried: dict[str, Tensor]) -> dict[str, Tensor]:
        if BOUNDS not in carried or index == 0:  # layer 0 has floor 0, whose logarithm has no gradient
            return {}
        return {FLOOR: carried[BOUNDS][index]}


def log_forget_gate(mixer: Mixer, logits: Tensor, ctx: Context) -> Tensor:
    """`log(b + (1 - b) sigmoid(f))` for f `[B, T, E]` and the floor b of the mixer's layer, in fp32.

    Without a floor it is the plain log-sigmoid.
    """
    log_gate = F.logsigmoid(logits.float())
    floor = ctx.carried.get(FLOOR)
    if floor is None:
        return log_gate
    bound = mixer.own_part(floor)
    return torch.logaddexp(bound.log(), torch.log1p(-bound) + log_gate)


class HGRN(Mixer):
    """`h_t = f_t h_{t-1} + (1 - f_t) silu(i_t)` per channel, then a gated norm over all channels."""

    config_class = HGRNConfig
    context_parallel = True

    def __init__(self, config: HGRNConfig | None = None, layer_idx: int = 0, **options: Any) -> None:
        super().__init__(config, layer_idx, **options)
        c = self.config
        dim, std = c.forget_dim, c.initializer_range
        self.i_proj = Linear(c.hidden_size, dim, std=std)
        self.f_proj = Linear(c.hidden_size, dim, std=std)
        self.g_proj = Linear(c.hidden_size, dim, std=std)
        if c.use_short_conv:
            self.i_conv1d = ShortConvolution(dim, c.conv_size, activation=None, std=std)
            self.f_conv1d = ShortConvolution(dim, c.conv_size, activation=None, std=std)
        self.g_norm = GatedRMSNorm(dim, c.norm_eps, bool(c.elementwise_affine))
        self.o_proj = Linear(dim, c.hidden_size, std=std)

    def mix(self, x: Tensor, ctx: Context) -> Tensor:
        i, f = self.i_proj(x), self.f_proj(x)
        if self.config.use_short_conv:
            i, f = self.i_conv1d(i, ctx, "conv_i"), self.f_conv1d(f, ctx, "conv_f")
        log_decay = log_forget_gate(self, f, ctx)
        u = (F.silu(i.float()) * -torch.expm1(log_decay)).to(x.dtype)
        h, state = elementwise_scan(
            u,
            log_decay.to(x.dtype),
            initial_state=cached(ctx, "state"),
            output_final_state=ctx.cache is not None,
            cu_seqlens=ctx.cu_seqlens,
            shard=ctx.shard,
        )
        remember(ctx, "state", state)
        return self.o_proj(self.g_norm(h, self.g_proj(x)))

    def tensor_parallel_plan(self, ranks: int) -> Plan:
        whole_per_rank(self.config.forget_dim, ranks, "the number of channels")
        channels = rows(self, ranks, "i_proj", "f_proj", "g_proj", "i_conv1d", "f_conv1d", "g_norm")
        return Plan({**channels, **columns(self, "o_proj")}, spanning=("g_norm",))

    def flops(self, seq_len: int) -> float:
        """A multiply and an add a channel."""
        return 2.0 * self.config.forget_dim


register(System(HGRNConfig, HGRN, backbone=LowerBoundBackbone))
