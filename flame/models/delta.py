"""What the delta-rule mixers share: head counts, the softplus decay gate, projections followed by short convolutions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flame.models.config import ModelConfig
from flame.models.context import Context
from flame.models.mixers.base import Mixer
from flame.models.modules import GatedRMSNorm, Linear, RMSNorm, ShortConvolution
from flame.models.sharding import Plan, columns, rows, shared_per_rank, whole_per_rank

STEP_RANGE = (1e-3, 1e-1)  # initial step sizes of the decay gate
STEP_FLOOR = 1e-4


@dataclass(kw_only=True)
class DeltaHeadsConfig(ModelConfig):
    """Heads of `head_dim` key channels and head_dim * expand_v value channels."""

    attn_mode: str = "chunk"  # a kernel choice of the reference; changes nothing here
    hidden_size: int = 2048
    num_hidden_layers: int = 21
    head_dim: int = 256
    num_heads: int = 6
    expand_v: float = 2.0
    use_short_conv: bool = True
    conv_size: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("head_dim", "num_heads", "conv_size"):
            self.require(getattr(self, name) > 0, name, "must be positive")
        whole = self.head_dim * self.expand_v
        self.require(
            self.value_head_dim > 0 and abs(whole - self.value_head_dim) <= 1e-5 * whole,
            "expand_v",
            f"times head_dim = {self.head_dim} is not whole",
        )
        self.require(
            self.value_heads % self.num_heads == 0, "num_v_heads", f"is no multiple of num_heads = {self.num_heads}"
        )

    @property
    def value_heads(self) -> int:
        return getattr(self, "num_v_heads", None) or self.num_heads

    @property
    def value_head_dim(self) -> int:
        return round(self.head_dim * self.expand_v)

    @property
    def key_dim(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def value_dim(self) -> int:
        return self.value_heads * self.value_head_dim

    def state_flops(self, steps: int, decay: bool) -> float:
        """Per token: 4 operations an entry of every state for each write, 2 for the read, 1 for the decay."""
        return (4.0 * steps + 2.0 + decay) * self.value_heads * self.head_dim * self.value_head_dim


@torch.no_grad()
def init_decay(A_log: Tensor, dt_bias: Tensor, low: float = 0.0, high: float = 16.0) -> None:
    """A uniform in (low, high); dt_bias the inverse softplus of steps drawn log-uniformly from `STEP_RANGE`."""
    A_log.uniform_(low, high).clamp_(min=1e-6).log_()
    low, high = (math.log(step) for step in STEP_RANGE)
    step = torch.empty_like(dt_bias, dtype=torch.float32).uniform_(low, high).exp().clamp_(min=STEP_FLOOR)
    dt_bias.copy_(step + torch.log(-torch.expm1(-step)))


def log_decay(raw: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
    """-exp(A_log) softplus(raw + dt_bias) in fp32; the two parameters broadcast against raw [..., H] or [..., H, K]."""
    return -A_log.float().exp() * F.softplus(raw.float() + dt_bias.float())


def write_strength(raw: Tensor, doubled: bool) -> Tensor:
    """sigmoid in fp32, doubled to (0, 2) where negative eigenvalues of the transition are allowed."""
    beta = raw.float().sigmoid()
    return 2.0 * beta if doubled else beta


class DeltaMixer(Mixer):
    """Projections named q, k, v, each followed by a short convolution with SiLU, or by SiLU alone without one."""

    def add_projections(self, **widths: int) -> None:
        """`{name}_proj` and, if the config wants them, `{name}_conv1d` of the given widths."""
        c = self.config
        for name, width in widths.items():
            self.add_module(f"{name}_proj", Linear(c.hidden_size, width, std=c.initializer_range))
        if c.use_short_conv:
            for name, width in widths.items():
                self.add_module(f"{name}_conv1d", ShortConvolution(width, c.conv_size, std=c.initializer_range))

    def add_output(self, gated: bool, activation: str = "silu") -> None:
        """`o_norm` over a head's value channels, gated by `g_proj` if asked, and `o_proj`."""
        c = self.config
        if gated:
            self.g_proj: nn.Module = Linear(c.hidden_size, c.value_dim, std=c.initializer_range)
            self.o_norm: nn.Module = GatedRMSNorm(c.value_head_dim, c.norm_eps, activation=activation)
        else:
            self.o_norm = RMSNorm(c.value_head_dim, c.norm_eps)
        self.o_proj = Linear(c.value_dim, c.hidden_size, std=c.initializer_range)

    def plan_by_heads(self, ranks: int, key_heads: Sequence[str] = (), value_heads: Sequence[str] = ()) -> Plan:
        """Value heads dealt to ranks, with the query and key heads that they read; the names are a subclass's own."""
        c = self.config
        local = {
            "num_heads": shared_per_rank(c.num_heads, ranks, "num_heads"),
            "value_heads": whole_per_rank(c.value_heads, ranks, "the number of value heads"),
        }
        keys = rows(self, c.num_heads, "q_proj", "k_proj", "q_conv1d", "k_conv1d", *key_heads)
        values = rows(self, c.value_heads, "v_proj", "v_conv1d", "g_proj", *value_heads)
        return Plan({**keys, **values, **columns(self, "o_proj")}, local)

    def project(self, name: str, x: Tensor, ctx: Context) -> Tensor:
        """[B, T, D] -> [B, T, channels of `name`]."""
        return self.convolve(name, getattr(self, f"{name}_proj")(x), ctx)

    def convolve(self, name: str, projected: Tensor, ctx: Context) -> Tensor:
        """The convolution of `name`, or SiLU alone."""
        if not self.config.use_short_conv:
            return F.silu(projected)
        return getattr(self, f"{name}_conv1d")(projected, ctx, f"{name}_conv")

    def output(self, o: Tensor, x: Tensor) -> Tensor:
        """Norm, gate and output projection of the heads o [B, T, H, V]; x is the mixer's input."""
        return self.gated_output(o, self.g_proj(x) if hasattr(self, "g_proj") else None)

    def gated_output(self, o: Tensor, gate: Tensor | None) -> Tensor:
        """The same with the gate [B, T, H * V] before its activation, or None for no gate."""
        if gate is not None:
            o = self.o_norm(o, gate.unflatten(-1, o.shape[-2:]))
        else:
            o = self.o_norm(o)
        return self.o_proj(o.flatten(-2))
