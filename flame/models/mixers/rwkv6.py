"""RWKV-6 (Finch): vector-decay linear attention with data-dependent token shift and a bonus for the current token.

Peng et al., "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence", 2024.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flame.kernels.linear_attention import linear_attention
from flame.kernels.token_shift import token_shift
from flame.models.block import Block
from flame.models.config import ModelConfig
from flame.models.context import Context
from flame.models.decoder import Backbone
from flame.models.feature_maps import ACTIVATIONS
from flame.models.heads import ScaledWidths
from flame.models.mixers.base import Mixer, cached, merge_heads, remember, split_heads
from flame.models.modules import GroupNorm, LayerNorm, Linear
from flame.models.registry import Names, System, register
from flame.models.sharding import Plan, TensorParallel, columns, rows, whole_per_rank

GAIN = 2**-2.5
STREAMS = 5  # receptance, decay, key, value, gate: the order of x_proj and x_bias


@dataclass(kw_only=True)
class RWKV6Config(ScaledWidths):
    """`proj_low_rank_dim` is the rank of each token-shift mix, `gate_low_rank_dim` that of the decay."""

    model_type: ClassVar[str] = "rwkv6"

    hidden_ratio: int | float | None = 3.5
    hidden_act: Literal["swish", "silu", "powlu", "sqrelu", "relu", "gelu", "sigmoid"] = "sqrelu"  # type: ignore[assignment]
    norm_eps: float = 1e-5
    attn_mode: str = "chunk"
    expand_k: float = 0.5
    expand_v: float = 1.0
    num_heads: int = 4
    proj_low_rank_dim: int = 32
    gate_low_rank_dim: int = 64
    norm_first: bool = True
    norm_bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.attnres_block_size is None, "attnres_block_size", "does not exist for RWKV-6 blocks")
        self.require(self.hidden_act != "powlu", "hidden_act", "is not an activation of the channel mix")

    def derive(self, cls: type[ModelConfig], options: Mapping[str, Any]) -> ModelConfig:
        """As everywhere, but the channel mix's activation is no business of other systems' layers."""
        return super().derive(cls, {"hidden_act": "swish", **options})

    @property
    def mlp_size(self) -> int:
        """Width of the channel mix: `intermediate_size`, or hidden_size * hidden_ratio rounded up to 32."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        width = int(self.hidden_size * (3.5 if self.hidden_ratio is None else self.hidden_ratio))
        return 32 * ((width + 31) // 32)


class XavierLinear(Linear):
    """Linear with Xavier-uniform weights of gain 2^-2.5."""

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight, gain=GAIN)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class ShiftedLinear(nn.Module):
    """`linear(x + shift * mu)`: a projection of a fixed mix of each token with the one before it."""

    def __init__(self, dim: int, linear: Linear) -> None:
        super().__init__()
        self.linear = linear
        self.mu = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.mu)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return self.linear(x + shift * self.mu)


class MixedLinear(nn.Module):
    """`linear(x)` under the name the reference gives to projections of data-dependently mixed inputs."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class DecayProjection(nn.Module):
    """`C2 tanh(C1 x) + c`, low rank; starts as zero, so that every channel's log decay starts at -1."""

    def __init__(self, dim: int, rank: int, out_dim: int) -> None:
        super().__init__()
        self.lora = nn.Sequential(Linear(dim, rank), nn.Tanh(), Linear(rank, out_dim, bias=True))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        first, last = self.lora[0], self.lora[2]
        nn.init.zeros_(first.weight)
        rows, columns = last.weight.shape
        nn.init.orthogonal_(last.weight, gain=0.1 * max(1.0, (columns / rows) ** 0.5))
        nn.init.zeros_(last.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.lora(x)


class RWKV6Attention(Mixer):
    """`o_t = (S_{t-1} + diag(u) k_t v_t^T)^T r_t`, `S_t = diag(exp(w_t)) S_{t-1} + k_t v_t^T`, `w_t = -exp(.)`."""

    config_class = RWKV6Config
    context_parallel = True

    def __init__(self, config: RWKV6Config | None = None, layer_idx: int = 0, **options: Any) -> None:
        super().__init__(config, layer_idx, **options)
        c = self.config
        dim, rank = c.hidden_size, c.proj_low_rank_dim
        self.x_proj = nn.Sequential(
            ShiftedLinear(dim, XavierLinear(dim, STREAMS * rank)), nn.Tanh(), XavierLinear(STREAMS * rank, dim)
        )
        self.x_bias = nn.Parameter(torch.empty(STREAMS, dim))
        self.r_proj = MixedLinear(XavierLinear(dim, c.key_dim))
        self.w_proj = MixedLinear(DecayProjection(dim, c.gate_low_rank_dim, c.key_dim))
        self.k_proj = MixedLinear(XavierLinear(dim, c.key_dim))
        self.v_proj = MixedLinear(XavierLinear(dim, c.value_dim))
        self.g_proj = MixedLinear(XavierLinear(dim, c.value_dim))
        self.bonus = nn.Parameter(torch.empty(c.num_heads, c.key_dim // c.num_heads))
        self.g_norm = GroupNorm(c.num_heads, c.value_dim, c.norm_eps)
        self.o_proj = XavierLinear(c.value_dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.x_bias)
        nn.init.zeros_(self.bonus)

    def mix(self, x: Tensor, ctx: Context) -> Tensor:
        heads = self.config.num_heads
        shift, last = token_shift(
            x,
            state=cached(ctx, "shift"),
            output_final_state=ctx.cache is not None,
            cu_seqlens=ctx.cu_seqlens,
            shard=ctx.shard,
        )
        remember(ctx, "shift", last)
        x_r, x_w, x_k, x_v, x_g = self.mixed_inputs(x, shift)
        log_decay = -torch.exp(self.w_proj(x_w).float())
        o, state = linear_attention(
            split_heads(self.r_proj(x_r), heads),
            split_heads(self.k_proj(x_k), heads),
            split_heads(self.v_proj(x_v), heads),
            key_decay=split_heads(log_decay, heads),
            bonus=self.bonus,
            scale=1.0,
            initial_state=cached(ctx, "state"),
            output_final_state=ctx.cache is not None,
            cu_seqlens=ctx.cu_seqlens,
            shard=ctx.shard,
        )
        remember(ctx, "state", state)
        return self.o_proj(self.g_norm(merge_heads(o)) * F.silu(self.g_proj(x_g)))

    def mixed_inputs(self, x: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
        """`x + shift * m_j` for every stream j, with m_j = W2_j z_j + bias_j read off the token itself."""
        z = torch.tanh(self.x_proj[0](x, shift)).unflatten(-1, (STREAMS, -1))  # [B, T, 5, rank]
        weight = self.x_proj[2].weight.unflatten(1, (STREAMS, -1))  # [D, 5, rank]
        return tuple(x + shift * (F.linear(z[:, :, j], weight[:, j]) + self.x_bias[j]) for j in range(STREAMS))

    def tensor_parallel_plan(self, ranks: int) -> Plan:
        c = self.config
        local = {"num_heads": whole_per_rank(c.num_heads, ranks, "num_heads")}
        names = ("r_proj", "k_proj", "v_proj", "g_proj", "w_proj.linear.lora.2", "bonus", "g_norm")
        return Plan({**rows(self, c.num_heads, *names), **columns(self, "o_proj")}, local)

    def flops(self, seq_len: int) -> float:
        """Write and read of every head's state: 4 operations an entry."""
        c = self.config
        return 4.0 * c.key_dim * c.value_dim / c.num_heads

    def no_weight_decay(self) -> set[str]:
        return {"x_bias", "bonus"}


class ChannelMix(nn.Module):
    """RWKV's feed-forward: `sigmoid(R(x_r)) * V(act(K(x_k)))` with fixed token-shift mixes."""

    def __init__(self, config: RWKV6Config) -> None:
        super().__init__()
        dim, width, std = config.hidden_size, config.mlp_size, config.initializer_range
        self.activation = config.hidden_act
        self.ranks: TensorParallel | None = None
        self.key = ShiftedLinear(dim, Linear(dim, width, std=std))
        self.value = Linear(width, dim, std=std)
        self.receptance = ShiftedLinear(dim, Linear(dim, dim, std=std))

    def tensor_parallel_plan(self, ranks: int) -> Plan:
        whole_per_rank(self.value.in_features, ranks, "the width of the channel mix (model.intermediate_size)")
        return Plan({**rows(self, ranks, "key.linear"), **columns(self, "value")})

    def split(self, ranks: TensorParallel, plan: Plan | None) -> None:
        self.ranks = ranks

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        own, ranks = x, self.ranks
        if ranks is not None:
            assert ctx.positions is not None
            x = ranks.gather(x, len(ctx.positions))
        shift, last = token_shift(
            x,
            state=cached(ctx, "ffn_shift"),
            output_final_state=ctx.cache is not None,
            cu_seqlens=ctx.cu_seqlens,
            shard=ctx.shard,
        )
        remember(ctx, "ffn_shift", last)
        out = self.value(ACTIVATIONS[self.activation](self.key(x, shift)))
        if ranks is not None:  # the gate needs a rank's own tokens only
            out, shift = ranks.scatter(out), ranks.own_tokens(shift)
        return torch.sigmoid(self.receptance(own, shift)) * out


class RWKV6Block(Block):
    """Pre-norm block of LayerNorms around the mixer and the channel mix; the first also norms the stream itself."""

    def __init__(self, config: RWKV6Config, layer_idx: int, mixer: Mixer, names: Names) -> None:
        nn.Module.__init__(self)
        self.layer_idx, self.names = layer_idx, names
        dim, eps, bias = config.hidden_size, config.norm_eps, config.norm_bias
        if config.norm_first and layer_idx == 0:
            self.pre_norm = LayerNorm(dim, eps, bias)
        self.add_module(names.mixer_norm, LayerNorm(dim, eps, bias))
        self.add_module(names.mixer, mixer)
        self.add_module(names.mlp_norm, LayerNorm(dim, eps, bias))
        self.add_module(names.mlp, ChannelMix(config))

    def forward(self, x: Tensor, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        if hasattr(self, "pre_norm"):
            x = self.pre_norm(x)
        mixer_norm, mlp_norm = getattr(self, self.names.mixer_norm), getattr(self, self.names.mlp_norm)
        normed, x = mlp_norm.add(self.token_mixer(mixer_norm(x), ctx), x)
        return x + getattr(self, self.names.mlp)(normed, ctx), ctx.carried


class LayerNormBackbone(Backbone):
    def build_norm(self) -> nn.Module:
        config: Any = self.config
        return LayerNorm(config.hidden_size, config.norm_eps, config.norm_bias)


register(
    System(
        RWKV6Config,
        RWKV6Attention,
        block=RWKV6Block,
        backbone=LayerNormBackbone,
        names=Names(mlp_norm="ffn_norm", mlp="ffn"),
    )
)
