"""Mamba's selective scan: a diagonal state-space recurrence with input-dependent step, input and output maps."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from flame.kernels.backend import select_backend
from flame.kernels.selective_scan.chunked import selective_scan_chunked
from flame.kernels.selective_scan.inputs import ScanInputs
from flame.kernels.selective_scan.reference import selective_scan_reference
from flame.kernels.sequence import SequenceShard, opening_states, refuse_states

__all__ = ["ScanInputs", "selective_scan", "selective_scan_step"]


def selective_scan(  # noqa: PLR0913
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
    shard: SequenceShard | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T`, `y_t = (h_t C_t + D x_t) * silu(z_t)`.

    Args:
        x: inputs, `[B, T, E]`.
        dt: step sizes before bias and softplus, `[B, T, E]`; the recurrence uses `softplus(dt + dt_bias)`.
        A: `[E, S]` fp32, negative (`-exp(A_log)`).
        B, C: input and output maps, `[B, T, S]`, shared by all channels.
        D: skip weight `[E]`, or None.
        z: gate before its SiLU, `[B, T, E]`, or None.
        dt_bias: `[E]`, or None.
        initial_state: `[N, E, S]` fp32, one for each row, or each document when packed. Differentiable.
        output_final_state: also return the states after the last token, `[N, E, S]` fp32. Differentiable.
        cu_seqlens: `[N + 1]` int32 document boundaries; then `B == 1` and no state crosses a boundary.
        backend: 'triton', 'chunked' or 'reference'; None chooses.
        shard: this rank's part of a sequence cut over ranks (`flame.kernels.sequence`): computes as if it were whole,
            cu_seqlens being the bounds in this part. Excludes states.

    Returns:
        `(y [B, T, E] in x.dtype, final_state or None)`. States and accumulation are fp32 (fp64 for fp64 inputs on the
        torch backends).

    Raises:
        FlameError: shapes that do not belong together, or packed documents with more than one row.

    Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023.
    """
    inputs = ScanInputs(x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens)
    inputs.check()
    if shard is not None:
        refuse_states("selective_scan", initial_state, output_final_state)
        inputs = replace(inputs, initial_state=_incoming(inputs, backend, shard))
    chosen = select_backend(x, backend)
    if chosen == "triton":
        from flame.kernels.selective_scan.triton_scan import selective_scan_triton

        y, final = selective_scan_triton(inputs)
    elif chosen == "chunked":
        y, final = selective_scan_chunked(inputs, output_final_state)
    else:
        y, final = selective_scan_reference(inputs)
    return y, final if output_final_state else None


def _incoming(inputs: ScanInputs, backend: str | None, shard: SequenceShard) -> Tensor:
    """[N, E, S] states that this rank's documents start with. The outputs read them through a sum over S that is never
    formed, so a first scan, which only finds what this rank adds to the state, is cheaper than a correction."""
    options = {**vars(inputs), "D": None, "z": None}
    _, final = selective_scan(**options, output_final_state=True, backend=backend)
    assert final is not None
    dt = inputs.dt.to(final.dtype)
    dt = softplus(dt if inputs.dt_bias is None else dt + inputs.dt_bias.to(final.dtype)).sum(1)
    whole = (dt[..., None] * inputs.A.to(final.dtype)).exp()
    rows = len(inputs.x)
    incoming = shard.carry(final[-rows:], whole if len(final) == rows else torch.zeros_like(whole))
    return opening_states(incoming, len(final))


def selective_scan_step(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """One decode step from `initial_state`: tensors as in `selective_scan` with `T == 1`; returns `(y, new state)`."""
    dtype = torch.promote_types(inputs.x.dtype, torch.float32)
    x, dt = inputs.x[:, 0].to(dtype), inputs.dt[:, 0].to(dtype)
    dt = softplus(dt if inputs.dt_bias is None else dt + inputs.dt_bias.to(dtype))[..., None]
    state = (dt * inputs.A.to(dtype)).exp() * inputs.initial_state + dt * x[..., None] * inputs.B.to(dtype)
    y = (state * inputs.C.to(dtype)).sum(-1)
    if inputs.D is not None:
        y = y + inputs.D.to(dtype) * x
    if inputs.z is not None:
        y = y * silu(inputs.z[:, 0].to(dtype))
    return y[:, None].to(inputs.x.dtype), state
