"""Gated slot attention: two gated linear-attention passes around a softmax over memory slots (Zhang et al., 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flame.kernels.linear_attention import linear_attention
from flame.models.context import Context
from flame.models.feature_maps import T2R, activation
from flame.models.heads import GroupedHeads, ScaledWidths
from flame.models.mixers.base import Mixer, cached, merge_heads, remember, split_heads
from flame.models.modules import Linear, RMSNorm, ShortConvolution
from flame.models.registry import System, register
from flame.models.sharding import Plan, columns, rows, shared_per_rank, whole_per_rank


@dataclass(kw_only=True)
class GSAConfig(GroupedHeads, ScaledWidths):
    """`num_slots` None means as many as key channels a head. The reference spells its arguments `exapnd_k` and
    `exapnd_v`; either spelling is taken. `clamp_*`, `use_output_gate`, `use_norm`, `use_rope` and `share_conv_kernel`
    change nothing."""

    model_type: ClassVar[str] = "gsa"

    gate_logit_normalizer: int | float | None = 8
    clamp_min: float | None = None
    clamp_max: float | None = None
    num_heads: int = 4
    num_kv_heads: int | None = None
    num_slots: int | None = 64
    use_short_conv: bool = False
    conv_size: int = 4
    expand_k: float = 1
    expand_v: float = 1
    exapnd_k: float | None = None
    exapnd_v: float | None = None
    feature_map: Literal["swish", "silu", "relu", "t2r"] | None = "swish"
    use_output_gate: bool = False
    use_norm: bool = True
    use_rope: bool = False
    share_conv_kernel: bool = True
    attn_mode: str = "chunk"

    def __post_init__(self) -> None:
        take_misspelled_expansions(self)
        super().__post_init__()
        self.require(
            self.value_dim == self.hidden_size, "expand_v", "must be 1: the output norm has hidden_size channels"
        )

    @property
    def slots(self) -> int:
        return self.key_dim // self.num_heads if self.num_slots is None else self.num_slots


def take_misspelled_expansions(config: Any) -> None:
    """`exapnd_k` and `exapnd_v`, where given, are `expand_k` and `expand_v`; afterwards both spellings agree."""
    for right, wrong in (("expand_k", "exapnd_k"), ("expand_v", "exapnd_v")):
        if getattr(config, wrong) is not None:
            setattr(config, right, getattr(config, wrong))
        setattr(config, wrong, getattr(config, right))


@dataclass
class Slots:
    """Inputs of the two passes: q `[B, T, H, K]`; k, v `[B, T, HKV, .]`; slot weights and log decays `[B, T, HKV, M]`."""

    q: Tensor
    k: Tensor
    v: Tensor
    weight: Tensor
    log_decay: Tensor
    scale: float


def slot_attention(slots: Slots, ctx: Context) -> Tensor:
    """Reads M decaying memory slots: `softmax(scale * K_t^T q_t)` over the slots' keys, then their values, `[B, T, H, V]`.

    Key and value memories decay alike: `K_t = K_{t-1} diag(f_t) + k_t s_t^T`, `V_t = diag(f_t) V_{t-1} + s_t v_t^T`.
    """
    scores, key_state = linear_attention(
        slots.q,
        slots.k,
        slots.weight,
        value_decay=slots.log_decay,
        scale=slots.scale,
        initial_state=cached(ctx, "key_state"),
        output_final_state=ctx.cache is not None,
        cu_seqlens=ctx.cu_seqlens,
        shard=ctx.shard,
    )
    remember(ctx, "key_state", key_state)
    o, value_state = linear_attention(
        # Formed in fp32 and rounded once, as torch does inside for 16-bit scores.
        torch.softmax(scores, dim=-1).to(slots.v.dtype),
        slots.weight,
        slots.v,
        key_decay=slots.log_decay,
        scale=1.0,
        initial_state=cached(ctx, "value_state"),
        output_final_state=ctx.cache is not None,
        cu_seqlens=ctx.cu_seqlens,
        shard=ctx.shard,
    )
    remember(ctx, "value_state", value_state)
    return o


class GatedSlotAttention(Mixer):
    """Slot attention whose slots forget with learned gates `f_t` and take in `1 - f_t` of each token."""

    config_class = GSAConfig
    context_parallel = True

    def __init__(self, config: GSAConfig | None = None, layer_idx: int = 0, **options: Any) -> None:
        super().__init__(config, layer_idx, **options)
        c = self.config
        groups, std = c.num_heads // c.kv_heads, c.initializer_range
        self.q_proj = Linear(c.hidden_size, c.key_dim, std=std)
        self.k_proj = Linear(c.hidden_size, c.key_dim // groups, std=std)
        self.v_proj = Linear(c.hidden_size, c.value_dim // groups, std=std)
        self.f_proj = Linear(c.hidden_size, c.kv_heads * c.slots, std=std)
        if c.use_short_conv:
            self.q_conv1d = ShortConvolution(c.key_dim, c.conv_size, std=std)
            self.k_conv1d = ShortConvolution(c.key_dim // groups, c.conv_size, std=std)
            self.v_conv1d = ShortConvolution(c.value_dim // groups, c.conv_size, std=std)
        if c.feature_map == "t2r":
            self.feature_map: Any = T2R(c.key_dim // c.num_heads, std)
        else:
            self.feature_map = activation(c.feature_map)
        self.g_norm = RMSNorm(c.hidden_size, 1e-5, bool(c.elementwise_affine))
        self.o_proj = Linear(c.value_dim, c.hidden_size, std=std)

    def mix(self, x: Tensor, ctx: Context) -> Tensor:
        c = self.config
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if c.use_short_conv:
            q, k, v = self.q_conv1d(q, ctx, "conv_q"), self.k_conv1d(k, ctx, "conv_k"), self.v_conv1d(v, ctx, "conv_v")
        q = self.feature_map(split_heads(q, c.num_heads))
        k = self.feature_map(split_heads(k, c.kv_heads))
        v = F.silu(split_heads(v, c.kv_heads))
        log_decay = F.logsigmoid(split_heads(self.f_proj(x), c.kv_heads).float()) / self.gate_normalizer()
        weight = (-torch.expm1(log_decay)).to(v.dtype)
        o = slot_attention(Slots(q, k, v, weight, log_decay, scale=1.0), ctx)
        return self.o_proj(self.g_norm(F.silu(merge_heads(o))))

    def gate_normalizer(self) -> float:
        return self.config.gate_logit_normalizer or 1.0

    def tensor_parallel_plan(self, ranks: int) -> Plan:
        c = self.config
        local = {
            "num_heads": whole_per_rank(c.num_heads, ranks, "num_heads"),
            "kv_heads": shared_per_rank(c.kv_heads, ranks, "num_kv_heads"),
        }
        heads = rows(self, c.num_heads, "q_proj", "q_conv1d", "g_norm")
        grouped = rows(self, c.kv_heads, "k_proj", "v_proj", "f_proj", "k_conv1d", "v_conv1d")
        return Plan({**heads, **grouped, **columns(self, "o_proj")}, local, spanning=("g_norm",))

    def flops(self, seq_len: int) -> float:
        """Write and read of both memories (4 operations an entry), and the feature map beyond one head."""
        c = self.config
        maps = self.feature_map.layer.weight.numel() if isinstance(self.feature_map, nn.Module) else 0
        return 4.0 * c.slots * (c.key_dim + c.value_dim) + 2.0 * maps * (c.num_heads + c.kv_heads - 1)


register(System(GSAConfig, GatedSlotAttention))
