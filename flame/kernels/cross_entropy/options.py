"""The terms a loss may have besides the likelihood, gathered so that every form takes the same ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flame.errors import FlameError

IGNORED = -100  # label of a position that has no target


@dataclass(frozen=True)
class Terms:
    """Options of the per-token loss. With s the (soft-capped) logits and lse their logsumexp:

    loss = (1 - label_smoothing) * (lse - s[label]) + label_smoothing * (lse - mean(s)) + z_loss * lse^2

    Capping is `s = soft_cap * tanh(logits / soft_cap)`. `l2_warp` changes no loss value; it adds
    `l2_warp * max(s)` to the gradient of the largest s (RWKV, 1e-4 there).
    """

    z_loss: float = 0.0
    label_smoothing: float = 0.0
    soft_cap: float = 0.0
    l2_warp: float = 0.0

    def values(self) -> list[float]:
        """The fields in order, as the registered ops take them."""
        return [self.z_loss, self.label_smoothing, self.soft_cap, self.l2_warp]

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_smoothing < 1.0:
            raise FlameError(f"cross_entropy: label_smoothing must be in [0, 1); got {self.label_smoothing}.")
        if min(self.z_loss, self.soft_cap, self.l2_warp) < 0.0:
            raise FlameError(f"cross_entropy: z_loss, soft_cap and l2_warp must not be negative; got {self}.")


@dataclass(frozen=True)
class Statistics:
    """What the loss and gradient of a row need of it, each `[n]`: of one shard of the vocabulary, or of all."""

    lse: Tensor
    target: Tensor  # the label's logit, 0 where the label is not in this shard
    summed: Tensor
    largest: Tensor
    largest_at: Tensor  # its column in this shard, -1 when it is in another

    def loss(self, labels: Tensor, terms: Terms, vocabulary: int) -> Tensor:
        """Loss of each row, 0 where ignored, nan where the label does not exist."""
        even = terms.label_smoothing / vocabulary
        loss = self.lse - (1 - terms.label_smoothing) * self.target + terms.z_loss * self.lse.square()
        loss = loss - even * self.summed if even else loss
        loss = torch.where((labels >= 0) & (labels < vocabulary), loss, torch.nan)
        return torch.where(labels != IGNORED, loss, 0.0)


def check_labels(op: str, rows: int, labels: Tensor) -> None:
    """Labels must be integers, one a row. Their values are not looked at: that would wait for the device."""
    if tuple(labels.shape) != (rows,) or labels.dtype not in (torch.int64, torch.int32):
        raise FlameError(
            f"{op}: labels must be [N] = [{rows}] int64 or int32; got {tuple(labels.shape)} {labels.dtype}. "
            "Flatten batch and time first."
        )


def check_projection(op: str, hidden: Tensor, weight: Tensor) -> None:
    """hidden `[N, D]` and weight `[V, D]` of one dtype."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or hidden.dtype != weight.dtype:
        raise FlameError(
            f"{op}: hidden must be [N, D] and weight [V, D] of one dtype; got "
            f"{tuple(hidden.shape)} {hidden.dtype} and {tuple(weight.shape)} {weight.dtype}."
        )
