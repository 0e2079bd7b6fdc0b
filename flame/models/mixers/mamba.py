"""Mamba: a selective state-space mixer without an MLP beside it (Gu and Dao, 2023)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flame.kernels.selective_scan import ScanInputs, selective_scan, selective_scan_step
from flame.models.block import Block
from flame.models.config import ModelConfig
from flame.models.context import Context
from flame.models.decoder import Backbone
from flame.models.mixers.base import Mixer, cached, remember
from flame.models.modules import Linear, RMSNorm, ShortConvolution
from flame.models.registry import Names, System, register
from flame.models.sharding import Plan, columns, packed, rows, whole_per_rank


@dataclass(kw_only=True)
class MambaConfig(ModelConfig):
    """`intermediate_size` is always expand * hidden_size; `dt_rank` 'auto' is hidden_size / 16, rounded up.

    `residual_in_fp32` keeps the residual stream in fp32 whatever the weights' dtype. The `time_step_*` keys and `rms_norm`
    stand in config files of earlier releases of the reference; as there, they change nothing.
    """

    model_type: ClassVar[str] = "mamba"

    num_hidden_layers: int = 48
    norm_eps: float = 1e-5
    pad_token_id: int | None = 0
    state_size: int = 16
    conv_kernel: int = 4
    expand: int | float = 2
    use_bias: bool = False
    use_conv_bias: bool = True
    hidden_act: Literal["swish", "silu", "powlu"] = "silu"
    dt_rank: int | Literal["auto"] = "auto"
    dt_scale: float = 1.0
    dt_min: float = 1e-3
    dt_max: float = 0.1
    dt_init_scheme: Literal["random", "constant"] = "random"
    dt_init_floor: float = 1e-4
    residual_in_fp32: bool = False
    rescale_prenorm_residual: bool = False
    time_step_rank: int | str | None = None
    time_step_scale: float | None = None
    time_step_min: float | None = None
    time_step_max: float | None = None
    time_step_init_scheme: str | None = None
    time_step_floor: float | None = None
    rms_norm: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_state_space(self)
        self.require(self.attn is None, "attn", "is not an option here; use layer_types for a hybrid")
        self.require(self.attnres_block_size is None, "attnres_block_size", "needs blocks with an MLP")

    @property
    def inner_size(self) -> int:
        return int(self.expand * self.hidden_size)

    @property
    def step_rank(self) -> int:
        return math.ceil(self.hidden_size / 16) if self.dt_rank == "auto" else self.dt_rank


def check_state_space(config: Any) -> None:
    """What Mamba, Mamba-2 and Samba configs share."""
    given = config.intermediate_size
    config.require(
        given in (None, config.inner_size), "intermediate_size", f"must be expand * hidden_size = {config.inner_size}"
    )
    config.require(config.hidden_act != "powlu", "hidden_act", "must be silu here")


class StateSpaceConvolution(ShortConvolution):
    """Short convolution that starts as torch's Conv1d does: uniform within 1 / sqrt(W)."""

    def reset_parameters(self) -> None:
        bound = self.weight.shape[-1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)


class Mamba(Mixer):
    """Convolution, input-dependent diagonal state space over `state_size` states a channel, SiLU gate."""

    config_class: ClassVar[type[ModelConfig]] = MambaConfig
    context_parallel = True

    def __init__(self, config: ModelConfig | None = None, layer_idx: int = 0, **options: Any) -> None:
        super().__init__(config, layer_idx, **options)
        c = self.config
        dim, inner, std = c.hidden_size, c.inner_size, c.initializer_range
        self.in_proj = Linear(dim, 2 * inner, bias=c.use_bias, std=std)
        self.conv1d = StateSpaceConvolution(inner, c.conv_kernel, bias=c.use_conv_bias)
        self.x_proj = Linear(inner, c.step_rank + 2 * c.state_size, std=std)
        self.dt_proj = Linear(c.step_rank, inner, bias=True, std=std)
        self.A_log = nn.Parameter(torch.empty(inner, c.state_size))
        self.D = nn.Parameter(torch.empty(inner))
        self.out_proj = Linear(inner, dim, bias=c.use_bias, std=std)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        c = self.config
        bound = c.step_rank**-0.5 * c.dt_scale
        if c.dt_init_scheme == "constant":
            nn.init.constant_(self.dt_proj.weight, bound)
        else:
            nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        init_step_bias(self.dt_proj.bias, c.dt_min, c.dt_max, c.dt_init_floor)
        with torch.no_grad():
            self.A_log.copy_(torch.arange(1, c.state_size + 1, dtype=torch.float32).log().expand_as(self.A_log))
        nn.init.ones_(self.D)
        if c.rescale_prenorm_residual:
            rescaled_output_(self.out_proj.weight, c.num_hidden_layers)

    def mix(self, x: Tensor, ctx: Context) -> Tensor:
        c = self.config
        hidden, gate = self.in_proj(x).chunk(2, -1)
        hidden = self.conv1d(hidden, ctx, "conv")
        step, b, read = self.sum_over_ranks(self.x_proj(hidden)).split([c.step_rank, c.state_size, c.state_size], -1)
        # The bias of dt_proj is added inside the scan, in fp32.
        inputs = ScanInputs(
            x=hidden,
            dt=F.linear(step, self.dt_proj.weight),
            A=-torch.exp(self.A_log.float()),
            B=b,
            C=read,
            D=self.D,
            z=gate,
            dt_bias=self.dt_proj.bias,
            initial_state=cached(ctx, "state"),
            cu_seqlens=ctx.cu_seqlens,
        )
        return self.out_proj(self.scan(inputs, ctx))

    def scan(self, inputs: ScanInputs, ctx: Context) -> Tensor:
        if inputs.initial_state is not None and inputs.x.shape[1] == 1 and not torch.is_grad_enabled():
            y, state = selective_scan_step(inputs)
            remember(ctx, "state", state)
            return y
        y, final = selective_scan(**vars(inputs), output_final_state=ctx.cache is not None, shard=ctx.shard)
        remember(ctx, "state", final)
        return y

    def tensor_parallel_plan(self, ranks: int) -> Plan:
        inner = self.config.inner_size
        whole_per_rank(inner, ranks, "the number of channels (expand * hidden_size)")
        channels = rows(self, ranks, "conv1d", "dt_proj", "A_log", "D")
        both = packed(self, [(inner, ranks), (inner, ranks)], "in_proj")
        return Plan({**channels, **both, **columns(self, "x_proj", "out_proj")})

    def flops(self, seq_len: int) -> float:
        """Decay, input, update and read of every state (about 6 operations), and the convolution."""
        c = self.config
        return c.inner_size * (6.0 * c.state_size + 2.0 * c.conv_kernel)

    def no_weight_decay(self) -> set[str]:
        return {"A_log", "D"}


@torch.no_grad()
def init_step_bias(bias: Tensor, low: float, high: float, floor: float) -> None:
    """Inverse softplus of step sizes drawn log-uniformly from [low, high] and kept above `floor`."""
    step = torch.empty_like(bias, dtype=torch.float32).uniform_(math.log(low), math.log(high)).exp().clamp_(min=floor)
    bias.copy_(step + torch.log(-torch.expm1(-step)))


@torch.no_grad()
def rescaled_output_(weight: Tensor, num_layers: int) -> None:
    """Kaiming-uniform output projection divided by sqrt(L), so that the residual stream does not grow with depth."""
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    weight.div_(math.sqrt(num_layers))


class StateSpaceBlock(Block):
    """`x = x + mixer(norm(x))`, with no MLP; `residual_in_fp32` keeps the stream in fp32."""

    def __init__(self, config: Any, layer_idx: int, mixer: Mixer, names: Names) -> None:
        nn.Module.__init__(self)
        self.layer_idx, self.names = layer_idx, names
        self.residual_in_fp32 = config.residual_in_fp32
        self.add_module(names.mixer_norm, RMSNorm(config.hidden_size, config.norm_eps))
        self.add_module(names.mixer, mixer)

    def forward(self, x: Tensor, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        normed = getattr(self, self.names.mixer_norm)(x)
        if not self.residual_in_fp32:
            return x + self.token_mixer(normed, ctx), ctx.carried
        return x.float() + self.token_mixer(normed.to(weight_dtype(self.token_mixer)), ctx).float(), ctx.carried


def weight_dtype(module: nn.Module) -> torch.dtype:
    """The dtype that a mixer computes in: its matrices', whatever its norms and gates are kept in."""
    return next(part.weight.dtype for part in module.modules() if isinstance(part, nn.Linear))


class StateSpaceBackbone(Backbone):
    """A padding token trains like any other here."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.embeddings.padding_idx = None


STATE_SPACE_NAMES = Names(backbone="backbone", final_norm="norm_f", mixer="mixer", mixer_norm="norm")

register(System(MambaConfig, Mamba, StateSpaceBlock, StateSpaceBackbone, STATE_SPACE_NAMES))
