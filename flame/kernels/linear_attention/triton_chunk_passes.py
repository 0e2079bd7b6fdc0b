"""The gradients of `triton_chunks`: states around every chunk, then all gradients of a chunk at once."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from flame.kernels import tiles
from flame.kernels.linear_attention import triton_chunks
from flame.kernels.linear_attention.triton_layout import Layout, ceil_div, item_settings, power_of_2, strides

ROWS = 64  # of a chunk


def takes(layout: Layout, q: Tensor, k: Tensor, decay_gradient: bool) -> bool:
    """Whether these gradients are the faster ones: with that of a decay per token, in 16 bits, of heads of up to 128."""
    own = q.shape[2] == k.shape[2] == layout.heads  # what heads share, they would write and sum again
    scalar = decay_gradient and layout.kind == "scalar"
    return scalar and own and q.dtype != torch.float32 and max(layout.K, layout.V) <= 128


def backward(
    layout: Layout,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    decay: Tensor | None,
    before: Tensor | None,
    after: Tensor | None,
    dinitial: Tensor | None,
    decay_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv of all heads [B, T, H, D] and the decay's gradient [B, T, H] fp32. `decay` is [HG], or sums within chunks
    of `ROWS`; `before` and `after` are the states at the items' openings and the gradients at their ends."""
    q, k, v, do = tensors
    states = chunk_states(layout, (k, v), decay, initial=before)
    dstates = chunk_states(layout, (q, do), decay, reverse=True, initial=after, final=dinitial)
    shape = (layout.batch, layout.tokens, layout.heads)
    dq, dk, dv = q.new_empty(*shape, layout.K), k.new_empty(*shape, layout.K), v.new_empty(*shape, layout.V)
    delta = q.new_empty(shape if decay_gradient else 0, dtype=torch.float32)
    carry = q.new_empty(layout.slots(ROWS) if decay_gradient else 0, layout.heads, dtype=torch.float32)
    settings = item_settings(layout, dq)
    H = layout.heads
    triton_chunks.chunk_gradients[(ceil_div(layout.items.segment, ROWS), layout.items.count * H)](
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        do_ptr=do,
        decay_ptr=dq if decay is None else decay,
        state_ptr=states,
        dstate_ptr=dstates,
        dq_ptr=dq,
        dk_ptr=dk,
        dv_ptr=dv,
        delta_ptr=delta,
        carry_ptr=carry,
        scale=layout.scale,
        **settings,
        **strides(q=q, k=k, v=v, d=do),
        GROUP_Q=H // q.shape[2],
        GROUP_K=H // k.shape[2],
        GROUP_V=H // v.shape[2],
        GROUP_G=H // layout.decay_heads,
        K=layout.K,
        V=layout.V,
        BK=power_of_2(layout.K),
        BV=power_of_2(layout.V),
        BT=ROWS,
        DECAY=layout.kind,
        DECAY_GRADIENT=decay_gradient,
        **_tile("gradients", layout.kind, layout.K, layout.V, q),
    )
    return dq, dk, dv, decay_gradients(layout, delta, carry) if decay_gradient else None


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
    tile = _tile("states", layout.kind, K, V, b)
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
    """[B, T, H] fp32."""
    H = layout.heads
    ddecay = torch.empty_like(delta)
    width = min(64, power_of_2(H))
    settings = item_settings(layout, delta)
    chunks = ceil_div(layout.items.segment, ROWS)
    grid = (min(chunks, 16) if settings["VARLEN"] else chunks, layout.items.count, ceil_div(H, width))
    triton_chunks.decay_gradients[grid](delta, carry, ddecay, **settings, BH=width, BT=ROWS, num_warps=4)
    return ddecay


def _tile(name: str, kind: str, K: int, V: int, x: Tensor) -> tiles.Tile:
    key, default = _choices(name, kind, K, V, x.dtype)
    return tiles.choose("linear_attention", key, default, x.device)


@lru_cache(maxsize=1024)
def _choices(name: str, kind: str, K: int, V: int, dtype: torch.dtype) -> tuple[str, tiles.Tile]:
    key = tiles.key(name, kind=kind, K=K, V=V, dtype=dtype)
    if name == "states":
        return key, {"BK": min(64, power_of_2(K)), "BV": min(64, power_of_2(V)), "num_warps": 4, "num_stages": 3}
    return key, {"num_warps": 4, "num_stages": 1}
