"""The mesa layer: a regularised least-squares fit of values to keys at every token (von Oswald et al., 2506.05233)."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from flame.kernels.backend import select_backend
from flame.kernels.mesa.chunked import chunked
from flame.kernels.mesa.problem import Problem, check, supported, unit_rows
from flame.kernels.mesa.reference import recurrence
from flame.kernels.sequence import SequenceShard, refuse_states

__all__ = ["mesa"]


def mesa(  # noqa: PLR0913 (one op)
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    regularizer: Tensor,
    *,
    steps: int = 30,
    key_state: Tensor | None = None,
    value_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    scale_gradient: bool = True,
    normalize: bool = False,
    backend: str | None = None,
    shard: SequenceShard | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """``o_t = G_t^T (H_t + diag(l))^-1 q_t`` with ``H_t = d_t H_{t-1} + b_t k_t k_t^T``, ``G_t = d_t G_{t-1} + b_t k_t v_t^T``.

    The system is solved by `steps` conjugate-gradient steps from zero, with 1e-5 added to both denominators (part of the
    definition). Gradients are those of the solution, found by a second solve of the same number of steps, not those of
    the steps; they are as approximate as that solve.

    Args:
        q, k: [B, T, H, K]; unit length in MesaNet.
        v: [B, T, H, V].
        log_decay: [B, T, H] natural log of d, <= 0.
        beta: b [B, T, H] write strength.
        regularizer: l [H, K], positive.
        steps: conjugate-gradient steps, forward and backward.
        key_state, value_state: H [N, H, K, K] and G [N, H, K, V] before the first token, fp32; zero when None.
        output_final_state: also return both states after the last token.
        cu_seqlens: [N + 1] int32 bounds of the documents packed into the one row of B = 1.
        scale_gradient: solve for gradients brought to length one, so that their size does not matter. False is the
            reference's way, where those of a loss averaged over many tokens all but vanish beside the 1e-5.
        normalize: bring q and k to unit length first, as `l2_norm` does. On the fast path this happens inside the kernels,
            which then keep no copy of the unit vectors.
        backend: 'triton', 'chunked' or 'reference'; None chooses by device (see `select_backend`). The kernels take
            K <= 128 and V <= 256; other sizes and fp64 get the chunked form. They stop a chunk's iteration early once its
            remaining steps can change no row beyond rounding.
        shard: this rank's part of a sequence cut over ranks (`flame.kernels.sequence`): computes as if it were whole,
            cu_seqlens being the bounds in this part. Excludes states.

    Returns:
        o [B, T, H, V] in v's dtype, and (H, G) or None. Sums and states are fp32.

    Raises:
        FlameError: shapes that do not fit, or steps < 1.
    """
    p = Problem(
        q, k, v, log_decay, beta, regularizer, steps, key_state, value_state, cu_seqlens, scale_gradient, normalize
    )
    check(p)
    if shard is not None:
        from flame.kernels.mesa.sharded import states_before

        refuse_states("mesa", key_state, value_state, output_final_state)
        p = unit_rows(p)
        key_state, value_state = states_before(p, shard)
        p = replace(p, key_state=key_state, value_state=value_state)
    name = select_backend(q, backend, ("triton", "chunked", "reference"))
    if name == "triton" and supported(p):
        from flame.kernels.mesa.triton_op import mesa_triton

        return mesa_triton(p, output_final_state)
    p = unit_rows(p)
    single = q.shape[1] == 1 and cu_seqlens is None and backend is None
    o, final = recurrence(p) if name == "reference" or single else chunked(p)
    return o, final if output_final_state else None
