"""RWKV-7 (Goose): a diagonal-plus-rank-one state transition with an in-context learning rate for every channel.

Peng et al., "RWKV-7 Goose with Expressive Dynamic State Evolution", 2503.14456.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flame.kernels.delta_rule import dplr_delta_rule
from flame.kernels.normalization import l2_norm
from flame.kernels.token_shift import token_mix
from flame.models.config import ModelConfig
from flame.models.context import Context
from flame.models.feature_maps import ACTIVATIONS
from flame.models.mixers.base import Mixer, cached, merge_heads, remember, split_heads
from flame.models.mixers.rwkv6 import LayerNormBackbone, RWKV6Block
from flame.models.modules import Embedding, GroupNorm, LayerNorm, Linear
from flame.models.registry import Names, System, register
from flame.models.sharding import Plan, TensorParallel, columns, rows, whole_per_rank

DECAY_RATE = -0.6065306597126334  # -exp(-1/2): the strongest log decay
STREAMS = ("r", "w", "k", "v", "a", "g")


@dataclass(kw_only=True)
class RWKV7Config(ModelConfig):
    """Ranks at None follow the hidden size. num_heads counts only when head_dim is None. value_dim is one number for all
    layers, or a list of equal ones."""

    model_type: ClassVar[str] = "rwkv7"

    hidden_act: Literal["swish", "silu", "powlu", "sqrelu", "relu", "gelu", "sigmoid"] = "sqrelu"  # type: ignore[assignment]
    norm_eps: float = 1e-5
    use_l2warp: bool = True
    attn_mode: str = "chunk"
    head_dim: int | None = 64
    num_heads: int | None = None
    decay_low_rank_dim: int | None = 64
    gate_low_rank_dim: int | None = 128
    a_low_rank_dim: int | None = 64
    v_low_rank_dim: int | None = 16
    norm_first: bool = True
    norm_bias: bool = True
    value_dim: int | list[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.attnres_block_size is None, "attnres_block_size", "does not exist for RWKV-7 blocks")
        self.require(self.hidden_act != "powlu", "hidden_act", "is not an activation of the channel mix")
        key = "num_heads" if self.head_dim is None else "head_dim"
        divisor = getattr(self, key)
        self.require(bool(divisor) and self.hidden_size % divisor == 0, key, "must divide hidden_size")
        sizes = self.value_dim if isinstance(self.value_dim, list) else [self.value_size]
        self.require(
            len(set(sizes)) == 1 and sizes[0] % self.heads == 0, "value_dim", "must be one multiple of the heads"
        )

    def derive(self, cls: type[ModelConfig], options: Mapping[str, Any]) -> ModelConfig:
        """As everywhere, but the channel mix's activation is no business of other systems' layers."""
        return super().derive(cls, {"hidden_act": "swish", **options})

    @property
    def heads(self) -> int:
        return self.hidden_size // self.head_dim if self.head_dim is not None else int(self.num_heads or 1)

    @property
    def key_head_dim(self) -> int:
        return self.hidden_size // self.heads

    @property
    def value_size(self) -> int:
        size = self.value_dim[0] if isinstance(self.value_dim, list) and self.value_dim else self.value_dim
        return self.hidden_size if not isinstance(size, int) else size

    @property
    def mlp_size(self) -> int:
        """Width of the channel mix: `intermediate_size`, or hidden_size * hidden_ratio rounded up to 32."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        width = int(self.hidden_size * (4 if self.hidden_ratio is None else self.hidden_ratio))
        return 32 * ((width + 31) // 32)

    def rank(self, stream: str) -> int:
        """Rank of the low-rank maps of the decay w, the rate a, the value mix v and the gate g."""
        key = {"w": "decay_low_rank_dim", "a": "a_low_rank_dim", "v": "v_low_rank_dim", "g": "gate_low_rank_dim"}[
            stream
        ]
        given = getattr(self, key)
        if given is not None:
            return given
        factor = {"w": 2.5, "a": 2.5, "v": 1.7, "g": 5.0}[stream]
        width = 1.0 if stream == "g" else self.key_head_dim / 64
        return max(32, 32 * round(factor * math.sqrt(self.hidden_size) * width / 32))


class LowRank(nn.Module):
    """`B act(A x) + bias`; A starts at zero and B small and orthogonal, so that the map starts as its bias."""

    def __init__(self, dim: int, rank: int, out_dim: int, activation: nn.Module, bias: bool) -> None:
        super().__init__()
        self.lora = nn.Sequential(Linear(dim, rank), activation, Linear(rank, out_dim, bias=bias))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All but the bias, which is the mixer's to set."""
        first, last = self.lora[0], self.lora[2]
        nn.init.zeros_(first.weight)
        rows, columns = last.weight.shape
        nn.init.orthogonal_(last.weight, gain=0.1 * max(1.0, (columns / rows) ** 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.lora(x)


class RWKV7Attention(Mixer):
    """S_t = diag(exp(w_t)) S_{t-1} - (kappa_t a_t)(kappa_t^T S_{t-1}) + k_t v_t^T, o_t = S_t^T r_t.

    From layer to layer, `ctx.carried["v_first"]` [B, T, value channels] holds the first layer's values, which the others
    mix into their own.
    """

    config_class = RWKV7Config
    context_parallel = True

    def __init__(self, config: RWKV7Config | None = None, layer_idx: int = 0, **options: Any) -> None:
        super().__init__(config, layer_idx, **options)
        c = self.config
        dim, values = c.hidden_size, c.value_size
        for stream in STREAMS:
            self.register_parameter(f"x_{stream}", nn.Parameter(torch.empty(1, 1, dim)))
        self.k_k = nn.Parameter(torch.empty(dim))
        self.k_a = nn.Parameter(torch.empty(dim))
        self.r_k = nn.Parameter(torch.empty(c.heads, c.key_head_dim))
        self.r_proj, self.k_proj = Linear(dim, dim), Linear(dim, dim)
        self.v_proj, self.o_proj = Linear(dim, values), Linear(values, dim)
        self.w_lora = LowRank(dim, c.rank("w"), dim, nn.Tanh(), bias=True)
        if layer_idx > 0:
            self.v_lora = LowRank(dim, c.rank("v"), values, nn.Identity(), bias=True)
        self.a_lora = LowRank(dim, c.rank("a"), dim, nn.Identity(), bias=True)
        self.g_lora = LowRank(dim, c.rank("g"), values, nn.Sigmoid(), bias=False)
        self.g_norm = GroupNorm(c.heads, values, c.key_head_dim * c.norm_eps)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        c, layers = self.config, self.config.num_hidden_layers
        depth, left = self.layer_idx / max(layers - 1, 1), 1 - self.layer_idx / layers
        channel = torch.arange(c.hidden_size, dtype=torch.float32, device=self.k_k.device)
        for stream, power in {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}.items():
            getattr(self, f"x_{stream}").copy_(1 - (channel / c.hidden_size) ** (power * left))
        line = channel / max(c.hidden_size - 1, 1) - 0.5
        middle = max((c.key_head_dim - 1) / 2, 0.5)
        zigzag = (channel % c.key_head_dim - middle) / middle
        zigzag = zigzag * zigzag.abs()
        self.k_k.copy_(0.71 - 0.1 * line)
        nn.init.constant_(self.k_a, 1.02)
        nn.init.constant_(self.r_k, -0.04)
        self.w_lora.lora[2].bias.copy_(-5.5 + 6 * (line + 0.5) ** (1 + depth**0.3) + 2.5 * zigzag)
        self.a_lora.lora[2].bias.copy_(-0.19 + 0.3 * zigzag + 0.4 * line)
        if self.layer_idx > 0:
            values = torch.arange(c.value_size, dtype=torch.float32, device=self.k_k.device)
            self.v_lora.lora[2].bias.copy_(0.73 - 0.4 * (values / max(c.value_size - 1, 1) - 0.5))
        for name, gain in {"r": 1.0, "k": 0.1, "v": 1.0}.items():
            nn.init.orthogonal_(getattr(self, f"{name}_proj").weight, gain=gain)
        nn.init.zeros_(self.o_proj.weight)
        nn.init.constant_(self.g_norm.weight, ((self.layer_idx + 1) / layers) ** 0.7)

    def mix(self, x: Tensor, ctx: Context) -> Tensor:
        heads = self.config.heads
        shares = torch.cat([getattr(self, f"x_{stream}")[0] for stream in STREAMS])  # [6, D]
        (x_r, x_w, x_k, x_v, x_a, x_g), last = token_mix(
            x,
            shares,
            state=cached(ctx, "shift"),
            output_final_state=ctx.cache is not None,
            cu_seqlens=ctx.cu_seqlens,
            shard=ctx.shard,
        )
        remember(ctx, "shift", last)
        r, k, v = self.r_proj(x_r), self.k_proj(x_k), self.mixed_values(x_v, ctx)
        decay = DECAY_RATE * torch.sigmoid(self.w_lora(x_w).float())
        rate = torch.sigmoid(self.a_lora(x_a))
        removal = self.removal_key(k)  # [B, T, H, K]
        k = k + k * (rate - 1) * self.k_a
        r, k, v, rate, decay = (split_heads(y, heads) for y in (r, k, v, rate, decay))
        o, state = dplr_delta_rule(
            r,
            k,
            v,
            -removal,
            removal * rate,
            decay,
            scale=1.0,
            initial_state=cached(ctx, "state"),
            output_final_state=ctx.cache is not None,
            cu_seqlens=ctx.cu_seqlens,
            shard=ctx.shard,
        )
        remember(ctx, "state", state)
        bonus = v * (r * k * self.r_k).sum(-1, keepdim=True)
        return self.o_proj((self.g_norm(merge_heads(o)) + merge_heads(bonus)) * self.g_lora(x_g))

    def mixed_values(self, x: Tensor, ctx: Context) -> Tensor:
        """[B, T, value channels]; the first RWKV-7 layer's own values become `v_first`."""
        v = self.v_proj(x)
        first = ctx.carried.setdefault("v_first", v)
        # Asking for the module, not the index: compiled code that had read the index would hold for one layer only.
        return v + (first - v) * torch.sigmoid(self.v_lora(x)) if hasattr(self, "v_lora") else v

    def removal_key(self, k: Tensor) -> Tensor:
        """Unit vectors [B, T, H, K]. The reference's fused norm adds epsilon under the root, the other bounds the length."""
        scaled = split_heads(k * self.k_k, self.config.heads)
        return l2_norm(scaled) if self.config.fuse_norm else F.normalize(scaled, dim=-1)

    def tensor_parallel_plan(self, ranks: int) -> Plan:
        heads = self.config.heads
        local = {"heads": whole_per_rank(heads, ranks, "the number of heads")}
        maps = [f"{stream}_lora.lora.2" for stream in ("w", "v", "a", "g")]
        names = ("k_k", "k_a", "r_k", "r_proj", "k_proj", "v_proj", "g_norm", *maps)
        return Plan({**rows(self, heads, *names), **columns(self, "o_proj")}, local)

    def flops(self, seq_len: int) -> float:
        """Decay, erase (read and write), write and read of the state: 9 operations an entry."""
        c = self.config
        return 9.0 * c.hidden_size * c.value_size / c.heads

    def no_weight_decay(self) -> set[str]:
        return {*(f"x_{stream}" for stream in STREAMS), "r_k"}


class RWKV7ChannelMix(nn.Module):
    """`V(act(K(x + shift * x_k)))` with squared ReLU."""

    def __init__(self, config: RWKV7Config, layer_idx: int) -> None:
        super().__init__()
        self.activation = config.hidden_act
        self.ranks: TensorParallel | None = None
        self.power = (1 - layer_idx / config.num_hidden_layers) ** 4
        self.x_k = nn.Parameter(torch.empty(config.hidden_size))
        self.key = Linear(config.hidden_size, config.mlp_size)
        self.value = Linear(config.mlp_size, config.hidden_size)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        dim = self.x_k.numel()
        self.x_k.copy_(1 - (torch.arange(dim, dtype=torch.float32, device=self.x_k.device) / dim) ** self.power)
        nn.init.orthogonal_(self.key.weight)
        nn.init.zeros_(self.value.weight)

    def tensor_parallel_plan(self, ranks: int) -> Plan:
        whole_per_rank(self.value.in_features, ranks, "the width of the channel mix (model.intermediate_size)")
        return Plan({**rows(self, ranks, "key"), **columns(self, "value")})

    def split(self, ranks: TensorParallel, plan: Plan | None) -> None:
        self.ranks = ranks

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        if self.ranks is not None:
            assert ctx.positions is not None
            x = self.ranks.gather(x, len(ctx.positions))
        (mixed,), last = token_mix(
            x,
            self.x_k[None],
            state=cached(ctx, "ffn_shift"),
            output_final_state=ctx.cache is not None,
            cu_seqlens=ctx.cu_seqlens,
            shard=ctx.shard,
        )
        remember(ctx, "ffn_shift", last)
        out = self.value(ACTIVATIONS[self.activation](self.key(mixed)))
        return out if self.ranks is None else self.ranks.scatter(out)


class RWKV7Block(RWKV6Block):
    """RWKV-6's block with the channel mix of RWKV-7."""

    def __init__(self, config: RWKV7Config, layer_idx: int, mixer: Mixer, names: Names) -> None:
        nn.Module.__init__(self)
        self.layer_idx, self.names = layer_idx, names
        dim, eps, bias = config.hidden_size, config.norm_eps, config.norm_bias
        if config.norm_first and layer_idx == 0:
            self.pre_norm = LayerNorm(dim, eps, bias)
        self.add_module(names.mixer_norm, LayerNorm(dim, eps, bias))
        self.add_module(names.mixer, mixer)
        self.add_module(names.mlp_norm, LayerNorm(dim, eps, bias))
        self.add_module(names.mlp, RWKV7ChannelMix(config, layer_idx))


class SmallEmbedding(Embedding):
    """Token embeddings uniform in +-1e-4: the norm in front of the first block sets their scale."""

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.weight, -1e-4, 1e-4)


class OrthogonalHead(Linear):
    def reset_parameters(self) -> None:
        rows, columns = self.weight.shape
        nn.init.orthogonal_(self.weight, gain=0.5 * max(1.0, rows / columns) ** 0.5)


class RWKV7Backbone(LayerNormBackbone):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.embeddings = SmallEmbedding(config.vocab_size, config.hidden_size, config.pad_token_id)

    def build_head(self) -> Linear:
        return OrthogonalHead(self.config.hidden_size, self.config.vocab_size)


register(
    System(
        RWKV7Config,
        RWKV7Attention,
        block=RWKV7Block,
        backbone=RWKV7Backbone,
        names=Names(mlp_norm="ffn_norm", mlp="ffn"),
    )
)
