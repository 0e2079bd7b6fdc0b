"""Residual blocks: how a mixer and an MLP are joined to the residual stream."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flame.models.config import ModelConfig
from flame.models.context import Context
from flame.models.mixers.base import Mixer
from flame.models.modules import GatedMLP, Linear, RMSNorm
from flame.models.registry import Names


class Block(nn.Module):
    """Pre-norm block: ``x = x + mixer(norm(x)); x = x + mlp(norm(x))``.

    A system with another order subclasses this in its mixer's file. The contract is `forward(x, ctx)`, which returns
    the stream [B, T, D] and the carried tensors for the next block.
    """

    def __init__(self, config: ModelConfig, layer_idx: int, mixer: Mixer, names: Names) -> None:
        super().__init__()
        self.layer_idx, self.names = layer_idx, names
        self.add_module(names.mixer_norm, RMSNorm(config.hidden_size, config.norm_eps))
        self.add_module(names.mixer, mixer)
        self.add_module(names.mlp_norm, RMSNorm(config.hidden_size, config.norm_eps))
        self.add_module(names.mlp, GatedMLP(config))

    @property
    def token_mixer(self) -> Mixer:
        return getattr(self, self.names.mixer)

    def forward(self, x: Tensor, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        mixer_norm, mlp_norm = getattr(self, self.names.mixer_norm), getattr(self, self.names.mlp_norm)
        mixed = self.token_mixer(mixer_norm(x), ctx)
        normed, x = mlp_norm.add(mixed, x)
        return x + getattr(self, self.names.mlp)(normed), ctx.carried


class AttentionResidualBlock(Block):
    """Block whose sub-layers read a learned mixture of earlier sums instead of the plain stream (`attnres_block_size`).

    `ctx.carried["sources"]` [S, B, T, D] holds the finished sums; the stream is the running one. Sub-layer j (2i for the
    mixer of layer i, 2i + 1 for its MLP) closes the running sum when j is a multiple of the block size.
    """

    def __init__(self, config: ModelConfig, layer_idx: int, mixer: Mixer, names: Names) -> None:
        super().__init__(config, layer_idx, mixer, names)
        self.block_size = config.attnres_block_size or 1
        self.attn_res_proj, self.attn_res_norm = (
            SourceScore(config.hidden_size),
            RMSNorm(config.hidden_size, config.norm_eps),
        )
        self.mlp_res_proj, self.mlp_res_norm = (
            SourceScore(config.hidden_size),
            RMSNorm(config.hidden_size, config.norm_eps),
        )

    def forward(self, x: Tensor, ctx: Context) -> tuple[Tensor, dict[str, Tensor]]:
        mixer_norm, mlp_norm = getattr(self, self.names.mixer_norm), getattr(self, self.names.mlp_norm)
        if self.layer_idx == 0:
            normed, sources, closed = mixer_norm(x), x[None], True
        else:
            sources = torch.cat([ctx.carried["sources"], x[None]])
            normed = mixer_norm(mix_sources(sources, self.attn_res_proj, self.attn_res_norm))
            closed = 2 * self.layer_idx % self.block_size == 0
        mixed = self.token_mixer(normed, ctx)
        x, sources = (mixed, sources) if closed else (x + mixed, sources[:-1])

        candidates = torch.cat([sources, x[None]])
        normed = mlp_norm(mix_sources(candidates, self.mlp_res_proj, self.mlp_res_norm))
        out = getattr(self, self.names.mlp)(normed)
        closed = (2 * self.layer_idx + 1) % self.block_size == 0
        x, sources = (out, candidates) if closed else (x + out, sources)
        return x, {**ctx.carried, "sources": sources}


class SourceScore(Linear):
    """[1, D] projection that scores a source; starts at zero, so that all sources weigh the same."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__(hidden_size, 1)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)


def mix_sources(sources: Tensor, score: SourceScore, norm: RMSNorm) -> Tensor:
    """Average of the sources [S, B, T, D] -> [B, T, D], weighted by a softmax over S of their normed scores, in fp32."""
    weights = torch.softmax(score(norm(sources)).float(), dim=0)
    return (weights * sources.float()).sum(0).to(sources.dtype)
