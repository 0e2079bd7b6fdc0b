"""The fast path: forward and every gradient of linear attention as sweeps of one kernel.

With S the state and dS its gradient, and A_ij the decayed q_i . k_j,

    o  = sweep(q, k, v)           dq = sweep(do, v, k)          dk = reverse sweep(v, do, q)     dv = reverse sweep(k, q, do)

so neither S nor dS ever goes to memory: each sweep carries its own. A sweep moves every tensor once (1 kB per token and
head at K = V = 128 in bf16), and its programs are the heads times the tiles of the output. Where those do not fill the
GPU, time is cut in segments whose opening states come from `triton_states`.

The gradient of a log decay is the suffix sum of ``q dq - k dk`` (``o do - v dv`` for value_decay). The forward-going
sweep writes the first product in fp32 and the state every ANCHOR rows; the reverse one finishes the sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from flame.kernels import tiles
from flame.kernels.linear_attention.triton_scalar import scalar_sweep
from flame.kernels.linear_attention.triton_states import scan_segments, segment_states
from flame.kernels.linear_attention.triton_vector import vector_sweep

ANCHOR = 512  # rows between the states kept for a decay's gradient


@dataclass(frozen=True)
class Items:
    """How time is cut. An item is what one program walks: a sequence, or a segment of one."""

    count: int
    segment: int  # longest item
    per_row: int  # items a batch row has, dense
    starts: Tensor | None = None  # packed: bounds of every item, first item of every document [N + 1]
    ends: Tensor | None = None
    first: Tensor | None = None
    anchor_base: Tensor | None = None  # packed: first anchor of every item
    anchors: int = 0

    @property
    def cut(self) -> bool:
        """Whether a sequence may have several items, so that opening states are needed."""
        return self.first is not None or (self.starts is None and self.per_row > 1)


@dataclass(frozen=True)
class Layout:
    """Everything about a call but its tensors' contents."""

    kind: str
    batch: int
    tokens: int
    heads: int
    K: int
    V: int
    decay_heads: int
    scale: float
    items: Items

    @property
    def sequences(self) -> int:
        if self.items.first is not None:
            return self.items.first.numel() - 1
        return self.batch if self.items.starts is None else self.items.count


def power_of_2(x: int) -> int:
    return max(16, triton.next_power_of_2(x))


def cut_items(batch: int, tokens: int, programs: int, cu_seqlens: Tensor | None, multiprocessors: int) -> Items:
    """Cut time so that about two programs fall on each multiprocessor; `programs` is how many one item has."""
    wanted = 2 * multiprocessors
    if cu_seqlens is None:
        if batch * programs >= 0.75 * multiprocessors or tokens <= 2 * ANCHOR:
            per_row = 1
        else:
            per_row = min(-(-wanted // (batch * programs)), tokens // ANCHOR)
        segment = tokens if per_row == 1 else -(-tokens // per_row // ANCHOR) * ANCHOR
        per_row = max(1, -(-tokens // segment))
        anchors = batch * per_row * -(-segment // ANCHOR)
        return Items(batch * per_row, segment, per_row, anchors=anchors)
    return _packed_items(tokens, programs, cu_seqlens.to(torch.int32), wanted)


def _packed_items(tokens: int, programs: int, bounds: Tensor, wanted: int) -> Items:
    documents = bounds.numel() - 1
    starts, ends, first = bounds[:-1], bounds[1:], None
    # A document's length is not known here, so the cut depends on what is: rows and documents on average.
    segment = max(2 * ANCHOR, triton.next_power_of_2(max(1, tokens * programs // wanted)))
    if documents * programs < 0.75 * wanted or tokens > 16 * segment:
        if segment < tokens:
            starts, ends, first = _segment_bounds(bounds, segment, tokens // segment + documents)
    else:
        segment = tokens
    segment = min(segment, tokens)
    blocks = (ends - starts + ANCHOR - 1) // ANCHOR
    base = (blocks.cumsum(0) - blocks).to(torch.int32)
    count = starts.numel()
    return Items(count, segment, 1, starts, ends, first, base, tokens // ANCHOR + count)


def _segment_bounds(bounds: Tensor, segment: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bounds of `count` items (surplus ones empty) and the first item of each document, on the device."""
    lengths = bounds[1:] - bounds[:-1]
    per_document = (lengths + segment - 1) // segment
    last = per_document.cumsum(0)
    index = torch.arange(count, device=bounds.device)
    document = torch.searchsorted(last, index, right=True).clamp(max=lengths.numel() - 1)
    start = bounds[document] + (index - (last - per_document)[document]) * segment
    end = torch.minimum(start + segment, bounds[document + 1])
    real = index < last[-1]
    zero = torch.zeros_like(last[:1])
    starts, ends = (torch.where(real, x, 0).to(torch.int32) for x in (start, end))
    return starts, ends, torch.cat([zero, last]).to(torch.int32)


@dataclass(frozen=True)
class DecayGradient:
    """Buffers shared by the two sweeps that give a decay's gradient."""

    product: Tensor
    anchors: Tensor
    ddecay: Tensor
    dbonus: Tensor | None


def precision(x: Tensor) -> str:
    """fp32 operands keep fp32 accuracy (three tf32 products); the setting is without effect on 16-bit ones."""
    return "tf32x3" if x.dtype == torch.float32 else "ieee"


def default_tile(name: str, kind: str, D: int, E: int, dtype: torch.dtype) -> tiles.Tile:
    """A tile that compiles everywhere; `flame doctor --tune` finds faster ones."""
    wide, vector = power_of_2(D), kind in ("key", "value")
    big = wide * (2 if dtype == torch.float32 else 1)
    rows = 64 if big <= 256 else 32
    columns = 64 if big <= 256 else 32
    if vector:
        rows = 64 if big <= 128 else 32 if big <= 256 else 16
    if big > 512:
        rows, columns = 16, 16 if vector else 32
    warps = 8 if vector or wide >= 256 else 4
    return {"BT": rows, "BE": min(columns, power_of_2(E)), "num_warps": warps, "num_stages": 2 if big <= 128 else 1}


def sweep_tile(name: str, layout: Layout, D: int, E: int, x: Tensor) -> tiles.Tile:
    """The tile of the sweep called `name` (forward, dq, dk, dv)."""
    name_key = tiles.key(name, kind=layout.kind, D=D, E=E, dtype=x.dtype)
    default = default_tile(name, layout.kind, D, E, x.dtype)
    return tiles.choose("linear_attention", name_key, default, x.device)


def sweep(
    name: str,
    layout: Layout,
    operands: tuple[Tensor, Tensor, Tensor],
    decay: Tensor | None,
    bonus: Tensor | None,
    *,
    transposed: bool = False,
    initial: Tensor | None = None,
    final: Tensor | None = None,
    gradient: DecayGradient | None = None,
    other: Tensor | None = None,
    dtype: torch.dtype | None = None,
    store: bool = True,
) -> Tensor:
    """y [B, T, H, E] of one sweep over (a, b, c); reverse for dk and dv. `other` is what y multiplies in `gradient`."""
    a, b, c = operands
    D, E = a.shape[-1], c.shape[-1]
    tile = dict(sweep_tile(name, layout, D, E, a))
    H, items = layout.heads, layout.items
    y = a.new_empty((layout.batch, layout.tokens, H, E) if store else (0,), dtype=dtype or c.dtype)
    other = c if other is None else other
    nothing = y
    grid = (triton.cdiv(E, tile["BE"]), items.count * H)
    outer = (layout.kind == "key") == transposed
    pointers = {
        "a_ptr": a,
        "b_ptr": b,
        "c_ptr": c,
        "x_ptr": other,
        "y_ptr": y,
        "decay_ptr": nothing if decay is None else decay,
        "initial_ptr": nothing if initial is None else initial,
        "final_ptr": nothing if final is None else final,
        "anchor_ptr": nothing if gradient is None else gradient.anchors,
        "anchor_base_ptr": nothing if items.anchor_base is None else items.anchor_base,
        "product_ptr": nothing if gradient is None else gradient.product,
        "ddecay_ptr": nothing if gradient is None else gradient.ddecay,
        "starts_ptr": nothing if items.starts is None else items.starts,
        "ends_ptr": nothing if items.ends is None else items.ends,
    }
    settings = {
        "scale": layout.scale,
        "tokens": layout.tokens,
        "segment": items.segment,
        "segments": items.per_row,
        **strides(a=a, b=b, c=c, x=other),
        "H": H,
        "GROUP_A": H // a.shape[2],
        "GROUP_B": H // b.shape[2],
        "GROUP_C": H // c.shape[2],
        "GROUP_X": H // other.shape[2],
        "GROUP_G": H // layout.decay_heads,
        "D": D,
        "E": E,
        "BD": power_of_2(D),
        "REVERSE": name in ("dk", "dv"),
        "VARLEN": items.starts is not None,
        "TRANSPOSED": transposed,
        "HAS_INITIAL": initial is not None,
        "STORE_FINAL": final is not None,
        "DECAY_GRADIENT": gradient is not None,
        "ANCHOR": ANCHOR,
        "PRECISION": precision(a),
        **tile,
    }
    if layout.kind in ("key", "value"):
        extra = {
            "bonus_ptr": nothing if bonus is None else bonus,
            "dbonus_ptr": nothing if gradient is None or gradient.dbonus is None else gradient.dbonus,
            "LEVELS": tile["BT"].bit_length() - 1,
            "OUTER": outer,
            "BONUS": bonus is not None,
            "STORE_Y": store,
            "DOT": triton.language.float32 if a.dtype == torch.float32 else triton.language.bfloat16,
        }
        vector_sweep[grid](**pointers, **settings, **extra)
    else:
        scalar_sweep[grid](**pointers, **settings, DECAY=layout.kind, rows_total=layout.batch * layout.tokens)
    return y


def strides(**tensors: Tensor) -> dict[str, int]:
    """Row and head strides as kernel arguments, e.g. stride_at and stride_ah."""
    return {f"stride_{name}{axis}": x.stride(1 if axis == "t" else 2) for name, x in tensors.items() for axis in "th"}


def boundary_states(
    layout: Layout,
    b: Tensor,
    c: Tensor,
    decay: Tensor | None,
    *,
    reverse: bool,
    bonus: bool,
    initial: Tensor | None,
    final: Tensor | None,
) -> Tensor:
    """State at every item's opening [items, H, K, V], or in reverse its gradient at every item's end."""
    H, K, V, items = layout.heads, layout.K, layout.V, layout.items
    block_k, block_v = min(64, power_of_2(K)), min(64, power_of_2(V))
    state = b.new_empty(items.count, H, K, V, dtype=torch.float32)
    width = {"key": K, "value": V}.get(layout.kind, 1)
    total = b.new_empty(items.count, H, width, dtype=torch.float32)
    common = {"DECAY": layout.kind, "REVERSE": reverse, "VARLEN": items.starts is not None, "H": H, "K": K, "V": V}
    segment_states[(triton.cdiv(K, block_k) * triton.cdiv(V, block_v), items.count * H)](
        b_ptr=b,
        c_ptr=c,
        decay_ptr=total if decay is None else decay,
        state_ptr=state,
        total_ptr=total,
        starts_ptr=total if items.starts is None else items.starts,
        ends_ptr=total if items.ends is None else items.ends,
        scale=layout.scale if reverse else 1.0,
        tokens=layout.tokens,
        segment=items.segment,
        segments=items.per_row,
        **strides(b=b, c=c),
        GROUP_B=H // b.shape[2],
        GROUP_C=H // c.shape[2],
        GROUP_G=H // layout.decay_heads,
        BK=block_k,
        BV=block_v,
        BT=64 if b.dtype != torch.float32 else 32,
        BONUS=bonus,
        PRECISION=precision(b),
        num_warps=4,
        num_stages=3 if b.dtype != torch.float32 else 1,
        **common,
    )
    block = min(1024, power_of_2(K * V))
    scan_segments[(triton.cdiv(K * V, block), layout.sequences * H)](
        state_ptr=state,
        total_ptr=total,
        initial_ptr=state if initial is None else initial,
        final_ptr=state if final is None else final,
        first_ptr=total if items.first is None else items.first,
        segments=items.per_row,
        BLOCK=block,
        HAS_INITIAL=initial is not None,
        STORE_FINAL=final is not None,
        num_warps=4,
        **common,
    )
    return state
