"""Normalised attention with a quadratic score, linear in the sequence length (Based and ReBased)."""

from __future__ import annotations

from torch import Tensor

from flame.errors import FlameError
from flame.kernels.backend import select_backend
from flame.kernels.polynomial_attention.chunked import feature_count, polynomial_attention_chunked
from flame.kernels.polynomial_attention.reference import polynomial_attention_reference
from flame.kernels.sequence import SequenceShard, refuse_states

__all__ = ["feature_count", "polynomial_attention"]


def polynomial_attention(  # noqa: PLR0913
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    coefficients: tuple[float, float, float] = (1.0, 1.0, 0.5),
    eps: float = 1e-6,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
    shard: SequenceShard | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`o_i = sum_{j <= i} A_ij v_j / (sum_{j <= i} A_ij + eps)`, `A_ij = c0 + c1 s + c2 s^2`, `s = q_i k_j / sqrt(d)`.

    Args:
        q, k: `[B, T, H, d]`.
        v: `[B, T, H, V]`.
        coefficients: c0, c1, c2, each >= 0. Based is (1, 1, 1/2), the Taylor series of exp; ReBased is (0, 0, 1).
        eps: added to the denominator.
        initial_state: `[B, H, F, V + 1]` fp32, F = `feature_count(d, coefficients)`; the last column is the denominator.
        output_final_state: also return the state after the last token. Not with `cu_seqlens`.
        cu_seqlens: `[N + 1]` int32 document boundaries; then `B == 1` and documents never meet.
        backend: 'triton' (no states, q up to 16 channels, v up to 128), 'chunked' or 'reference'; None chooses.
        shard: this rank's part of a sequence cut over ranks (`flame.kernels.sequence`): computes as if it were whole,
            cu_seqlens being the bounds in this part. Excludes states.

    Returns:
        `(o [B, T, H, V] in v.dtype, final_state or None)`, computed in fp32 (fp64 for fp64 inputs). Scores inside a
        chunk are squared directly, not through the feature map, which would cancel where they are small.

    Raises:
        FlameError: shapes that do not fit together, or packed documents with a state.

    Arora et al., "Simple linear attention language models balance the recall-throughput tradeoff", 2024; Aksenov et
    al., "Linear Transformers with Learnable Kernel Functions are Better In-Context Models", 2024.
    """
    if q.shape != k.shape or q.dim() != 4 or v.shape[:3] != q.shape[:3]:
        raise FlameError(
            f"polynomial_attention: q and k [B, T, H, d], v [B, T, H, V] needed; got {tuple(q.shape)}, "
            f"{tuple(k.shape)}, {tuple(v.shape)}."
        )
    if cu_seqlens is not None and (q.shape[0] != 1 or initial_state is not None or output_final_state):
        raise FlameError("polynomial_attention: cu_seqlens needs B = 1 and neither takes nor gives a state.")
    if shard is not None:
        from flame.kernels.polynomial_attention.sharded import state_before

        refuse_states("polynomial_attention", initial_state, output_final_state)
        state = state_before(k, v, coefficients, cu_seqlens, shard)
        return polynomial_attention_chunked(q, k, v, coefficients, eps, state, cu_seqlens)[0], None
    name = select_backend(q, backend)
    if name == "triton" and initial_state is None and not output_final_state:
        from flame.kernels.polynomial_attention.triton_op import polynomial_triton, supported

        if supported(q, v):
            return polynomial_triton(q, k, v, coefficients, eps, cu_seqlens), None
    if name == "reference" and initial_state is None:
        o, final = polynomial_attention_reference(q, k, v, coefficients, eps, cu_seqlens), None
        if not output_final_state:
            return o, final
    o, state = polynomial_attention_chunked(q, k, v, coefficients, eps, initial_state, cu_seqlens)
    return o, state if output_final_state else None
