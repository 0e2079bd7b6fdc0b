"""The gradients of `triton_chunks` and `triton_roles`: states around every chunk, then all gradients of a chunk at once."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flame.kernels import tiles
from flame.kernels.linear_attention import triton_chunks, triton_roles
from flame.kernels.linear_attention.triton_layout import (
    Layout,
    backward_key,
    ceil_div,
    item_settings,
    power_of_2,
    states_key,
    strides,
)

ROWS = 64  # of a chunk
# FORM of a tile, by who makes the gradients: `triton_scalar`, `triton_chunks`, `triton_roles`.
SWEEPS, CHUNKS, ROLES = 0, 1, 2


def choose(layout: Layout, q: Tensor, k: Tensor, decay_gradient: bool) -> tiles.Tile:
    """How gradients are made, with the tile of the kernel that does. Heads that share keys, or are wide, are made by roles;
    sweeps, which store no states, serve the rest, but for a decay per token, which they would have to spill for."""
    if q.dtype == torch.float32:
        return {"FORM": SWEEPS}
    own, shared = (q.shape[2] == k.shape[2] == layout.heads), q.shape[2] == k.shape[2] < layout.heads
    default: tiles.Tile = {"FORM": SWEEPS}
    if shared or max(layout.K, layout.V) > 128:
        default = {"FORM": ROLES, "BV": min(64, power_of_2(layout.V)), "num_warps": 4, "num_stages": 2}
    elif own and decay_gradient and layout.kind == "scalar":
        default = {"FORM": CHUNKS, "num_warps": 4, "num_stages": 1}
    key = backward_key(layout.kind, layout.K, layout.V, shared, q.dtype)
    return tiles.choose("linear_attention", key, default, q.device)


def backward(
    tile: tiles.Tile,
    layout: Layout,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    decay: Tensor | None,
    boundaries: tuple[Tensor | None, Tensor | None, Tensor | None],
    decay_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv [B, T, heads, D] and the decay's gradient [B, T, heads] fp32, of all heads or sums over some. `decay` is
    [HG], or sums within chunks of `ROWS`; `boundaries` are the states at the items' openings, the gradients at their ends, and
    where to write those of the initial states."""
    q, k, v, do = tensors
    before, after, dinitial = boundaries
    states = chunk_states(layout, (k, v), decay, initial=before)
    dstates = chunk_states(layout, (q, do), decay, reverse=True, initial=after, final=dinitial)
    settings = {name: value for name, value in tile.items() if name != "FORM"} | {"DECAY_GRADIENT": decay_gradient}
    made = (_by_chunks if tile["FORM"] == CHUNKS else _by_roles)(layout, tensors, decay, (states, dstates), settings)
    return made.dq, made.dk, made.dv, decay_gradients(layout, made.delta, made.carry) if decay_gradient else None


@dataclass(frozen=True)
class _Gradients:
    dq: Tensor  # [B, T, heads, K]
    dk: Tensor  # [B, T, heads, K]
    dv: Tensor  # [B, T, H, V]
    delta: Tensor  # [B, T, H | heads] fp32 (two of them in `triton_roles`), see `triton_chunks`
    carry: Tensor  # [chunks, H | heads] fp32


def _empty(layout: Layout, tensors: tuple[Tensor, ...], heads: int, sums: tuple[int, ...]) -> _Gradients:
    """`sums` is the leading shape of delta and carry, and their heads."""
    q, k, v, _ = tensors
    rows = (layout.batch, layout.tokens)
    *parts, own = sums
    return _Gradients(
        q.new_empty(*rows, heads, layout.K),
        k.new_empty(*rows, heads, layout.K),
        v.new_empty(*rows, layout.heads, layout.V),
        q.new_empty(*parts, *rows, own, dtype=torch.float32),
        q.new_empty(*parts, layout.slots(ROWS), own, dtype=torch.float32),
    )


def _arguments(
    layout: Layout,
    tensors: tuple[Tensor, ...],
    decay: Tensor | None,
    states: tuple[Tensor, Tensor],
    made: _Gradients,
) -> dict[str, Any]:
    q, k, v, do = tensors
    H = layout.heads
    return dict(
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        do_ptr=do,
        decay_ptr=made.dq if decay is None else decay,
        state_ptr=states[0],
        dstate_ptr=states[1],
        dq_ptr=made.dq,
        dk_ptr=made.dk,
        dv_ptr=made.dv,
        delta_ptr=made.delta,
        carry_ptr=made.carry,
        scale=layout.scale,
        **item_settings(layout, made.dq),
        **strides(q=q, k=k, v=v, d=do),
        GROUP_Q=H // q.shape[2],
        GROUP_K=H // k.shape[2],
        GROUP_V=H // v.shape[2],
        GROUP_G=H // layout.decay_heads,
        K=layout.K,
        V=layout.V,
        BK=power_of_2(layout.K),
        BT=ROWS,
        DECAY=layout.kind,
    )


def _by_chunks(
    layout: Layout,
    tensors: tuple[Tensor, ...],
    decay: Tensor | None,
    states: tuple[Tensor, Tensor],
    settings: dict[str, Any],
) -> _Gradients:
    made = _empty(layout, tensors, layout.heads, (layout.heads if settings["DECAY_GRADIENT"] else 0,))
    triton_chunks.chunk_gradients[(ceil_div(layout.items.segment, ROWS), layout.items.count * layout.heads)](
        **_arguments(layout, tensors, decay, states, made),
        BV=power_of_2(layout.V),
        **settings,
    )
    return made


def _by_roles(
    layout: Layout,
    tensors: tuple[Tensor, ...],
    decay: Tensor | None,
    states: tuple[Tensor, Tensor],
    settings: dict[str, Any],
) -> _Gradients:
    """dq and dk are summed over as many heads of a group as leave programs enough to fill the GPU."""
    q, k = tensors[:2]
    H = layout.heads
    group = math.gcd(H // q.shape[2], H // k.shape[2])
    chunks = ceil_div(layout.items.segment, ROWS)
    most = max(1, chunks * layout.items.count * H // tiles.multiprocessors(q.device))
    together = next(n for n in range(min(group, most), 0, -1) if group % n == 0)
    heads = H // together
    alike = decay is None or (H // layout.decay_heads) % together == 0
    made = _empty(layout, tensors, heads, (2, (heads if alike else H) if settings["DECAY_GRADIENT"] else 0))
    kernel = triton_roles.role_gradients if alike else triton_roles.group_gradients
    kernel[(3 * chunks, layout.items.count * heads)](
        **_arguments(layout, tensors, decay, states, made),
        rows_total=layout.batch * layout.tokens,
        slots_total=layout.slots(ROWS),
        BH=together,
        **settings,
    )
    return replace(made, delta=made.delta.sum(0), carry=made.carry.sum(0))


def chunk_states(
    layout: Layout,
    operands: tuple[Tensor, Tensor],
    decay: Tensor | None,
    *,
    reverse: bool = False,
    initial: Tensor | None = None,
    final: Tensor | None = None,
) -> Tensor:
    """[chunks, H, K, V]: states before chunks from (k, v), or in reverse the gradients after them from (q, do)."""
    b, c = operands
    H, K, V = layout.heads, layout.K, layout.V
    default = {"BK": min(64, power_of_2(K)), "BV": min(64, power_of_2(V)), "num_warps": 4, "num_stages": 3}
    tile = tiles.choose("linear_attention", states_key(layout.kind, K, V, b.dtype), default, b.device)
    state = b.new_empty(layout.slots(ROWS), H, K, V)
    triton_chunks.chunk_states[(ceil_div(K, tile["BK"]) * ceil_div(V, tile["BV"]), layout.items.count * H)](
        b_ptr=b,
        c_ptr=c,
        decay_ptr=state if decay is None else decay,
        initial_ptr=state if initial is None else initial,
        final_ptr=state if final is None else final,
        state_ptr=state,
        scale=layout.scale,
        **item_settings(layout, state),
        **strides(b=b, c=c),
        GROUP_B=H // b.shape[2],
        GROUP_C=H // c.shape[2],
        GROUP_G=H // layout.decay_heads,
        K=K,
        V=V,
        BT=ROWS,
        DECAY=layout.kind,
        REVERSE=reverse,
        HAS_INITIAL=initial is not None,
        STORE_FINAL=final is not None,
        **tile,
    )
    return state


def decay_gradients(layout: Layout, delta: Tensor, carry: Tensor) -> Tensor:
    """[B, T, heads] fp32."""
    H = delta.shape[-1]
    ddecay = torch.empty_like(delta)
    width = min(64, power_of_2(H))
    settings = {**item_settings(layout, delta), "H": H}
    chunks = ceil_div(layout.items.segment, ROWS)
    grid = (min(chunks, 16) if settings["VARLEN"] else chunks, layout.items.count, ceil_div(H, width))
    triton_chunks.decay_gradients[grid](delta, carry, ddecay, **settings, BH=width, BT=ROWS, num_warps=4)
    return ddecay
