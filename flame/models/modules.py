"""Small modules that mixers and blocks are made of. Each initialises itself the way the systems specify."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flame.kernels.normalization import gated_rms_norm, group_norm, layer_norm, rms_norm
from flame.kernels.projections import projections
from flame.kernels.short_convolution import short_convolution
from flame.kernels.swiglu import swiglu, swiglu_linear
from flame.models.config import ModelConfig
from flame.models.context import Context
from flame.models.sharding import Plan, TensorParallel, columns, rows, whole_per_rank


class Linear(nn.Linear):
    """nn.Linear with weights N(0, std) and zero bias; without bias unless asked."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False, std: float = 0.02) -> None:
        self.std = std
        super().__init__(in_features, out_features, bias=bias)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


def fuses(x: Tensor, *layers: nn.Module) -> bool:
    """Whether one operation may compute what `layers` do with x: where each is no more than a product with its weight, which
    autocast would not cast for it. On a CPU nothing is gained."""
    plain = all(type(layer) is Linear and layer.bias is None for layer in layers)
    return plain and x.is_cuda and not torch.is_autocast_enabled("cuda")


def project(x: Tensor, *layers: nn.Module) -> list[Tensor]:
    """`[layer(x) for layer in layers]` for x [B, T, D], whose gradient is summed inside the matrix products."""
    if not fuses(x, *layers):
        return [layer(x) for layer in layers]
    weights: list[Any] = [layer.weight for layer in layers]
    return projections(x, weights)


def project_apart(x: Tensor, layer: nn.Module, widths: list[int]) -> list[Tensor]:
    """`layer(x)` cut along its channels into runs of the given widths, each a tensor of its own.

    Cutting the whole result gives strided parts, which kernels copy, and the backward copies their gradients together.
    """
    if not fuses(x, layer):
        return list(layer(x).split(widths, -1))
    weight: Any = layer.weight
    return projections(x, list(weight.split(widths)))


class Embedding(nn.Embedding):
    """Token embeddings, N(0, std). `padding_idx` gets no gradient and, as in the reference, no zero row."""

    def __init__(self, vocab_size: int, hidden_size: int, padding_idx: int | None = None, std: float = 0.02) -> None:
        self.std = std
        self.ranks: TensorParallel | None = None
        super().__init__(vocab_size, hidden_size, padding_idx=padding_idx)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)

    def tensor_parallel_plan(self, ranks: int) -> Plan:
        whole_per_rank(self.num_embeddings, ranks, "model.vocab_size")
        return Plan(rows(self, ranks, "weight"))

    def split(self, ranks: TensorParallel, plan: Plan | None) -> None:
        self.ranks = ranks

    def forward(self, input: Tensor) -> Tensor:
        """[B, T] -> [B, T, D]; of one's own tokens when tensor parallel, where each rank holds a part of the words."""
        if self.ranks is None:
            return super().forward(input)
        weight = self.weight  # [V / ranks, D]
        first, own = self.ranks.rank * len(weight), range(len(weight))
        padding = None if self.padding_idx is None else self.padding_idx - first
        index = input - first
        here = (index >= 0) & (index < len(weight))
        found = F.embedding(index.clamp(0, len(weight) - 1), weight, padding if padding in own else None)
        return self.ranks.scatter(found.masked_fill(~here[..., None], 0.0))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich, 2019).

    With `spanned` set, x holds one rank's equal part of the channels, and the mean runs over those of all ranks.
    """

    def __init__(self, dim: int, eps: float = 1e-6, affine: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.spanned: TensorParallel | None = None
        self.weight = nn.Parameter(torch.empty(dim)) if affine else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.spanned is not None:
            return spanning_rms_norm(x, None, self, self.spanned)
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
        self.groups, self.channels, self.eps = groups, channels, eps
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        groups = self.groups * x.shape[-1] // self.channels  # a tensor-parallel rank has some of them
        return group_norm(x, groups, self.weight, self.bias, self.eps)


class GatedRMSNorm(RMSNorm):
    """norm(x) * activation(gate), the output gate of most linear-attention layers; `gate_first`: norm(x * activation(gate))."""

    def __init__(
        self, dim: int, eps: float = 1e-6, affine: bool = True, activation: str = "silu", gate_first: bool = False
    ) -> None:
        super().__init__(dim, eps, affine)
        self.activation, self.gate_first = activation, gate_first

    def forward(self, x: Tensor, gate: Tensor, groups: int = 1) -> Tensor:  # type: ignore[override]
        """x, gate: [..., C]; every one of `groups` runs of channels has its own mean."""
        if self.spanned is not None:
            return spanning_rms_norm(x, gate, self, self.spanned)
        return gated_rms_norm(x, gate, self.weight, self.eps, self.activation, self.gate_first, groups)


def spanning_rms_norm(x: Tensor, gate: Tensor | None, norm: RMSNorm, ranks: TensorParallel) -> Tensor:
    """`norm` of channels split over ranks, x [..., C / ranks]: the ranks exchange one number a token."""
    y, activated = x.float(), None
    if gate is not None and isinstance(norm, GatedRMSNorm):
        activated = torch.sigmoid(gate.float()) if norm.activation == "sigmoid" else F.silu(gate.float())
        if norm.gate_first:
            y, activated = y * activated, None
    mean = ranks.sum(y.square().sum(-1, keepdim=True)) / (x.shape[-1] * ranks.size)
    y = y * torch.rsqrt(mean + norm.eps)
    if norm.weight is not None:
        y = y * norm.weight.float()
    return (y if activated is None else y * activated).to(x.dtype)


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
            shard=ctx.shard,
        )
        if ctx.cache is not None:
            ctx.cache[name] = state
        return y

    def apart(self, parts: list[Tensor], ctx: Context, name: str) -> list[Tensor]:
        """The convolution of channels that lie in several tensors [B, T, C_i], in the order of the weight."""
        widths = [part.shape[-1] for part in parts]
        if ctx.cache is not None:
            return list(self(torch.cat(parts, -1), ctx, name).split(widths, -1))
        biases = [None] * len(parts) if self.bias is None else self.bias.split(widths)
        options: dict[str, Any] = {"activation": self.activation, "cu_seqlens": ctx.cu_seqlens, "shard": ctx.shard}
        return [
            short_convolution(part, weight, bias, **options)[0]
            for part, weight, bias in zip(parts, self.weight.squeeze(1).split(widths), biases)
        ]


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)) (Shazeer, 2020)."""

    def __init__(self, config: ModelConfig, width: int | None = None) -> None:
        super().__init__()
        width = config.mlp_size if width is None else width
        self.activation = config.hidden_act
        self.ranks: TensorParallel | None = None
        self.gate_proj = Linear(config.hidden_size, width, std=config.initializer_range)
        self.up_proj = Linear(config.hidden_size, width, std=config.initializer_range)
        self.down_proj = Linear(width, config.hidden_size, std=config.initializer_range)

    def tensor_parallel_plan(self, ranks: int) -> Plan:
        whole_per_rank(self.down_proj.in_features, ranks, "the width of the MLP (model.intermediate_size)")
        return Plan({**rows(self, ranks, "gate_proj", "up_proj"), **columns(self, "down_proj")})

    def split(self, ranks: TensorParallel, plan: Plan | None) -> None:
        self.ranks = ranks

    def forward(self, x: Tensor) -> Tensor:
        if self.ranks is not None:
            x = self.ranks.gather_any(x)
        gate, up = project(x, self.gate_proj, self.up_proj)
        if self.activation == "powlu":
            out = self.down_proj(powlu(gate) * up)
        elif fuses(x, self.down_proj):
            out = swiglu_linear(gate, up, self.down_proj.weight)
        else:
            out = self.down_proj(swiglu(gate, up))
        return out if self.ranks is None else self.ranks.scatter_any(out)


def powlu(x: Tensor) -> Tensor:
    """x^(3 / (sqrt(x) + 1)) * sigmoid(x) above zero, x * sigmoid(x) below."""
    wide = x.float()
    positive = wide.clamp_min(torch.finfo(torch.float32).tiny)  # keeps the unused branch's gradient finite
    power = torch.where(wide > 0, positive ** (3 / (positive.sqrt() + 1)), wide)
    return (power * torch.sigmoid(wide)).to(x.dtype)
