"""Rodimus and Rodimus+: one wide gated linear-attention head, alone or beside shared-key window attention (He et al., 2024)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flame.kernels.linear_attention import linear_attention
from flame.kernels.normalization import l2_norm
from flame.kernels.rotary import rotary
from flame.kernels.softmax_attention import softmax_attention
from flame.models.block import Block
from flame.models.config import AttentionLayers, ModelConfig
from flame.models.context import Context
from flame.models.mixers.base import Mixer, cached, merge_heads, remember, split_heads
from flame.models.mixers.mamba import init_step_bias, weight_dtype
from flame.models.mixers.transformer import Attention, TransformerConfig
from flame.models.modules import GatedMLP, GatedRMSNorm, Linear, RMSNorm, ShortConvolution
from flame.models.registry import Names, System, register
from flame.models.sharding import Plan, columns, rows, whole_per_rank

GAIN = 2**-2.5


@dataclass
class SharedKeyOptions:
    """Window attention of Rodimus+, whose heads share one key. `head_dim` follows from `num_heads`."""

    num_heads: int
    qkv_bias: bool = False
    qk_norm: bool = False
    window_size: int | None = 1024
    rope_theta: float = 10000.0
    head_dim: int | None = None


@dataclass
class HybridLayers(AttentionLayers):
    """`attn` entry as the reference writes it for Rodimus: its `qk_norm` changes nothing."""

    qk_norm: bool = False

    def mixer_options(self) -> dict[str, Any]:
        options = super().mixer_options()
        del options["qk_norm"]
        return options


@dataclass(kw_only=True)
class RodimusConfig(ModelConfig):
    """`expand_ratio` is the key size of the single head. `ska_attn` None gives Rodimus+ heads of 128 channels.

    `block_residual_in_fp32` keeps the residual stream in fp32; the mixer's own skip (`residual_in_fp32`) always is.
    """

    model_type: ClassVar[str] = "rodimus"

    vocab_size: int = 126464
    hidden_ratio: int | float | None = 4 / 3
    norm_eps: float = 1e-5
    tie_word_embeddings: bool = True
    attn: HybridLayers | list[HybridLayers] | None = None  # type: ignore[assignment]
    bos_token_id: int | None = 126080
    eos_token_id: int | None = 126081
    block_type: Literal["rodimus", "rodimus_plus"] = "rodimus_plus"
    attn_mode: str = "chunk"
    residual_in_fp32: bool = True
    block_residual_in_fp32: bool = False
    expand_ratio: int = 64
    input_gate_low_rank: int | Literal["auto"] = "auto"
    use_short_conv: bool = True
    conv_size: int = 4
    k_norm_eps: float | None = None
    ska_attn: SharedKeyOptions | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.attnres_block_size is None, "attnres_block_size", "does not exist for Rodimus blocks")
        self.require(self.use_short_conv, "use_short_conv", "must be true: the gates read the convolved tokens")
        heads, head_dim = self.shared_key.num_heads, self.shared_key.head_dim
        self.require(self.hidden_size % heads == 0, "ska_attn", "has heads that are not whole")
        self.require(head_dim in (None, self.hidden_size // heads), "ska_attn", "has a head_dim that does not fit")

    @property
    def shared_key(self) -> SharedKeyOptions:
        return self.ska_attn or SharedKeyOptions(num_heads=max(1, self.hidden_size // 128))

    @property
    def inner_size(self) -> int:
        return 8 * ((2 * self.hidden_size + 7) // 8)

    @property
    def gate_rank(self) -> int:
        return max(self.hidden_size // 64, 16) if self.input_gate_low_rank == "auto" else self.input_gate_low_rank

    @property
    def mlp_size(self) -> int:
        """`intermediate_size`, or hidden_size * hidden_ratio rounded up to 8."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        return 8 * ((int(self.hidden_size * (4 if self.hidden_ratio is None else self.hidden_ratio)) + 7) // 8)


class GateLinear(Linear):
    """Linear with Xavier-uniform weights of gain 2^-2.5 and zero bias."""

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight, gain=GAIN)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Rodimus(Mixer):
    """`S_t = diag(exp(-g tau)) S_{t-1} + (k_t g^tau) v_t^T` with a temperature tau that ties both gates."""

    config_class = RodimusConfig
    context_parallel = True

    def __init__(self, config: RodimusConfig | None = None, layer_idx: int = 0, **options: Any) -> None:
        super().__init__(config, layer_idx, **options)
        c = self.config
        dim, inner, keys, std = c.hidden_size, c.inner_size, c.expand_ratio, c.initializer_range
        self.gate_proj = Linear(dim, inner, std=std)
        self.up_proj = Linear(dim, inner, std=std)
        self.activation_norm = GatedRMSNorm(inner, c.norm_eps, gate_first=True)
        self.down_proj = Linear(inner, dim, std=std)
        self.short_conv = ShortConvolution(inner, c.conv_size, bias=True, std=std)
        self.residual_weight = nn.Parameter(torch.empty(inner))
        self.k_proj = Linear(inner, keys, std=std)
        self.q_proj = Linear(inner, keys, std=std)
        self.g_gate_proj = GateLinear(inner, keys, bias=True)
        self.tau_gate_proj = GateLinear(inner, keys, bias=True)
        self.i_gate_proj = nn.Sequential(GateLinear(inner, c.gate_rank), GateLinear(c.gate_rank, inner, bias=True))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.residual_weight)
        init_step_bias(self.g_gate_proj.bias, 1e-3, 0.1, 1e-4)
        with torch.no_grad():
            share = torch.empty_like(self.tau_gate_proj.bias, dtype=torch.float32).uniform_(1 / 16, 0.9)
            self.tau_gate_proj.bias.copy_(torch.logit(share))

    def mix(self, x: Tensor, ctx: Context) -> Tensor:
        c = self.config
        u = self.up_proj(x)
        y = self.short_conv(u, ctx, "conv")
        log_decay, amount = self.key_gates(y)
        k = (
            l2_norm(self.sum_over_ranks(self.k_proj(y)).float(), 1e-12 if c.k_norm_eps is None else c.k_norm_eps)
            * amount
        )
        v = torch.sigmoid(self.i_gate_proj[1](self.sum_over_ranks(self.i_gate_proj[0](u)))) * u
        o, state = linear_attention(
            self.sum_over_ranks(self.q_proj(y))[:, :, None],
            k.to(v.dtype)[:, :, None],
            v[:, :, None],
            key_decay=log_decay[:, :, None],
            initial_state=cached(ctx, "state"),
            output_final_state=ctx.cache is not None,
            cu_seqlens=ctx.cu_seqlens,
            shard=ctx.shard,
        )
        remember(ctx, "state", state)
        mixed = (o[:, :, 0] + y.float() * self.residual_weight.float()).to(x.dtype)
        gate = self.gate_proj(x)
        return self.down_proj(self.activation_norm(mixed, gate))

    def key_gates(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Log decay `-g tau` and input gate `g^tau`, `[B, T, K]` fp32, with g = softplus and tau = sigmoid of y's maps."""
        logit = self.sum_over_ranks(F.linear(y, self.g_gate_proj.weight)).float() + self.g_gate_proj.bias.float()
        share = self.sum_over_ranks(F.linear(y, self.tau_gate_proj.weight)).float()
        tau = torch.sigmoid(share + self.tau_gate_proj.bias.float())
        g = F.softplus(logit)
        # log(softplus(z)) is z once exp(z) is tiny; the logarithm of an underflowed g would have no gradient.
        log_g = torch.where(logit < -15, logit, F.softplus(logit.clamp(min=-15)).log())
        return -g * tau, torch.exp(tau * log_g)

    def tensor_parallel_plan(self, ranks: int) -> Plan:
        whole_per_rank(self.config.inner_size, ranks, "the number of channels")
        names = ("gate_proj", "up_proj", "activation_norm", "short_conv", "residual_weight", "i_gate_proj.1")
        read = columns(
            self, "k_proj", "q_proj", "g_gate_proj.weight", "tau_gate_proj.weight", "i_gate_proj.0", "down_proj"
        )
        return Plan({**rows(self, ranks, *names), **read}, spanning=("activation_norm",))

    def flops(self, seq_len: int) -> float:
        """Write and read of the state (4 operations an entry), the convolution, and the window attention beside it."""
        c = self.config
        own = 4.0 * c.expand_ratio * c.inner_size + 2.0 * c.inner_size * c.conv_size
        if c.block_type == "rodimus":
            return own
        window = min(c.shared_key.window_size or seq_len, seq_len)
        return own + 4.0 * c.hidden_size * window * (1 - (window - 1) / (2 * seq_len))


class SharedKeyAttention(Attention):
    """Window attention with one key for all heads and a value for each."""

    def __init__(self, config: TransformerConfig | None = None, layer_idx: int = 0, **options: Any) -> None:
        super().__init__(config, layer_idx, **options)
        c = self.config
        self.v_proj = Linear(c.hidden_size, c.hidden_size, bias=c.qkv_bias, std=c.initializer_range)

    def tensor_parallel_plan(self, ranks: int) -> Plan:
        plan = super().tensor_parallel_plan(ranks)
        return replace(plan, parameters={**plan.parameters, **rows(self, self.config.num_heads, "v_proj")})

    def mix(self, x: Tensor, ctx: Context) -> Tensor:
        c = self.config
        q, k = split_heads(self.q_proj(x), c.num_heads), self.k_proj(x)[:, :, None]
        v = split_heads(self.v_proj(x), c.num_heads)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotary(q, ctx.positions, c.rope_theta), rotary(k, ctx.positions, c.rope_theta)
        k, v = self.with_cached(k, v, ctx)
        o = softmax_attention(
            q,
            k,
            v,
            scale=c.head_dim**-0.5,
            window=c.window_size,
            cu_seqlens=ctx.cu_seqlens,
            shard=ctx.shard,
            max_seqlen=ctx.max_seqlen,
        )
        return self.o_proj(merge_heads(o))


class RodimusBlock(Block):
    """`x = x + mixer(norm(x))`; Rodimus+ adds `x = x + mlp(norm(x + attention(norm(x))))`.

    The attention's output reaches the MLP but not the stream. Layers that `attn` gives to softmax attention are plain
    pre-norm blocks.
    """

    def __init__(self, config: RodimusConfig, layer_idx: int, mixer: Mixer, names: Names) -> None:
        native = isinstance(mixer, Rodimus)
        if native:
            nn.Module.__init__(self)
            self.layer_idx, self.names = layer_idx, names
            self.mixer_norm = RMSNorm(config.hidden_size, config.norm_eps)
            self.mixer = mixer
        else:
            super().__init__(config, layer_idx, mixer, Names())
        self.native, self.plus = native, native and config.block_type == "rodimus_plus"
        self.fp32_stream = config.block_residual_in_fp32
        if self.plus:
            self.add_window_attention(config)

    def add_window_attention(self, config: RodimusConfig) -> None:
        options = {key: value for key, value in vars(config.shared_key).items() if key != "head_dim"}
        attention = config.derive(TransformerConfig, {**options, "num_kv_heads": 1})
        self.ska_attn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.ska_attn = SharedKeyAttention(attention, self.layer_idx)  # type: ignore[arg-type]
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = GatedMLP(config)

    def forward(self, x: Tensor, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        narrow = weight_dtype(self.token_mixer)
        if self.fp32_stream:
            x = x.float()
        if not self.native:
            x = x + self.attn(self.attn_norm(x).to(narrow), ctx)
            return x + self.mlp(self.mlp_norm(x).to(narrow)), ctx.carried
        x = x + self.mixer(self.mixer_norm(x).to(narrow), ctx)
        if self.plus:
            seen = self.ska_attn(self.ska_attn_norm(x).to(narrow), ctx)
            x = x + self.mlp(self.mlp_norm.add(seen.to(x.dtype), x)[0].to(narrow))
        return x, ctx.carried


register(
    System(
        RodimusConfig,
        Rodimus,
        RodimusBlock,
        names=Names(mixer="mixer", mixer_norm="mixer_norm"),
    )
)
