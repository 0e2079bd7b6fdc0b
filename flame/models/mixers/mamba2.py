"""Mamba-2: state-space duality, a scalar decay per head and token (Dao and Gu, 2024)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flame.kernels.linear_attention import linear_attention
from flame.models.config import ModelConfig
from flame.models.context import Context
from flame.models.mixers.base import Mixer, cached, merge_heads, remember, split_heads
from flame.models.mixers.mamba import (
    STATE_SPACE_NAMES,
    StateSpaceBackbone,
    StateSpaceBlock,
    check_state_space,
    init_step_bias,
    rescaled_output_,
)
from flame.models.modules import GatedRMSNorm, Linear, ShortConvolution, project_apart
from flame.models.registry import System, register
from flame.models.sharding import Plan, columns, packed, rows, whole_per_rank


@dataclass(kw_only=True)
class Mamba2Config(ModelConfig):
    """`num_heads` is expand * hidden_size / head_dim; a given value must equal it. `chunk_size` changes nothing, nor do
    `time_step_*` and `rms_norm`, which stand in config files of earlier releases of the reference."""

    model_type: ClassVar[str] = "mamba2"

    num_hidden_layers: int = 48
    norm_eps: float = 1e-5
    pad_token_id: int | None = 0
    hidden_act: Literal["swish", "silu", "powlu"] = "silu"
    num_heads: int | None = None
    head_dim: int = 64
    state_size: int = 128
    expand: int | float = 2
    conv_kernel: int = 4
    n_groups: int = 1
    use_bias: bool = False
    use_conv_bias: bool = True
    conv_init: float | None = None
    A_init_range: list[float] = field(default_factory=lambda: [1.0, 16.0])
    D_has_hdim: bool = False
    residual_in_fp32: bool = True
    dt_min: float = 1e-3
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4
    dt_limit: list[float] = field(default_factory=lambda: [0.0, math.inf])
    rescale_prenorm_residual: bool = True
    rmsnorm: bool = True
    norm_before_gate: bool = False
    chunk_size: int = 256
    time_step_rank: int | str | None = None
    time_step_min: float | None = None
    time_step_max: float | None = None
    time_step_floor: float | None = None
    time_step_limit: list[float] | None = None
    rms_norm: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_state_space(self)
        self.require(self.attn is None, "attn", "is not an option here; use layer_types for a hybrid")
        self.require(self.attnres_block_size is None, "attnres_block_size", "needs blocks with an MLP")
        self.require_divisible("inner_size", "head_dim")
        self.require(self.num_heads in (None, self.heads), "num_heads", f"must be {self.heads} or left out")
        self.require(self.heads % self.n_groups == 0, "n_groups", f"must divide {self.heads} heads")

    @property
    def inner_size(self) -> int:
        return int(self.expand * self.hidden_size)

    @property
    def heads(self) -> int:
        return self.inner_size // self.head_dim

    @property
    def conv_size(self) -> int:
        return self.inner_size + 2 * self.n_groups * self.state_size


class Mamba2(Mixer):
    """`h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T`, `y_t = h_t C_t + D x_t`, then a gated norm."""

    config_class = Mamba2Config
    context_parallel = True

    def __init__(self, config: Mamba2Config | None = None, layer_idx: int = 0, **options: Any) -> None:
        super().__init__(config, layer_idx, **options)
        c = self.config
        dim, inner, std = c.hidden_size, c.inner_size, c.initializer_range
        self.in_proj = Linear(dim, inner + c.conv_size + c.heads, bias=c.use_bias, std=std)
        self.conv1d = ShortConvolution(c.conv_size, c.conv_kernel, bias=c.use_conv_bias, std=std)
        self.dt_bias = nn.Parameter(torch.empty(c.heads))
        self.A_log = nn.Parameter(torch.empty(c.heads))
        self.D = nn.Parameter(torch.empty(inner if c.D_has_hdim else c.heads))
        if c.rmsnorm:
            self.norm = GatedRMSNorm(inner, c.norm_eps, gate_first=not c.norm_before_gate)
        self.out_proj = Linear(inner, dim, bias=c.use_bias, std=std)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        c = self.config
        init_step_bias(self.dt_bias, c.dt_min, c.dt_max, c.dt_init_floor)
        with torch.no_grad():
            self.A_log.uniform_(*c.A_init_range).log_()
        nn.init.ones_(self.D)
        if c.conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -c.conv_init, c.conv_init)
        if c.rescale_prenorm_residual:
            rescaled_output_(self.out_proj.weight, c.num_hidden_layers)

    def mix(self, x: Tensor, ctx: Context) -> Tensor:
        c = self.config
        states = c.n_groups * c.state_size
        gate, hidden, narrow = project_apart(x, self.in_proj, [c.inner_size, c.inner_size, 2 * states + c.heads])
        write_read, dt = narrow.split([2 * states, c.heads], -1)
        hidden, write_read = self.conv1d.apart([hidden, write_read], ctx, "conv")
        write, read = write_read.split(states, -1)
        dt = F.softplus(dt.float() + self.dt_bias.float()).clamp(*c.dt_limit)  # [B, T, H]
        hidden = split_heads(hidden, c.heads)
        y, state = linear_attention(
            split_heads(read, c.n_groups),
            split_heads(write, c.n_groups),
            hidden,
            scalar_decay=-torch.exp(self.A_log.float()) * dt,
            value_scale=dt,
            scale=1.0,
            initial_state=cached(ctx, "state"),
            output_final_state=ctx.cache is not None,
            cu_seqlens=ctx.cu_seqlens,
            shard=ctx.shard,
        )
        remember(ctx, "state", state)
        skip = self.D.view(c.heads, -1)  # [H, 1] or [H, P]
        y = merge_heads((y + skip * hidden).to(x.dtype))
        return self.out_proj(self.gated(y, gate))

    def gated(self, y: Tensor, gate: Tensor) -> Tensor:
        c = self.config
        if not c.rmsnorm:
            return y * F.silu(gate)
        return self.norm(y, gate, c.n_groups)

    def tensor_parallel_plan(self, ranks: int) -> Plan:
        c = self.config
        groups = 1 if c.n_groups == 1 else whole_per_rank(c.n_groups, ranks, "n_groups")
        heads, inner = whole_per_rank(c.heads, ranks, "the number of heads"), c.inner_size // ranks
        local = {
            "heads": heads,
            "inner_size": inner,
            "n_groups": groups,
            "conv_size": inner + 2 * groups * c.state_size,
        }
        channels, states = (c.inner_size, c.heads), (c.n_groups * c.state_size, c.n_groups)
        parameters = packed(self, [channels, channels, states, states, (c.heads, c.heads)], "in_proj")
        parameters |= packed(self, [channels, states, states], "conv1d")
        parameters |= rows(self, c.heads, "dt_bias", "A_log", "D", "norm")
        spanning = ("norm",) if c.rmsnorm and c.n_groups == 1 else ()
        return Plan({**parameters, **columns(self, "out_proj")}, local, spanning)

    def flops(self, seq_len: int) -> float:
        """Write and read of every head's state (4 operations an entry), and the convolution."""
        c = self.config
        return 4.0 * c.inner_size * c.state_size + 2.0 * c.conv_size * c.conv_kernel

    def no_weight_decay(self) -> set[str]:
        return {"A_log", "D", "dt_bias"}


register(System(Mamba2Config, Mamba2, StateSpaceBlock, StateSpaceBackbone, STATE_SPACE_NAMES))
