"""MesaNet: every token reads a regularised least-squares fit of the values to the keys so far (2506.05233)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flame.kernels.mesa import mesa
from flame.models.config import ModelConfig
from flame.models.context import Context
from flame.models.delta import DeltaMixer
from flame.models.mixers.base import cached, remember, split_heads
from flame.models.modules import Linear, ShortConvolution
from flame.models.registry import System, register
from flame.models.sharding import Plan, columns, rows, whole_per_rank


@dataclass(kw_only=True)
class MesaNetConfig(ModelConfig):
    """max_cg_step_* are the solver's steps on sequences and on single cached tokens; use_short_conv changes nothing.
    scale_solver_gradient keeps small gradients from vanishing in the solver (see `flame.kernels.mesa`); the reference, and so
    the default, does not."""

    model_type: ClassVar[str] = "mesa_net"

    attn_mode: str = "chunk"
    num_heads: int = 16
    head_dim: int = 128
    use_output_gate: bool = False
    use_short_conv: bool = True
    conv_size: int = 4
    lambda_lower_bound: float = 0.25
    max_cg_step_training: int = 30
    max_cg_step_decoding: int = 30
    scale_solver_gradient: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 <= self.lambda_lower_bound < 1, "lambda_lower_bound", "must lie in [0, 1)")
        for name in ("num_heads", "head_dim", "max_cg_step_training", "max_cg_step_decoding"):
            self.require(getattr(self, name) > 0, name, "must be positive")

    @property
    def value_dim(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def value_head_dim(self) -> int:
        return self.head_dim


class MesaNet(DeltaMixer):
    """o_t = G_t^T (H_t + diag(lambda))^-1 q_t, with H and G the decayed sums of beta k k^T and beta k v^T."""

    config_class = MesaNetConfig
    context_parallel = True

    def __init__(self, config: MesaNetConfig | None = None, layer_idx: int = 0, **options: Any) -> None:
        super().__init__(config, layer_idx, **options)
        c, std, width = self.config, self.config.initializer_range, self.config.value_dim
        for name in ("q", "k", "v"):
            self.add_module(f"{name}_proj", Linear(c.hidden_size, width, std=std))
        self.a_proj = Linear(c.hidden_size, c.num_heads, bias=True, std=std)
        self.b_proj = Linear(c.hidden_size, c.num_heads, bias=True, std=std)
        self.lambda_params = nn.Parameter(torch.empty(width))
        self.q_conv1d = ShortConvolution(width, c.conv_size, std=std)
        self.k_conv1d = ShortConvolution(width, c.conv_size, std=std)
        self.add_output(c.use_output_gate)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """lambda = 1."""
        nn.init.constant_(self.lambda_params, math.log(math.expm1(1 - self.config.lambda_lower_bound)))

    def mix(self, x: Tensor, ctx: Context) -> Tensor:
        c = self.config
        q, k = self.q_conv1d(self.q_proj(x), ctx, "q_conv"), self.k_conv1d(self.k_proj(x), ctx, "k_conv")
        decoding = ctx.cache is not None and x.shape[1] == 1
        o, states = mesa(
            split_heads(q, c.num_heads),
            split_heads(k, c.num_heads),
            split_heads(self.v_proj(x), c.num_heads),
            F.logsigmoid(self.a_proj(x).float()),
            self.b_proj(x).float().sigmoid(),
            (F.softplus(self.lambda_params.float()) + c.lambda_lower_bound).view(c.num_heads, c.head_dim),
            steps=c.max_cg_step_decoding if decoding else c.max_cg_step_training,
            key_state=cached(ctx, "key_state"),
            value_state=cached(ctx, "value_state"),
            output_final_state=ctx.cache is not None,
            cu_seqlens=ctx.cu_seqlens,
            scale_gradient=c.scale_solver_gradient,
            normalize=True,
            shard=ctx.shard,
        )
        if states is not None:
            remember(ctx, "key_state", states[0])
            remember(ctx, "value_state", states[1])
        return self.output(o, x)

    def tensor_parallel_plan(self, ranks: int) -> Plan:
        c = self.config
        local = {"num_heads": whole_per_rank(c.num_heads, ranks, "num_heads")}
        names = ("q_proj", "k_proj", "v_proj", "a_proj", "b_proj", "g_proj", "q_conv1d", "k_conv1d", "lambda_params")
        return Plan({**rows(self, c.num_heads, *names), **columns(self, "o_proj")}, local)

    def flops(self, seq_len: int) -> float:
        """Decay and write of both states, one product with H a solver step, one read of G."""
        c = self.config
        return (2 * 3.0 + 2.0 * c.max_cg_step_training + 2.0) * c.num_heads * c.head_dim**2


register(System(MesaNetConfig, MesaNet))
