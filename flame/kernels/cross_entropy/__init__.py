"""Cross-entropy of next-token prediction: of logits, or fused with the projection that makes them.

All return the fp32 **sum** over valid tokens (label not -100), so that a trainer divides by the global count.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flame.errors import FlameError
from flame.kernels.backend import select_backend
from flame.kernels.cross_entropy import ops, reference
from flame.kernels.cross_entropy.options import Terms, check_labels

__all__ = ["cross_entropy", "linear_cross_entropy"]


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    soft_cap: float = 0.0,
    l2_warp: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Sum over valid tokens of the cross-entropy of `logits` `[N, V]` and `labels` `[N]` (-100 is ignored).

    Args:
        logits: any float dtype; the softmax is fp32.
        labels: int64 or int32, already shifted.
        z_loss: weight of `logsumexp^2` (PaLM, arXiv 2204.02311), 0 for none.
        label_smoothing: probability spread evenly over the vocabulary, 0 for none.
        soft_cap: logits become `soft_cap * tanh(logits / soft_cap)` first (Gemma 2), 0 for none.
        l2_warp: gradient-only pull `l2_warp * max(logits)` on the largest logit of each valid token (RWKV), 0 for none.
        backend: 'triton', 'chunked' or 'reference'; default by device.

    Returns:
        fp32 scalar. Gradients flow to logits.

    Raises:
        FlameError: labels of another shape or type, options out of range.
    """
    terms = Terms(z_loss, label_smoothing, soft_cap, l2_warp)
    check_labels("cross_entropy", len(logits), labels)
    if logits.dim() != 2:
        raise FlameError(f"cross_entropy: logits must be [N, V]; got {tuple(logits.shape)}. Flatten batch and time.")
    if select_backend(logits, backend) == "triton":
        return ops.cross_entropy(_rows_in_memory(logits), labels, terms.values())[0]
    return reference.cross_entropy(logits, labels, terms)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    soft_cap: float = 0.0,
    l2_warp: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """`cross_entropy(hidden @ weight.T, labels)` without ever holding all logits.

    A chunk of tokens at a time: logits, loss, and at once the gradients of hidden and weight, which the backward only
    scales by the upstream gradient. Options and errors as in `cross_entropy`.

    Args:
        hidden: `[N, D]`, the final norm's output with batch and time flattened.
        weight: `[V, D]` in hidden.dtype, the output embedding.
        labels: `[N]` int64 or int32, already shifted, -100 is ignored.

    Returns:
        fp32 scalar sum over valid tokens. Gradients flow to hidden and weight (accumulated in fp32, rounded once); they
        are first-order only.
    """
    terms = Terms(z_loss, label_smoothing, soft_cap, l2_warp)
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or hidden.dtype != weight.dtype:
        raise FlameError(
            "linear_cross_entropy: hidden must be [N, D] and weight [V, D] of one dtype; got "
            f"{tuple(hidden.shape)} {hidden.dtype} and {tuple(weight.shape)} {weight.dtype}."
        )
    check_labels("linear_cross_entropy", len(hidden), labels)
    chosen = select_backend(hidden, backend)
    if chosen == "reference":
        return reference.linear_cross_entropy(hidden, weight, labels, terms)
    grad = torch.is_grad_enabled()
    need = grad and hidden.requires_grad, grad and weight.requires_grad
    return ops.linear_cross_entropy(hidden, weight, labels, terms.values(), *need, chosen)[0]


def _rows_in_memory(logits: Tensor) -> Tensor:
    """The same logits with adjacent columns; rows may be apart (padded vocabularies)."""
    return logits if logits.stride(1) == 1 else logits.contiguous()
