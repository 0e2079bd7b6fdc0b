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


def check_labels(op: str, rows: int, labels: Tensor) -> None:
    """Labels must be integers, one a row. Their values are not looked at: that would wait for the device."""
    if tuple(labels.shape) != (rows,) or labels.dtype not in (torch.int64, torch.int32):
        raise FlameError(
            f"{op}: labels must be [N] = [{rows}] int64 or int32; got {tuple(labels.shape)} {labels.dtype}. "
            "Flatten batch and time first."
        )
