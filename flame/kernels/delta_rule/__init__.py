"""The delta rule and its relatives: DeltaNet, Gated DeltaNet, DeltaProduct, Comba, Kimi Delta Attention, RWKV-7."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from flame.errors import FlameError
from flame.kernels.backend import select_backend
from flame.kernels.delta_rule.chunked import chunked
from flame.kernels.delta_rule.problem import (
    Problem,
    Tied,
    Untied,
    check_tied,
    check_untied,
    expand_steps,
    kernels_cover,
    steps_per_token,
)
from flame.kernels.delta_rule.reference import recurrence
from flame.kernels.sequence import SequenceShard, refuse_states

__all__ = ["delta_rule", "dplr_delta_rule"]

_BACKENDS = ("triton", "chunked", "reference")


def delta_rule(  # noqa: PLR0913 (one op for the whole family)
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    *,
    scalar_decay: Tensor | None = None,
    key_decay: Tensor | None = None,
    erase_key: Tensor | None = None,
    exclusive: bool = False,
    normalize: bool = False,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
    shard: SequenceShard | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``S_t = a_t S_{t-1} + beta_t k_t (v_t - S'^T p_t)^T``, ``o_t = scale * S_t^T q_t``, a_t = exp(decay).

    S' is the decayed state ``a_t S_{t-1}``, or ``S_{t-1}`` itself if `exclusive`; p is `erase_key`, k by default. With
    unit keys and beta in (0, 2) each token overwrites what the state holds under its key.

    Args:
        q: [B, T, Hk, K], fp32, bf16 or fp16 (fp64 on the torch forms).
        k: [B, T n, Hk, K]: n steps a token (DeltaProduct), rows of a token together. The decay acts before the first
            step, the read after the last.
        v: [B, T n, H, V]; Hk divides H, head h of v uses head h // (H / Hk) of q and k.
        beta: [B, T n, H] write strength, or None for 1.
        scalar_decay: [B, T, H] log decay, <= 0 (Gated DeltaNet).
        key_decay: [B, T, H, K] log decay of the state's rows, <= 0 (Kimi Delta Attention).
        erase_key: [B, T n, Hk, K], the key whose value is taken out (Comba).
        exclusive: read by the erase key before the decay (Comba).
        normalize: divide q, k and erase_key by sqrt(their sum of squares + 1e-6) first.
        scale: factor of q, K ** -0.5 when None.
        initial_state: [N, H, K, V] fp32, N = B or the number of documents.
        output_final_state: also return the state after the last token, [N, H, K, V] fp32.
        cu_seqlens: [N + 1] int32 token bounds of the documents packed into the one row of B = 1; they never meet.
        backend: 'triton', 'chunked' or 'reference'; None chooses by device (see `select_backend`).
        shard: this rank's part of a sequence cut over ranks (`flame.kernels.sequence`): computes as if it were whole,
            cu_seqlens being the bounds in this part. Excludes states.

    Logs are natural, sums and states fp32. Every tensor argument is differentiable, the final state too.

    Returns:
        o [B, T, H, V] in v's dtype, and the final state or None.

    Raises:
        FlameError: shapes that do not fit, or both decays.

    Papers: DeltaNet 2406.06484, Gated DeltaNet 2412.06464, DeltaProduct 2502.10297, Comba 2506.02475, KDA 2510.26692.
    """
    if scalar_decay is not None and key_decay is not None:
        raise FlameError("delta_rule: got scalar_decay and key_decay; add them into one key_decay.")
    if scalar_decay is not None and scalar_decay.dim() != 3:
        raise FlameError(f"delta_rule: scalar_decay must be [B, T, H], got {list(scalar_decay.shape)}.")
    if key_decay is not None and key_decay.dim() != 4:
        raise FlameError(f"delta_rule: key_decay must be [B, T, H, K], got {list(key_decay.shape)}.")
    steps = steps_per_token(q, k)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    decay = scalar_decay if key_decay is None else key_decay
    p = Tied(q, k, v, beta, decay, erase_key, exclusive, normalize, scale, initial_state, cu_seqlens)
    check_tied(p, steps)
    if shard is not None:
        refuse_states("delta_rule", initial_state, output_final_state)
    p = expand_steps(p, steps)
    if shard is not None:
        return _solve_part(p, backend, shard, steps), None
    o, final = _solve(p, backend)
    return o[:, steps - 1 :: steps], final if output_final_state else None


def dplr_delta_rule(  # noqa: PLR0913 (one op for the whole family)
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    key_decay: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
    shard: SequenceShard | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Diagonal plus low rank: ``S_t = diag(exp(w_t)) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T``, ``o_t = scale S_t^T q_t``.

    The transition of RWKV-7 (2503.14456), with a = -kappa and b = kappa * rate. The read by `a` comes before the decay.

    Args:
        q, k, a, b: [B, T, H, K]; v: [B, T, H, V].
        key_decay: w [B, T, H, K], natural log, <= 0.
        scale, initial_state, output_final_state, cu_seqlens, backend, shard: as in `delta_rule`.

    Returns:
        o [B, T, H, V] in v's dtype, and the final state [N, H, K, V] fp32 or None.

    Raises:
        FlameError: shapes that do not fit.
    """
    steps_per_token(q, k)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    p = Untied(q, k, v, a, b, key_decay, scale, initial_state, cu_seqlens)
    check_untied(p)
    if shard is not None:
        refuse_states("dplr_delta_rule", initial_state, output_final_state)
        return _solve_part(p, backend, shard, 1), None
    o, final = _solve(p, backend)
    return o, final if output_final_state else None


def _solve_part(p: Problem, backend: str | None, shard: SequenceShard, steps: int) -> Tensor:
    if isinstance(p, Tied) and _backend(p, backend) == "triton":
        from flame.kernels.delta_rule.triton_part import delta_rule_triton_part

        _refuse_uncovered(p)
        return delta_rule_triton_part(p, shard)[:, steps - 1 :: steps]
    from flame.kernels.delta_rule.sharded import sharded_delta_rule

    return sharded_delta_rule(p, partial(_solve, backend=backend), steps, shard)


def _backend(p: Problem, backend: str | None) -> str:
    return select_backend(p.q, backend, _BACKENDS if backend is not None or kernels_cover(p) else _BACKENDS[1:])


def _refuse_uncovered(p: Problem) -> None:
    if not kernels_cover(p):
        raise FlameError(
            f"delta_rule: no kernel for this form, keys of {p.k.shape[-1]} channels or {p.q.dtype}; leave backend "
            "at None or take 'chunked'."
        )


def _solve(p: Problem, backend: str | None) -> tuple[Tensor, Tensor]:
    name = _backend(p, backend)
    # A token alone is one step of the recurrence; padding it to a chunk would only waste the machine.
    if name == "reference" or (p.q.shape[1] == 1 and p.cu_seqlens is None and backend is None):
        return recurrence(p)
    if name == "triton":
        _refuse_uncovered(p)
        if isinstance(p, Tied):
            from flame.kernels.delta_rule.triton_op import delta_rule_triton

            return delta_rule_triton(p)
        from flame.kernels.delta_rule.triton_dplr_op import dplr_triton

        return dplr_triton(p)
    return chunked(p)
