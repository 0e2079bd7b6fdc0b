"""Small modules that mixers and blocks are made of. Each initialises itself the way the systems specify."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flame.kernels.normalization import gated_rms_norm, group_norm, layer_norm, rms_norm
from flame.kernels.short_convolution import short_convolution
from flame.kernels.swiglu import swiglu
from flame.models.config import ModelConfig
from flame.models.context import Context


class Linear(nn.Linear):
    """nn.Linear with weights N(0, std) and zero bias; without bias unless asked."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False, std: float = 0.02) -> None:
        self.std = std
        super().__init__(in_features, out_features, bias=bias)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    """Token embeddings, N(0, std). `padding_idx` gets no gradient and, as in the reference, no zero row."""

    def __init__(self, vocab_size: int, hidden_size: int, padding_idx: int | None = None, std: float = 0.02) -> None:
        self.std = std
        super().__init__(vocab_size, hidden_size, padding_idx=padding_idx)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich, 2019)."""

    def __init__(self, dim: int, eps: float = 1e-6, affine: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim)) if affine else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """norm(x + residual) with the sum unrounded in fp32, and the sum rounded to the stream's dtype."""
        return rms_norm(x, self.weight, self.eps, residual=residual)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension."""

    def __init__(self, dim: int, eps: float = 1e-5, bias: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """norm(x + residual) with the sum unrounded in fp32, and the sum rounded to the stream's dtype."""
        return layer_norm(x, self.weight, self.bias, self.eps, residual=residual)


class GroupNorm(nn.Module):
    """LayerNorm over each of `groups` contiguous groups of channels, with weight and bias per channel [C]."""

    def __init__(self, groups: int, channels: int, eps: float = 1e-5, bias: bool = True) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return group_norm(x, self.groups, self.weight, self.bias, self.eps)


class GatedRMSNorm(RMSNorm):
    """norm(x) * activation(gate): the output gate of most linear-attention layers."""

    def __init__(self, dim: int, eps: float = 1e-6, affine: bool = True, activation: str = "silu") -> None:
        super().__init__(dim, eps, affine)
        self.activation = activation

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return gated_rms_norm(x, gate, self.weight, self.eps, activation=self.activation)


class ShortConvolution(nn.Module):
    """Depthwise causal convolution over `width` tokens, weight [C, 1, W]; the newest token meets the last column."""

    def __init__(
        self, channels: int, width: int, bias: bool = False, activation: str | None = "silu", std: float = 0.02
    ) -> None:
        super().__init__()
        self.activation, self.std = activation, std
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, ctx: Context, name: str) -> Tensor:
        """x: [B, T, C]. `name` is the cache key of this convolution's state, the last W raw inputs [N, C, W]."""
        y, state = short_convolution(
            x,
            self.weight.squeeze(1),
            self.bias,
            activation=self.activation,
            initial_state=None if ctx.cache is None else ctx.cache.get(name),
            output_final_state=ctx.cache is not None,
            cu_seqlens=ctx.cu_seqlens,
        )
        if ctx.cache is not None:
            ctx.cache[name] = state
        return y


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)) (Shazeer, 2020)."""

    def __init__(self, config: ModelConfig, width: int | None = None) -> None:
        super().__init__()
        width = config.mlp_size if width is None else width
        self.activation = config.hidden_act
        self.gate_proj = Linear(config.hidden_size, width, std=config.initializer_range)
        self.up_proj = Linear(config.hidden_size, width, std=config.initializer_range)
        self.down_proj = Linear(width, config.hidden_size, std=config.initializer_range)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        hidden = powlu(gate) * up if self.activation == "powlu" else swiglu(gate, up)
        return self.down_proj(hidden)


def powlu(x: Tensor) -> Tensor:
    """x^(3 / (sqrt(x) + 1)) * sigmoid(x) above zero, x * sigmoid(x) below."""
    wide = x.float()
    positive = wide.clamp_min(torch.finfo(torch.float32).tiny)  # keeps the unused branch's gradient finite
    power = torch.where(wide > 0, positive ** (3 / (positive.sqrt() + 1)), wide)
    return (power * torch.sigmoid(wide)).to(x.dtype)
