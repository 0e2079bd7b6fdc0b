"""Feature maps on queries and keys, `[..., d] -> [..., F]`, that linear attention uses in place of the softmax."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flame.errors import ConfigError, unknown_name
from flame.kernels.normalization import layer_norm
from flame.models.modules import Linear


def _squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _identity(x: Tensor) -> Tensor:
    return x


# Names as GLA and GSA use them ("gelu" is the tanh form there).
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "logsigmoid": F.logsigmoid,
    "silu": F.silu,
    "swish": F.silu,
    "sqrelu": _squared_relu,
    "gelu": _tanh_gelu,
}

# Names as Hugging Face uses them, for RetNet ("gelu" is exact there).
HUGGING_FACE_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "leaky_relu": F.leaky_relu,
    "linear": _identity,
    "mish": F.mish,
    "relu": F.relu,
    "relu2": _squared_relu,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}


def activation(
    name: str | None, table: dict[str, Callable[[Tensor], Tensor]] = ACTIVATIONS
) -> Callable[[Tensor], Tensor]:
    """The function called `name`; None is the identity. Raises ConfigError for an unknown one."""
    if name is None:
        return _identity
    if name not in table:
        raise ConfigError("model.feature_map: " + unknown_name("activation", name, table))
    return table[name]


class FeatureMap(nn.Module):
    """`forward(x [..., dim]) -> [..., feature_dim]`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    @property
    def feature_dim(self) -> int:
        return self.dim


class Identity(FeatureMap):
    def forward(self, x: Tensor) -> Tensor:
        return x


class ReLU(FeatureMap):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x)


class Elu(FeatureMap):
    """elu(x) + 1, without the cancellation below zero (Katharopoulos et al., 2020)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x >= 0, x + 1, x.clamp(max=0).exp())


class ElementwiseProduct(FeatureMap):
    """(A x + a) * (C x + c)."""

    def __init__(self, dim: int, std: float = 0.02) -> None:
        super().__init__(dim)
        self.layer1 = Linear(dim, dim, bias=True, std=std)
        self.layer2 = Linear(dim, dim, bias=True, std=std)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer1(x) * self.layer2(x)


class Hedgehog(FeatureMap):
    """softmax over [2y, -2y] with y = A x + a (Zhang et al., "The Hedgehog & the Porcupine", 2024)."""

    def __init__(self, dim: int, std: float = 0.02) -> None:
        super().__init__(dim)
        self.layer = Linear(dim, dim, bias=True, std=std)

    @property
    def feature_dim(self) -> int:
        return 2 * self.dim

    def forward(self, x: Tensor) -> Tensor:
        y = 2 * self.layer(x)
        return torch.cat((y, -y), dim=-1).softmax(-1)


class T2R(FeatureMap):
    """relu(A x) (Kasai et al., "Finetuning Pretrained Transformers into RNNs", 2021)."""

    def __init__(self, dim: int, std: float = 0.02) -> None:
        super().__init__(dim)
        self.layer = Linear(dim, dim, std=std)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layer(x))


class Dpfp(FeatureMap):
    """Products of [relu(x), relu(-x)] with itself rolled by 1..nu (Schlag et al., 2021)."""

    def __init__(self, dim: int, nu: int = 4) -> None:
        super().__init__(dim)
        self.nu = nu

    @property
    def feature_dim(self) -> int:
        return 2 * self.nu * self.dim

    def forward(self, x: Tensor) -> Tensor:
        u = torch.cat((F.relu(x), F.relu(-x)), dim=-1)
        return torch.cat([u * u.roll(j, dims=-1) for j in range(1, self.nu + 1)], dim=-1)


class LearnedNorm(FeatureMap):
    """gamma * LayerNorm(x) + beta, each part optional: what ReBased squares (Aksenov et al., 2024)."""

    def __init__(self, dim: int, use_gamma: bool = True, use_beta: bool = True, normalize: bool = True) -> None:
        super().__init__(dim)
        self.normalize = normalize
        self.gamma = nn.Parameter(torch.empty(dim)) if use_gamma else None
        self.beta = nn.Parameter(torch.empty(dim)) if use_beta else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.gamma is not None:
            nn.init.ones_(self.gamma)
        if self.beta is not None:
            nn.init.zeros_(self.beta)

    def forward(self, x: Tensor) -> Tensor:
        if self.normalize:
            return layer_norm(x, self.gamma, self.beta, 1e-5)
        y = x if self.gamma is None else x * self.gamma
        return y if self.beta is None else y + self.beta


def feature_map(name: str, dim: int, std: float = 0.02) -> FeatureMap:
    """LinearAttention's map called `name` over `dim` channels; learned weights start at N(0, std)."""
    learned = {"elementwise_product": ElementwiseProduct, "hedgehog": Hedgehog, "t2r": T2R}
    fixed = {"dpfp": Dpfp, "elu": Elu, "identity": Identity, "relu": ReLU}
    if name in learned:
        return learned[name](dim, std)
    if name not in fixed:
        raise ConfigError("model.feature_map: " + unknown_name("feature map", name, [*learned, *fixed]))
    return fixed[name](dim)
