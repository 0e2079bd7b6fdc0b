"""A plain torch transformer with the shapes of our `transformer` system: the strongest peer that torch alone gives."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from flame.models.mixers.transformer import TransformerConfig


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, T, H, D] by half-split pairs; cos and sin [T, 1, D / 2]."""
    first, second = x.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.num_heads, config.num_kv_heads or config.num_heads
        self.dim = config.hidden_size // self.heads
        self.qkv = nn.Linear(config.hidden_size, (self.heads + 2 * self.kv_heads) * self.dim, bias=False)
        self.out = nn.Linear(self.heads * self.dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor | None, longest: int) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (-1, self.dim))
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cu_seqlens is None:
            q, k, v = (y.transpose(1, 2) for y in (q, k, v))
            grouped = self.kv_heads < self.heads
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)
        else:
            packed = varlen_attn(q[0], k[0], v[0], cu_seqlens, cu_seqlens, longest, longest, window_size=(-1, 0))
            o = (packed[0] if isinstance(packed, tuple) else packed)[None]
        return self.out(o.flatten(2))


class Layer(nn.Module):
    def __init__(self, config: TransformerConfig, width: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.gate_up = nn.Linear(config.hidden_size, 2 * width, bias=False)
        self.down = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor | None, longest: int) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, cu_seqlens, longest)
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class TorchTransformer(nn.Module):
    """Pre-norm decoder with rotary embeddings, packed projections and a SwiGLU MLP of `width`."""

    def __init__(self, config: TransformerConfig, width: int) -> None:
        super().__init__()
        self.theta, self.dim = float(config.rope_theta or 10000.0), config.hidden_size // config.num_heads
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, width) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self, input_ids: Tensor, labels: Tensor, positions: Tensor, cu_seqlens: Tensor | None, longest: int
    ) -> Tensor:
        """Mean loss over labels [B, T] that are not -100; positions [T] count from each document's start."""
        rates = self.theta ** (-torch.arange(0, self.dim, 2, device=input_ids.device) / self.dim)
        angles = positions.float()[:, None] * rates
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        x = self.embeddings(input_ids)
        for layer in self.layers:
            x = layer(x, cos, sin, cu_seqlens, longest)
        logits = self.head(self.norm(x)).float()
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())
