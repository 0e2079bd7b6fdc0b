"""The contract of a token mixer."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flame.errors import FlameError
from flame.models.config import ModelConfig
from flame.models.context import Context, make_context
from flame.models.sharding import Plan, TensorParallel
from flame.schema import build


class Mixer(nn.Module):
    """Mixes tokens along the sequence: `forward(x [B, T, D], ctx) -> [B, T, D]`.

    A subclass
    - sets `config_class`, builds its modules in `__init__`, and implements `mix`;
    - with `ctx.cache` (a dict of its own naming) starts from the state found there and leaves the new state, so that a
      prefill followed by single tokens computes the same as one pass;
    - never lets documents meet when `ctx.cu_seqlens` is given;
    - initialises parameters that it holds itself (not those of its modules, unless they differ from their default) in
      `reset_parameters`, which must write every one of them;
    - says in `tensor_parallel_plan` how its heads are split over ranks, and writes `mix` in terms of `self.config`'s head
      counts, which are then this rank's;
    - passes `ctx.shard` to every op that mixes tokens, and then says so (`context_parallel = True`): a mixer that does
      neither would start every rank's part of a row from nothing, so context parallelism refuses it;
    - counts its own arithmetic in `flops` and names undecayed parameters in `no_weight_decay`.

    Works alone in any torch model: ``GatedLinearAttention(hidden_size=512, num_heads=4)(x)``.
    """

    config_class: ClassVar[type[ModelConfig]]
    context_parallel: ClassVar[bool] = False

    def __init__(self, config: ModelConfig | None = None, layer_idx: int = 0, **options: Any) -> None:
        super().__init__()
        self.config: Any = build(self.config_class, options, type(self).__name__) if config is None else config
        self.layer_idx = layer_idx
        self.ranks: TensorParallel | None = None
        self.share: Mixer | None = None

    def forward(self, x: Tensor, ctx: Context | None = None) -> Tensor:
        ctx = make_context(x.shape[1], x.device) if ctx is None else ctx
        if self.ranks is None:
            return self.mix(x, ctx)
        assert ctx.positions is not None
        whole = self.ranks.gather(x, len(ctx.positions))
        if self.share is None:  # not split: every rank computes all of it and keeps its own tokens
            return self.ranks.own_tokens(self.mix(whole, ctx))
        return self.ranks.scatter(self.share.mix(whole, ctx))

    def mix(self, x: Tensor, ctx: Context) -> Tensor:
        raise NotImplementedError

    def tensor_parallel_plan(self, ranks: int) -> Plan | None:
        """How the layer is split over `ranks`; None, which is always right, lets every rank compute all of it.

        Raises:
            ConfigError: the heads cannot be dealt to so many ranks.
        """
        return None

    def split(self, ranks: TensorParallel, plan: Plan | None) -> None:
        """Compute on gathered tokens, following `plan`.

        `share` is this same layer (its parameters are these, not copies) with the config of one rank's part.
        """
        self.ranks = ranks
        if plan is not None:
            share = copy.copy(self)
            share.config = config_of_share(self.config, plan.config)
            self.__dict__["share"] = share  # not a submodule, whose parameters would be listed twice

    def sum_over_ranks(self, x: Tensor) -> Tensor:
        """The sum of all ranks' results of a projection that reads channels split over them; x itself on one rank."""
        return x if self.ranks is None else self.ranks.sum(x)

    def own_part(self, x: Tensor, dim: int = 0) -> Tensor:
        """This rank's part along `dim` of what all ranks hold alike; x itself on one rank."""
        return x if self.ranks is None else self.ranks.part(x, dim)

    def flops(self, seq_len: int) -> float:
        """Forward floating-point operations a token, beyond the nn.Linear weights, at sequences of `seq_len` tokens."""
        raise NotImplementedError

    def no_weight_decay(self) -> set[str]:
        """Names, relative to the mixer, of matrices that weight decay must leave alone (vectors never decay)."""
        return set()


class ConfigOfShare:
    """The values of a config, some of them those of one rank's part of a layer."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.__dict__.update(values)


def config_of_share(config: ModelConfig, changed: dict[str, Any]) -> ConfigOfShare:
    """All fields and properties of `config`, computed for the whole layer, under the `changed` ones."""
    kind = type(config)
    derived = {name for cls in kind.__mro__ for name, value in vars(cls).items() if isinstance(value, property)}
    values = {name: getattr(config, name) for name in derived}
    unknown = changed.keys() - values.keys() - vars(config).keys()
    if unknown:
        raise FlameError(f"{kind.__name__} has no {', '.join(sorted(unknown))}; a tensor-parallel plan names it.")
    return ConfigOfShare({**values, **vars(config), **changed})


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, H * D] -> [B, T, H, D]."""
    return x.unflatten(-1, (heads, -1))


def merge_heads(x: Tensor) -> Tensor:
    """[B, T, H, D] -> [B, T, H * D]."""
    return x.flatten(-2)


def cached(ctx: Context, name: str) -> Tensor | None:
    """The tensor that this layer's cache holds under `name`, or None."""
    return None if ctx.cache is None else ctx.cache.get(name)


def remember(ctx: Context, name: str, value: Tensor | None) -> None:
    """Keep `value` in this layer's cache when there is one."""
    if ctx.cache is not None and value is not None:
        ctx.cache[name] = value.detach() if not torch.is_grad_enabled() else value
