"""What configurations of multi-head mixers have in common: grouped key heads, and widths scaled from hidden_size."""

from __future__ import annotations

from flame.models.config import ModelConfig


class GroupedHeads(ModelConfig):
    """A configuration with `num_heads` query heads that share `num_kv_heads` key and value heads; None means as many."""

    num_heads: int
    num_kv_heads: int | None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.num_heads > 0, "num_heads", "must be positive")
        fits = self.kv_heads > 0 and self.num_heads % self.kv_heads == 0
        self.require(fits, "num_kv_heads", f"does not divide num_heads = {self.num_heads}")

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads


class SplitWidth(GroupedHeads):
    """Grouped heads that split hidden_size evenly."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_divisible("hidden_size", "num_heads")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


class ScaledWidths(ModelConfig):
    """A configuration whose keys and values of all heads are `expand_k` and `expand_v` times hidden_size wide."""

    num_heads: int
    expand_k: float
    expand_v: float

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.num_heads > 0, "num_heads", "must be positive")
        for key, width in (("expand_k", self.key_dim), ("expand_v", self.value_dim)):
            self.require(width % self.num_heads == 0, key, f"gives {width} channels, no multiple of num_heads")

    @property
    def key_dim(self) -> int:
        return self.scaled_dim(self.expand_k, "expand_k")

    @property
    def value_dim(self) -> int:
        return self.scaled_dim(self.expand_v, "expand_v")
