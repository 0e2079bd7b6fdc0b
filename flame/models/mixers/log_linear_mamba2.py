"""Log-Linear Mamba-2: Mamba-2 that keeps a state for every block of a Fenwick tree over its past (Guo et al., 2506.04761)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flame.kernels.log_linear_attention import LevelStates, log_linear_attention
from flame.models.context import Context
from flame.models.mixers.base import cached, merge_heads, remember, split_heads
from flame.models.mixers.mamba import StateSpaceBackbone
from flame.models.mixers.mamba2 import Mamba2, Mamba2Config
from flame.models.modules import Linear
from flame.models.registry import Names, System, register
from flame.models.sharding import Plan, packed, rows


@dataclass(kw_only=True)
class LogLinearMamba2Config(Mamba2Config):
    """`num_levels` is 1 + log2 of the longest context whose blocks all have weights of their own; the last level also
    weighs everything older. Blocks have an MLP, unlike Mamba-2's."""

    model_type: ClassVar[str] = "log_linear_mamba2"

    num_levels: int = 15
    chunk_size: int = 64
    residual_in_fp32: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.num_levels >= 2, "num_levels", "must be at least 2")
        self.require(not self.residual_in_fp32, "residual_in_fp32", "must be false here")


class LogLinearMamba2(Mamba2):
    """Mamba-2 whose read of token u at token t is weighed by `softplus(L * dl_t)` of the level at which t sees u."""

    config_class = LogLinearMamba2Config
    context_parallel = True

    def __init__(self, config: LogLinearMamba2Config | None = None, layer_idx: int = 0, **options: Any) -> None:
        super().__init__(config, layer_idx, **options)
        c = self.config
        width = c.inner_size + c.conv_size + c.heads * (1 + c.num_levels)
        self.in_proj = Linear(c.hidden_size, width, bias=c.use_bias, std=c.initializer_range)
        self.L = nn.Parameter(torch.ones(c.heads, c.num_levels))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        with torch.no_grad():
            self.A_log.copy_(torch.arange(1, len(self.A_log) + 1, dtype=torch.float32).log())
        if "L" in self._parameters:  # not yet while Mamba-2's own parts are built
            nn.init.ones_(self.L)

    def mix(self, x: Tensor, ctx: Context) -> Tensor:
        c = self.config
        widths = [c.inner_size, c.conv_size, c.heads, c.heads * c.num_levels]
        gate, mixed, dt, dl = self.in_proj(x).split(widths, -1)
        mixed = self.conv1d(mixed, ctx, "conv")
        states = c.n_groups * c.state_size
        hidden, write, read = mixed.split([c.inner_size, states, states], -1)
        dt = F.softplus(dt.float() + self.dt_bias.float()).clamp(*c.dt_limit)  # [B, T, H]
        hidden = split_heads(hidden, c.heads)
        y, state = log_linear_attention(
            split_heads(read, c.n_groups),
            split_heads(write, c.n_groups),
            (hidden * dt[..., None]).to(x.dtype),
            level_weights(dl, self.L),
            scalar_decay=-torch.exp(self.A_log.float()) * dt,
            scale=1.0,
            initial_state=cached_levels(ctx),
            output_final_state=ctx.cache is not None,
            cu_seqlens=ctx.cu_seqlens,
            shard=ctx.shard,
        )
        remember_levels(ctx, state)
        skip = self.D.view(c.heads, -1)  # [H, 1] or [H, P]
        y = merge_heads((y + skip * hidden).to(x.dtype))
        return self.out_proj(self.gated(y, gate))

    def tensor_parallel_plan(self, ranks: int) -> Plan:
        c, plan = self.config, super().tensor_parallel_plan(ranks)
        channels, states = (c.inner_size, c.heads), (c.n_groups * c.state_size, c.n_groups)
        parts = [channels, channels, states, states, (c.heads, c.heads), (c.heads * c.num_levels, c.heads)]
        own = {**packed(self, parts, "in_proj"), **rows(self, c.heads, "L")}
        return Plan({**plan.parameters, **own}, plan.config, plan.spanning)

    def flops(self, seq_len: int) -> float:
        """Mamba-2's, and the reads of half as many more states as the sequence has levels."""
        c = self.config
        return super().flops(seq_len) + c.inner_size * c.state_size * level_count(seq_len, c.num_levels)

    def no_weight_decay(self) -> set[str]:
        return {*super().no_weight_decay(), "L"}


def level_weights(raw: Tensor, L: Tensor) -> Tensor:
    """softplus(L * raw) in fp32: raw [B, T, H * levels], L [H, levels] to [B, T, H, levels]."""
    return F.softplus(L.float() * raw.float().unflatten(-1, L.shape))


def level_count(seq_len: int, levels: int) -> float:
    """Levels with states of their own at a sequence's length."""
    return min(math.log2(max(seq_len, 2)), levels - 1)


def cached_levels(ctx: Context) -> LevelStates | None:
    states, count = cached(ctx, "state"), cached(ctx, "count")
    return None if states is None or count is None else LevelStates(states, count)


def remember_levels(ctx: Context, state: LevelStates | None) -> None:
    if state is not None:
        remember(ctx, "state", state.states)
        remember(ctx, "count", state.count)


LOG_LINEAR_NAMES = Names(backbone="backbone", final_norm="norm_f", mixer="mixer", mixer_norm="mixer_norm")

register(System(LogLinearMamba2Config, LogLinearMamba2, None, StateSpaceBackbone, LOG_LINEAR_NAMES))
