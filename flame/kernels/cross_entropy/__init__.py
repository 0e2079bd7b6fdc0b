"""Cross-entropy of next-token prediction: of logits, or fused with the projection that makes them.

All return the fp32 **sum** over valid tokens (label not -100), so that a trainer divides by the global count.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flame.errors import FlameError
from flame.kernels.backend import select_backend
from flame.kernels.cross_entropy import ops, parallel, reference
from flame.kernels.cross_entropy.options import Terms, check_labels, check_projection
from flame.kernels.cross_entropy.parallel import VocabularyShard

__all__ = [
    "Terms",
    "VocabularyShard",
    "cross_entropy",
    "linear_cross_entropy",
    "linear_kl_divergence",
    "vocabulary_parallel_cross_entropy",
]


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
    if _backend(logits, backend) == "triton":
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
    check_projection("linear_cross_entropy", hidden, weight)
    check_labels("linear_cross_entropy", len(hidden), labels)
    chosen = _backend(hidden, backend)
    if chosen == "reference":
        return reference.linear_cross_entropy(hidden, weight, labels, terms)
    return ops.linear_cross_entropy(hidden, weight, labels, terms.values(), _needed(hidden, weight), chosen)[0]


def vocabulary_parallel_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    shard: VocabularyShard,
    *,
    terms: Terms | None = None,
    backend: str | None = None,
) -> Tensor:
    """`linear_cross_entropy` with the rows of `weight` split over a process group.

    Args:
        hidden: `[N, D]`, the same tokens on every rank.
        weight: `[V_local, D]`, this rank's rows of the output embedding.
        labels: `[N]` in the whole vocabulary.
        shard: the group, where this rank's rows begin, and the whole vocabulary.
        terms: options as in `cross_entropy`.
        backend: 'triton' or 'chunked'; default by device.

    Returns:
        fp32 scalar sum over valid tokens, the same on every rank. Gradients flow to hidden (summed over the group unless
        the shard says otherwise) and to this rank's weight.

    Raises:
        FlameError: as `linear_cross_entropy`.
    """
    check_projection("vocabulary_parallel_cross_entropy", hidden, weight)
    check_labels("vocabulary_parallel_cross_entropy", len(hidden), labels)
    chosen = select_backend(hidden, backend, ("triton", "chunked"))
    return parallel.linear_cross_entropy(hidden, weight, labels, shard, terms or Terms(), chosen)


def linear_kl_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    labels: Tensor | None = None,
    temperature: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Sum over tokens of KL(teacher || student) of two projections' distributions, without all their logits.

    Distillation (Hinton et al., arXiv 1503.02531) with the logits divided by `temperature`; multiply by temperature^2
    yourself where gradients should keep their size.

    Args:
        hidden, weight: the student's `[N, D]` and `[V, D]`, of one dtype.
        teacher_hidden, teacher_weight: `[N, E]` and `[V, E]`, of one dtype; they get no gradient.
        labels: `[N]`; tokens labelled -100 are left out. None for all tokens.
        backend: 'triton', 'chunked' or 'reference'; default by device.

    Returns:
        fp32 scalar. Gradients flow to hidden and weight.

    Raises:
        FlameError: shapes that do not fit together, a temperature that is not positive.
    """
    check_projection("linear_kl_divergence", hidden, weight)
    check_projection("linear_kl_divergence (teacher)", teacher_hidden, teacher_weight)
    if len(hidden) != len(teacher_hidden) or len(weight) != len(teacher_weight) or temperature <= 0:
        raise FlameError(
            "linear_kl_divergence: student and teacher need the same tokens and vocabulary, and a positive temperature; "
            f"got {len(hidden)} and {len(teacher_hidden)} tokens, {len(weight)} and {len(teacher_weight)} words, "
            f"temperature {temperature}."
        )
    labels = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device) if labels is None else labels
    check_labels("linear_kl_divergence", len(hidden), labels)
    teacher = teacher_hidden.detach(), teacher_weight.detach()
    chosen = _backend(hidden, backend)
    if chosen == "reference":
        return reference.linear_kl(hidden, weight, *teacher, labels, temperature)
    return ops.linear_kl(hidden, weight, *teacher, labels, temperature, _needed(hidden, weight), chosen)[0]


def _needed(hidden: Tensor, weight: Tensor) -> list[bool]:
    grad = torch.is_grad_enabled()
    return [grad and hidden.requires_grad, grad and weight.requires_grad]


def _backend(x: Tensor, requested: str | None) -> str:
    """The kernels have no fp64."""
    return "chunked" if requested is None and x.dtype == torch.float64 else select_backend(x, requested)


def _rows_in_memory(logits: Tensor) -> Tensor:
    """The same logits with adjacent columns; rows may be apart (padded vocabularies)."""
    return logits if logits.stride(1) == 1 else logits.contiguous()
