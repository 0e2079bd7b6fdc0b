"""ReBased: linear attention with a learned quadratic kernel (Aksenov et al., 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from flame.models.config import ModelConfig
from flame.models.feature_maps import LearnedNorm
from flame.models.mixers.based import BasedLinearAttention
from flame.models.registry import System, register


@dataclass(kw_only=True)
class ReBasedConfig(ModelConfig):
    """Queries and keys of width `feature_dim` share one LayerNorm with gain (`use_gamma`) and offset (`use_beta`).

    `mode` picks the epsilon as in the reference: `eps` for 'parallel', 1e-10 for the chunked modes. `l_max` is accepted
    and changes nothing.
    """

    model_type: ClassVar[str] = "rebased"

    feature_dim: int = 16
    num_heads: int = 16
    num_key_value_heads: int = 16
    use_gamma: bool = True
    use_beta: bool = True
    normalize: bool = True
    mode: str = "parallel"
    eps: float = 1e-5
    causal: bool = True
    l_max: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_divisible("hidden_size", "num_heads")
        self.require(self.num_key_value_heads == self.num_heads, "num_key_value_heads", "must equal num_heads")
        self.require(self.causal, "causal", "must be true: a language model cannot see what it predicts")
        mapped = self.use_gamma or self.use_beta or self.normalize
        self.require(mapped, "normalize", "and use_gamma and use_beta are all off: that is no feature map")

    @property
    def denominator_eps(self) -> float:
        return self.eps if self.mode == "parallel" else 1e-10


class ReBasedLinearAttention(BasedLinearAttention):
    """As Based, with `A_ij = (phi(q_i) phi(k_j))^2 / d`, phi a LayerNorm shared by queries, keys and heads."""

    config_class: ClassVar[type[ModelConfig]] = ReBasedConfig
    coefficients = (0.0, 0.0, 1.0)

    def __init__(self, config: ModelConfig | None = None, layer_idx: int = 0, **options: Any) -> None:
        super().__init__(config, layer_idx, **options)
        c = self.config
        self.feature_map = LearnedNorm(c.feature_dim, c.use_gamma, c.use_beta, c.normalize)

    def mapped(self, x: Tensor) -> Tensor:
        return self.feature_map(x)


register(System(ReBasedConfig, ReBasedLinearAttention))
