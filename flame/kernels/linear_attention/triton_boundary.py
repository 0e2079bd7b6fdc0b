"""Opening states of segments: see `triton_states`."""

from __future__ import annotations

import torch
from torch import Tensor

from flame.kernels.linear_attention.triton_layout import (
    Layout,
    ceil_div,
    item_settings,
    power_of_2,
    precision,
    strides,
)
from flame.kernels.linear_attention.triton_states import scan_segments, segment_states


def boundary_states(
    layout: Layout,
    b: Tensor,
    c: Tensor,
    decay: Tensor | None,
    *,
    rows: int,
    reverse: bool = False,
    initial: Tensor | None = None,
    final: Tensor | None = None,
) -> Tensor:
    """State at every item's opening [items, H, K, V], or in reverse its gradient at every item's end.

    b [B, T, Hb, K] and c [B, T, Hc, V] are what the state sums; `decay` is [H], sums within chunks of `rows`, or for a decay
    per channel the factor of each chunk (b being decayed to the chunk's end already).
    """
    K, V, items = b.shape[-1], c.shape[-1], layout.items
    block_k, block_v = min(64, power_of_2(K)), min(64, power_of_2(V))
    state = b.new_empty(items.count, layout.heads, K, V, dtype=torch.float32)
    kind = "vector" if layout.kind in ("key", "value") else layout.kind
    total = b.new_empty(items.count, layout.heads, K if kind == "vector" else 1, dtype=torch.float32)
    common = {"DECAY": kind, "REVERSE": reverse, "K": K, "V": V}
    segment_states[(ceil_div(K, block_k) * ceil_div(V, block_v), items.count * layout.heads)](
        b_ptr=b,
        c_ptr=c,
        decay_ptr=total if decay is None else decay,
        state_ptr=state,
        total_ptr=total,
        scale=layout.scale if reverse else 1.0,
        **item_settings(layout, total),
        **strides(b=b, c=c),
        GROUP_B=layout.heads // b.shape[2],
        GROUP_C=layout.heads // c.shape[2],
        GROUP_G=layout.heads // layout.decay_heads,
        BK=block_k,
        BV=block_v,
        BT=rows,
        PRECISION=precision(b),
        num_warps=4,
        num_stages=3 if b.dtype != torch.float32 else 1,
        **common,
    )
    block = min(1024, power_of_2(K * V))
    scan_segments[(ceil_div(K * V, block), layout.sequences * layout.heads)](
        state_ptr=state,
        total_ptr=total,
        initial_ptr=state if initial is None else initial,
        final_ptr=state if final is None else final,
        first_ptr=total if items.first is None else items.first,
        segments=items.per_row,
        H=layout.heads,
        VARLEN=items.starts is not None,
        BLOCK=block,
        HAS_INITIAL=initial is not None,
        STORE_FINAL=final is not None,
        num_warps=4,
        **common,
    )
    return state
