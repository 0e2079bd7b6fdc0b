"""ABC: attention with bounded memory, slots filled by a cumulative softmax (Peng et al., 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from flame.kernels.log_gate import log_gate
from flame.kernels.rotary import rotary
from flame.models.context import Context
from flame.models.heads import ScaledWidths
from flame.models.mixers.base import Mixer, cached, merge_heads, remember, split_heads
from flame.models.mixers.gsa import Slots, slot_attention, take_misspelled_expansions
from flame.models.modules import GatedRMSNorm, Linear, ShortConvolution
from flame.models.registry import System, register
from flame.models.sharding import Plan, columns, rows, whole_per_rank


@dataclass(kw_only=True)
class ABCConfig(ScaledWidths):
    """`clamp_min` and `clamp_max` bound the slot logits; `num_slots` None means as many as key channels a head.

    The reference spells its arguments `exapnd_k` and `exapnd_v`; either spelling is taken. `gate_low_rank_dim` changes
    nothing.
    """

    model_type: ClassVar[str] = "abc"

    gate_low_rank_dim: int = 16
    clamp_min: float | None = -32
    clamp_max: float | None = 32
    num_heads: int = 4
    num_slots: int | None = 64
    use_short_conv: bool = False
    conv_size: int = 4
    expand_k: float = 0.5
    expand_v: float = 1
    exapnd_k: float | None = None
    exapnd_v: float | None = None
    use_rope: bool = True
    attn_mode: str = "chunk"

    def __post_init__(self) -> None:
        take_misspelled_expansions(self)
        super().__post_init__()
        self.require(self.hidden_act != "powlu", "hidden_act", "is an MLP activation that ABC does not take")
        self.require(
            not self.use_rope or self.key_dim // self.num_heads % 2 == 0,
            "expand_k",
            "gives odd heads, which rotary cannot pair",
        )

    @property
    def slots(self) -> int:
        return self.key_dim // self.num_heads if self.num_slots is None else self.num_slots


class ABCAttention(Mixer):
    """Slot attention in which every slot is the softmax average, under its own logits, of the tokens so far.

    The decode state includes the running normaliser of the slots, so that decoding equals the parallel pass.
    """

    config_class = ABCConfig
    context_parallel = True

    def __init__(self, config: ABCConfig | None = None, layer_idx: int = 0, **options: Any) -> None:
        super().__init__(config, layer_idx, **options)
        c = self.config
        dim, std = c.hidden_size, c.initializer_range
        self.q_proj = Linear(dim, c.key_dim, std=std)
        self.k_proj = Linear(dim, c.key_dim, std=std)
        self.v_proj = Linear(dim, c.value_dim, std=std)
        self.g_proj = Linear(dim, c.value_dim, std=std)
        self.s_proj = Linear(dim, c.num_heads * c.slots, std=std)
        if c.use_short_conv:
            self.q_conv1d = ShortConvolution(c.key_dim, c.conv_size, std=std)
            self.k_conv1d = ShortConvolution(c.key_dim, c.conv_size, std=std)
            self.v_conv1d = ShortConvolution(c.value_dim, c.conv_size, std=std)
        self.g_norm = GatedRMSNorm(c.value_dim // c.num_heads, c.norm_eps, bool(c.elementwise_affine))
        self.o_proj = Linear(c.value_dim, dim, std=std)

    def mix(self, x: Tensor, ctx: Context) -> Tensor:
        c = self.config
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if c.use_short_conv:
            q, k, v = self.q_conv1d(q, ctx, "conv_q"), self.k_conv1d(k, ctx, "conv_k"), self.v_conv1d(v, ctx, "conv_v")
        q, k, v = (split_heads(y, c.num_heads) for y in (q, k, v))
        if c.use_rope:
            q, k = rotary(q, ctx.positions), rotary(k, ctx.positions)
        logits = self.s_proj(x)
        if c.clamp_min is not None or c.clamp_max is not None:
            logits = logits.clamp(c.clamp_min, c.clamp_max)
        weight, log_decay, normalizer = log_gate(
            split_heads(logits, c.num_heads),
            initial_state=cached(ctx, "normalizer"),
            output_final_state=ctx.cache is not None,
            cu_seqlens=ctx.cu_seqlens,
            shard=ctx.shard,
        )
        remember(ctx, "normalizer", normalizer)
        o = slot_attention(Slots(q, k, v, weight, log_decay, scale=q.shape[-1] ** -0.5), ctx)
        return self.o_proj(merge_heads(self.g_norm(o, split_heads(self.g_proj(x), c.num_heads))))

    def tensor_parallel_plan(self, ranks: int) -> Plan:
        c = self.config
        local = {"num_heads": whole_per_rank(c.num_heads, ranks, "num_heads")}
        names = ("q_proj", "k_proj", "v_proj", "g_proj", "s_proj", "q_conv1d", "k_conv1d", "v_conv1d")
        return Plan({**rows(self, c.num_heads, *names), **columns(self, "o_proj")}, local)

    def flops(self, seq_len: int) -> float:
        """Write and read of both memories: 4 operations an entry."""
        c = self.config
        return 4.0 * c.slots * (c.key_dim + c.value_dim)


register(System(ABCConfig, ABCAttention))
