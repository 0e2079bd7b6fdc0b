"""The decoder that every system shares: embeddings, blocks, final norm, language-model head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flame.errors import FlameError
from flame.kernels.cross_entropy import (
    Terms,
    VocabularyShard,
    linear_cross_entropy,
    vocabulary_parallel_cross_entropy,
)
from flame.kernels.sequence import SequenceShard
from flame.models.block import AttentionResidualBlock, Block, SourceScore, mix_sources
from flame.models.config import ModelConfig
from flame.models.context import Cache, Context, make_context
from flame.models.modules import Embedding, Linear, RMSNorm
from flame.models.registry import block_owner, get_system, layer_system, resolve_config
from flame.models.sharding import Plan, TensorParallel, rows

L2_WARP = 1e-4  # pull on every token's largest logit when `use_l2warp` is set (RWKV's regulariser)


@dataclass
class CausalLMOutput:
    """What a forward returns.

    Attributes:
        logits: [B, T, V], or None when labels were given (the loss never forms them at once).
        loss_sum: fp32 scalar, summed over the positions whose label is not -100; None without labels.
        cache: the decode state that was passed in, advanced by T tokens.
    """

    logits: Tensor | None = None
    loss_sum: Tensor | None = None
    cache: Cache | None = None


class Backbone(nn.Module):
    """Embeddings, blocks and final norm. A system with parameters beside its layers subclasses this."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.names = get_system(config.model_type).names
        padding_idx = config.pad_token_id
        self.embeddings = Embedding(config.vocab_size, config.hidden_size, padding_idx, config.initializer_range)
        self.layers = nn.ModuleList(build_block(config, index) for index in range(config.num_hidden_layers))
        self.add_module(self.names.final_norm, self.build_norm())
        if config.attnres_block_size:
            self.res_proj = SourceScore(config.hidden_size)
            self.res_norm = RMSNorm(config.hidden_size, config.norm_eps)

    def build_norm(self) -> nn.Module:
        return RMSNorm(self.config.hidden_size, self.config.norm_eps)

    def build_head(self) -> Linear:
        """The language-model head, which a system may initialise in its own way."""
        return Linear(self.config.hidden_size, self.config.vocab_size, std=self.config.initializer_range)

    def initial_carried(self) -> dict[str, Tensor]:
        """What the first block finds in `ctx.carried`."""
        return {}

    def forward(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor | None = None,
        cache: Cache | None = None,
        max_seqlen: int | None = None,
        shard: SequenceShard | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Normed hidden states [B, T, D] of tokens [B, T], and what the last block carried."""
        ctx = make_context(input_ids.shape[1], input_ids.device, cu_seqlens, cache, max_seqlen, shard)
        x, carried = self.run_blocks(self.embeddings(input_ids), self.initial_carried(), ctx, cache)
        if cache is not None:
            cache.seen += input_ids.shape[1]
        return self.finish(x, carried), carried

    def run_blocks(
        self, x: Tensor, carried: dict[str, Tensor], ctx: Context, cache: Cache | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The stream [B, T, D] after all blocks, or those that a pipeline stage has, and what the last one carried."""
        for name, block in self.layers.named_children():
            own = self.carried_to(int(name), carried)
            x, carried = block(x, ctx.at_layer(cache.layers[int(name)] if cache else None, {**carried, **own}))
            carried = {key: value for key, value in carried.items() if key not in own}
        return x, carried

    def carried_to(self, index: int, carried: dict[str, Tensor]) -> dict[str, Tensor]:
        """What block `index` alone finds in `ctx.carried`, too. What differs by layer is chosen here, outside of compiled
        code, which would else be compiled for every layer anew."""
        return {}

    def finish(self, x: Tensor, carried: dict[str, Tensor]) -> Tensor:
        """Normed hidden states [B, T, D] of the last block's stream, in the stream's dtype."""
        if self.config.attnres_block_size:
            x = mix_sources(torch.cat([carried["sources"], x[None]]), self.res_proj, self.res_norm)
        return getattr(self, self.names.final_norm)(x)


class CausalLM(nn.Module):
    """A language model of any registered system.

    Parameters carry the names of the reference's state_dict, so published checkpoints load with `load_state_dict` and
    exported ones load there.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        system = get_system(config.model_type)
        self.backbone_name = system.names.backbone
        self.add_module(self.backbone_name, (system.backbone or Backbone)(config))
        self.lm_head = self.decoder.build_head()
        self.ranks: TensorParallel | None = None
        self.tie_weights()

    @property
    def decoder(self) -> Backbone:
        return getattr(self, self.backbone_name)

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks: the units of sharding, checkpointing and compilation."""
        return self.decoder.layers

    def tie_weights(self) -> None:
        """Make the head share the embedding if the config says so. Needed again after `to_empty`, which unties."""
        if self.config.tie_word_embeddings and self.lm_head is not None:  # pipeline stages lack it, but the last
            self.lm_head.weight = self.decoder.embeddings._parameters["weight"]  # stored, not as read

    @property
    def parameter_count(self) -> int:
        """Parameters of the whole model, shared ones once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def new_cache(self) -> Cache:
        """An empty decode cache for this model."""
        return Cache.empty(self.config.num_hidden_layers)

    def forward(
        self,
        input_ids: Tensor,
        *,
        labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: Cache | None = None,
        max_seqlen: int | None = None,
        shard: SequenceShard | None = None,
    ) -> CausalLMOutput:
        """
        Args:
            input_ids: [B, T] int64.
            labels: [B, T] int64, already shifted: the target of position t, or -100 to ignore it.
            cu_seqlens: [N + 1] int32 document starts and the total; needs B == 1. Documents never see each other.
            cache: decode state from `new_cache`, advanced in place.
            max_seqlen: a bound on the length of packed documents, which makes attention faster where it is known.
            shard: input_ids, labels and cu_seqlens are this context-parallel rank's part of the rows (`cut_sequence`).

        Raises:
            FlameError: cu_seqlens with B > 1, or with a cache that already holds tokens.
        """
        if cu_seqlens is not None and input_ids.shape[0] != 1:
            raise FlameError(
                f"cu_seqlens needs one packed row; input_ids has {input_ids.shape[0]} rows. Concatenate them."
            )
        hidden, carried = self.decoder(input_ids, cu_seqlens, cache, max_seqlen, shard)
        if labels is None:
            return CausalLMOutput(logits=self.logits(hidden, input_ids.shape[1]), cache=cache)
        return CausalLMOutput(loss_sum=self.loss_sum(hidden, labels, carried), cache=cache)

    def logits(self, hidden: Tensor, length: int) -> Tensor:
        """[B, T, V] of hidden states [B, T, D]; a stream may be wider than the weights (Mamba's `residual_in_fp32`).

        Args:
            length: T, which a tensor-parallel rank's own hidden states do not tell.
        """
        hidden, ranks = hidden.to(self.lm_head.weight.dtype), self.ranks
        return self.lm_head(hidden) if ranks is None else ranks.join(self.lm_head(ranks.gather(hidden, length)))

    def loss_sum(self, hidden: Tensor, labels: Tensor, carried: dict[str, Tensor]) -> Tensor:
        """fp32 scalar, summed over valid tokens, of hidden states [B, T, D] and what the last block carried."""
        hidden, ranks = hidden.to(self.lm_head.weight.dtype), self.ranks
        if ranks is not None:
            hidden = ranks.gather(hidden, labels.shape[1])
        loss_sum = self.token_loss(hidden.flatten(0, 1), labels.flatten())
        if "router_loss" in carried:  # a mean over tokens, already weighted; made a sum like the rest
            router_loss = carried["router_loss"] if ranks is None else ranks.once(carried["router_loss"])
            loss_sum = loss_sum + router_loss * (labels != -100).sum()
        return loss_sum

    def token_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy summed over tokens, of hidden [N, D] and labels [N]; ranks hold parts of the head."""
        l2_warp, weight, ranks = L2_WARP if self.config.use_l2warp else 0.0, self.lm_head.weight, self.ranks
        if ranks is None:
            return linear_cross_entropy(hidden, weight, labels, l2_warp=l2_warp)
        first = ranks.rank * len(weight)
        shard = VocabularyShard(ranks.group, first, self.config.vocab_size, reduce_hidden=False)  # the gather does
        return vocabulary_parallel_cross_entropy(hidden, weight, labels, shard, terms=Terms(l2_warp=l2_warp))

    def tensor_parallel_plan(self, ranks: int) -> Plan:
        return Plan(rows(self, ranks, "lm_head"))

    def split(self, ranks: TensorParallel, plan: Plan | None) -> None:
        self.ranks = ranks

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay leaves alone: all vectors, and what the mixers name."""
        names = {name for name, parameter in self.named_parameters() if parameter.ndim < 2}
        for prefix, module in self._parts():
            names |= {f"{prefix}.{name}" for name in module.no_weight_decay()}
        return names

    def flops_per_token(self, seq_len: int) -> float:
        """Forward and backward floating-point operations a token, at documents of `seq_len` tokens.

        Two operations a weight of every matrix product forward and four backward, plus the same ratio for the mixers'
        own arithmetic. The embedding look-up counts nothing; recomputation is not counted.
        """
        matrices = {id(weight): weight.numel() for weight in self.linear_weights()}
        mixing = sum(module.flops(seq_len) for _, module in self._parts())
        return 3.0 * (2.0 * sum(matrices.values()) + mixing)

    def linear_weights(self) -> Iterator[Tensor]:
        """Weights of all matrix products, as they are stored."""
        for module in self.modules():
            weight = module._parameters["weight"] if isinstance(module, nn.Linear) else None
            if weight is not None:
                yield weight

    def _parts(self) -> Iterator[tuple[str, Any]]:
        """(name, mixer) of every layer."""
        blocks: Any = self.blocks.named_children()
        for index, block in blocks:
            yield f"{self.backbone_name}.layers.{index}.{block.names.mixer}", block.token_mixer


def build_block(config: ModelConfig, layer_idx: int) -> Block:
    """The block of one layer: its owner's kind of block around the layer's mixer."""
    owner, owner_config = block_owner(config, layer_idx)
    system, mixer_config = layer_system(config, layer_idx)
    default = AttentionResidualBlock if config.attnres_block_size else Block
    return (owner.block or default)(owner_config, layer_idx, system.mixer(mixer_config, layer_idx), owner.names)


def build_model(config: Mapping[str, Any] | ModelConfig) -> CausalLM:
    """A model from the flat dictionary that config.json holds (`model_type`, `hidden_size`, ...).

    Build it under ``torch.device("meta")``, shard it, then `to_empty` and `initialize_weights`; or build it directly on
    a device, where it starts initialised from torch's default generator.

    Raises:
        ConfigError: a key is unknown, of the wrong type, or impossible for the system.
    """
    return CausalLM(resolve_config(config))
