"""Forward and gradients for no decay, a decay per head, and one per head and token.

With S the state and dS its gradient,

    o  = sweep(q, k, v)           dq = sweep(do, v, k)          dk = reverse sweep(v, do, q)     dv = reverse sweep(k, q, do)

so neither S nor dS goes to memory: each sweep carries its own. A sweep moves every tensor once (1 kB per token and head at
K = V = 128 in bf16), and its programs are the heads times the tiles of the output. The gradient of a log decay is the
suffix sum of ``q dq - k dk``: the forward-going sweep writes the first product in fp32 and its state before every chunk,
the reverse one finishes the sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from flame.kernels import tiles
from flame.kernels.linear_attention import triton_chunk_passes
from flame.kernels.linear_attention.triton_boundary import boundary_states
from flame.kernels.linear_attention.triton_layout import (
    Layout,
    ceil_div,
    item_settings,
    power_of_2,
    precision,
    strides,
    sum_groups,
)
from flame.kernels.linear_attention.triton_scalar import chunk_sums, scalar_sweep

BOUNDARY_ROWS = 64


class ChunkSums:
    """A scalar decay [B, T, HG] and its sums within chunks, made once for all sweeps whose chunks are alike."""

    def __init__(self, layout: Layout, decay: Tensor) -> None:
        self.layout, self.decay, self.made = layout, decay, {}

    def within(self, rows: int) -> Tensor:
        """[B, T, HG] fp32 in base 2."""
        if rows not in self.made:
            self.made[rows] = self._sum(rows)
        return self.made[rows]

    def _sum(self, rows: int) -> Tensor:
        layout, heads = self.layout, self.layout.decay_heads
        sums = torch.empty_like(self.decay, dtype=torch.float32)
        chunks = ceil_div(layout.items.segment, rows)
        width = min(64, power_of_2(heads))
        settings = item_settings(layout, sums)
        settings.pop("H")
        grid = (min(chunks, 16) if settings["VARLEN"] else chunks, layout.items.count, ceil_div(heads, width))
        chunk_sums[grid](self.decay, sums, **settings, HG=heads, BH=width, BT=rows, num_warps=4)
        return sums


@dataclass(frozen=True)
class DecayGradient:
    """Buffers shared by the two sweeps that give a decay's gradient."""

    rows: int  # of a chunk, in both
    product: Tensor  # [tiles, T, H] fp32
    anchors: Tensor  # [chunks, H, V, K] bf16, or fp32 for other dtypes
    ddecay: Tensor  # [tiles, T, H] fp32


def default_tile(D: int, E: int, dtype: torch.dtype) -> tiles.Tile:
    """A tile that compiles everywhere and spills few registers; `flame doctor --tune` finds faster ones."""
    wide = power_of_2(D) * (2 if dtype == torch.float32 else 1)
    rows = 64 if wide <= 512 else 16
    columns = min(64 if wide < 256 else 32, power_of_2(E))
    warps = 8 if wide >= 256 else 4
    return {"BT": rows, "BE": columns, "num_warps": warps, "num_stages": 2 if wide <= 256 else 1}


@lru_cache(maxsize=1024)
def _tile_key(name: str, kind: str, D: int, E: int, dtype: torch.dtype) -> tuple[str, tiles.Tile]:
    return tiles.key(name, kind=kind, D=D, E=E, dtype=dtype), default_tile(D, E, dtype)


def forward(
    layout: Layout, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, initial: Tensor | None, final: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """o [B, T, H, V], writing the final state into `final`; and the opening states of cut items."""
    rates = _rates(layout, decay)
    if not layout.items.cut:
        return sweep("forward", layout, (q, k, v), rates, initial=initial, final=final), None
    opening = boundary_states(layout, k, v, _boundary_decay(rates), rows=BOUNDARY_ROWS, initial=initial, final=final)
    return sweep("forward", layout, (q, k, v), rates, initial=opening), opening


def backward(
    layout: Layout,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    decay: Tensor | None,
    before: Tensor | None,
    after: Tensor | None,
    dinitial: Tensor | None,
    decay_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv and ddecay. `before` and `after` are the states at the items' openings and the gradient of the sequences'
    final states; the gradient of the initial states is written into `dinitial`."""
    q, k, v, do = tensors
    rates = _rates(layout, decay)
    if layout.items.cut:
        after = boundary_states(
            layout, q, do, _boundary_decay(rates), rows=BOUNDARY_ROWS, reverse=True, initial=after, final=dinitial
        )
        dinitial = None
    tile = triton_chunk_passes.choose(layout, q, k, decay_gradient)
    if tile["FORM"] != triton_chunk_passes.SWEEPS:
        sums = rates.within(triton_chunk_passes.ROWS) if isinstance(rates, ChunkSums) else rates
        *gradients, ddecay = triton_chunk_passes.backward(
            tile, layout, tensors, sums, (before, after, dinitial), decay_gradient
        )
        dq, dk, dv = (sum_groups(d, x.shape[2]) for d, x in zip(gradients, (q, k, v)))
        return dq, dk, dv, None if ddecay is None or decay is None else _decay_gradient(layout, ddecay, decay)
    gradient = _gradient_buffers(layout, q) if decay_gradient and decay is not None else None
    dq = sweep("dq", layout, (do, v, k), rates, initial=before, gradient=gradient, other=q)
    dk = sweep("dk", layout, (v, do, q), rates, initial=after, gradient=gradient, other=k)
    dv = sweep("dv", layout, (k, q, do), rates, initial=after, final=dinitial)
    dq, dk, dv = (sum_groups(d, x.shape[2]) for d, x in ((dq, q), (dk, k), (dv, v)))
    if gradient is None or decay is None:
        return dq, dk, dv, None
    ddecay = gradient.ddecay.sum(0) if gradient.ddecay.shape[0] > 1 else gradient.ddecay[0]
    return dq, dk, dv, _decay_gradient(layout, ddecay, decay)


def _decay_gradient(layout: Layout, ddecay: Tensor, decay: Tensor) -> Tensor:
    """That of a decay's heads, in its dtype, from that of every row and head."""
    ddecay = ddecay.view(layout.batch, layout.tokens, layout.decay_heads, -1)
    ddecay = ddecay.sum(-1) if ddecay.shape[-1] > 1 else ddecay.squeeze(-1)
    return (ddecay.sum((0, 1)) if layout.kind == "head" else ddecay).to(decay.dtype)


def _rates(layout: Layout, decay: Tensor | None) -> Tensor | ChunkSums | None:
    return ChunkSums(layout, decay) if layout.kind == "scalar" and decay is not None else decay


def _boundary_decay(rates: Tensor | ChunkSums | None) -> Tensor | None:
    return rates.within(BOUNDARY_ROWS) if isinstance(rates, ChunkSums) else rates


def _gradient_buffers(layout: Layout, q: Tensor) -> DecayGradient:
    choices = [_tile(name, layout, layout.V, layout.K, q) for name in ("dq", "dk")]
    chunk = choices[0]["BT"]
    shape = (layout.slots(chunk), layout.heads, layout.V, layout.K)
    anchors = q.new_empty(shape, dtype=torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32)
    rows = layout.batch * layout.tokens
    parts = [ceil_div(layout.K, tile["BE"]) for tile in choices]
    product, ddecay = (q.new_empty(count, rows, layout.heads, dtype=torch.float32) for count in parts)
    return DecayGradient(chunk, product, anchors, ddecay)


def _tile(name: str, layout: Layout, D: int, E: int, x: Tensor) -> tiles.Tile:
    key, default = _tile_key(name, layout.kind, D, E, x.dtype)
    return tiles.choose("linear_attention", key, default, x.device)


def sweep(
    name: str,
    layout: Layout,
    operands: tuple[Tensor, Tensor, Tensor],
    decay: Tensor | ChunkSums | None,
    *,
    initial: Tensor | None = None,
    final: Tensor | None = None,
    gradient: DecayGradient | None = None,
    other: Tensor | None = None,
) -> Tensor:
    """y [B, T, H, E] of the sweep called `name` (forward, dq, dk, dv) over (a, b, c); `other` is what y multiplies in
    `gradient`."""
    a, b, c = operands
    D, E, H = a.shape[-1], c.shape[-1], layout.heads
    tile = _tile(name, layout, D, E, a)
    if gradient is not None:
        tile = {**tile, "BT": gradient.rows}
    if isinstance(decay, ChunkSums):
        decay = decay.within(tile["BT"])
    y = a.new_empty((layout.batch, layout.tokens, H, E), dtype=c.dtype)
    x = c if other is None else other
    scalar_sweep[(ceil_div(E, tile["BE"]), layout.items.count * H)](
        a_ptr=a,
        b_ptr=b,
        c_ptr=c,
        x_ptr=x,
        y_ptr=y,
        decay_ptr=y if decay is None else decay,
        initial_ptr=y if initial is None else initial,
        final_ptr=y if final is None else final,
        anchor_ptr=y if gradient is None else gradient.anchors,
        product_ptr=y if gradient is None else gradient.product,
        ddecay_ptr=y if gradient is None else gradient.ddecay,
        scale=layout.scale,
        rows_total=layout.batch * layout.tokens,
        **item_settings(layout, y),
        **strides(a=a, b=b, c=c, x=x),
        GROUP_A=H // a.shape[2],
        GROUP_B=H // b.shape[2],
        GROUP_C=H // c.shape[2],
        GROUP_X=H // x.shape[2],
        GROUP_G=H // layout.decay_heads,
        D=D,
        E=E,
        BD=power_of_2(D),
        DECAY=layout.kind,
        REVERSE=name in ("dk", "dv"),
        TRANSPOSED=name in ("dq", "dk"),
        HAS_INITIAL=initial is not None,
        STORE_FINAL=final is not None,
        DECAY_GRADIENT=gradient is not None,
        READ_TILES=1 if gradient is None else gradient.product.shape[0],
        PRECISION=precision(a),
        **tile,
    )
    return y
