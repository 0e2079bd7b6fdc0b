"""Based: linear attention whose feature map is a second-order Taylor expansion of the softmax (Arora et al., 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from flame.kernels.polynomial_attention import feature_count, polynomial_attention
from flame.models.config import ModelConfig
from flame.models.context import Context
from flame.models.mixers.base import Mixer, cached, merge_heads, remember, split_heads
from flame.models.modules import Linear
from flame.models.registry import System, register
from flame.models.sharding import Plan, columns, rows, whole_per_rank


@dataclass(kw_only=True)
class BasedConfig(ModelConfig):
    """`feature_dim` is the width of queries and keys before the map. `mode` picks the reference's epsilon: 1e-6 for
    'parallel', 1e-10 for the chunked modes; `eps` itself is its non-causal form's."""

    model_type: ClassVar[str] = "based"

    feature_dim: int = 16
    num_heads: int = 12
    num_key_value_heads: int = 12
    feature_name: str = "taylor_exp"
    mode: str = "parallel"
    eps: float = 1e-12
    causal: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_divisible("hidden_size", "num_heads")
        self.require(self.num_key_value_heads == self.num_heads, "num_key_value_heads", "must equal num_heads")
        self.require(self.causal, "causal", "must be true: a language model cannot see what it predicts")

    @property
    def denominator_eps(self) -> float:
        return 1e-6 if self.mode == "parallel" else 1e-10


class BasedLinearAttention(Mixer):
    """`o_i = sum_{j <= i} A_ij v_j / (sum_{j <= i} A_ij + eps)`, `A_ij = 1 + s + s^2 / 2`, `s = q_i k_j / sqrt(d)`."""

    config_class: ClassVar[type[ModelConfig]] = BasedConfig
    context_parallel = True
    coefficients = (1.0, 1.0, 0.5)

    def __init__(self, config: ModelConfig | None = None, layer_idx: int = 0, **options: Any) -> None:
        super().__init__(config, layer_idx, **options)
        c = self.config
        std = c.initializer_range
        self.q_proj = Linear(c.hidden_size, c.num_heads * c.feature_dim, std=std)
        self.k_proj = Linear(c.hidden_size, c.num_heads * c.feature_dim, std=std)
        self.v_proj = Linear(c.hidden_size, c.hidden_size, std=std)
        self.o_proj = Linear(c.hidden_size, c.hidden_size, std=std)

    def mix(self, x: Tensor, ctx: Context) -> Tensor:
        heads = self.config.num_heads
        o, state = polynomial_attention(
            self.mapped(split_heads(self.q_proj(x), heads)),
            self.mapped(split_heads(self.k_proj(x), heads)),
            split_heads(self.v_proj(x), heads),
            coefficients=self.coefficients,
            eps=self.config.denominator_eps,
            initial_state=cached(ctx, "state"),
            output_final_state=ctx.cache is not None,
            cu_seqlens=ctx.cu_seqlens,
            shard=ctx.shard,
        )
        remember(ctx, "state", state)
        return self.o_proj(merge_heads(o))

    def mapped(self, x: Tensor) -> Tensor:
        """Queries or keys `[B, T, H, d]` as the score sees them."""
        return x

    def tensor_parallel_plan(self, ranks: int) -> Plan:
        c = self.config
        local = {"num_heads": whole_per_rank(c.num_heads, ranks, "num_heads")}
        return Plan({**rows(self, c.num_heads, "q_proj", "k_proj", "v_proj"), **columns(self, "o_proj")}, local)

    def flops(self, seq_len: int) -> float:
        """Write and read of every head's state and of its running denominator: 4 operations an entry."""
        c = self.config
        return 4.0 * feature_count(c.feature_dim, self.coefficients) * (c.hidden_size + c.num_heads)


register(System(BasedConfig, BasedLinearAttention))
