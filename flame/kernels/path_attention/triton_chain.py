"""How a group of neighbouring units moves queries and keys: small K x K matrices, and their gradients.

Unit c of a group moves a row past it by ``q - q E_c``. A query of unit a that visits unit b has passed those between:
``M[a, b] = (I - E_{a-1}) .. (I - E_{b+1})``. b = -1 moves it to before the group, and a = fan moves keys to the group's
end: ``k M[fan, b]^T``. Entries of the table are those with b < a - 1; entry 0 is the identity, which stands for b = a - 1.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def entry(a, b):
    """Place of M[a, b], -1 <= b < a, in a group's table."""
    return tl.where(b == a - 1, 0, a * (a - 1) // 2 + b + 2)


@triton.jit
def matrix(ptr, D: tl.constexpr):
    """Addresses of a dense [D, D]."""
    d = tl.arange(0, D)
    return ptr + d[:, None] * D + d[None, :]


@triton.jit
def unit_of(ptr, unit, units, D: tl.constexpr):
    """E of a unit [D, D], zero beyond the last."""
    held = unit + 0 * tl.arange(0, D) < units
    return tl.load(matrix(ptr + unit * (D * D), D), mask=held[:, None], other=0.0)


@triton.jit
def chain(
    e_ptr, m_ptr, joined_ptr, units, fan, groups, entries, BK: tl.constexpr, BR: tl.constexpr,
    JOIN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The table of one group [entries, BK, BK] for one a, BR of its rows, from e [rows, units, BK, BK]; with JOIN, for
    a = fan, E of the whole group as well: joined [rows, groups, BK, BK]. Units beyond the last do nothing."""
    a = tl.program_id(1)
    r = tl.program_id(2) * BR + tl.arange(0, BR)
    group = tl.program_id(0) % groups
    row = (tl.program_id(0) // groups).to(tl.int64)
    d = tl.arange(0, BK)
    table = m_ptr + (row * groups + group) * entries * (BK * BK)
    cells = r[:, None] * BK + d[None, :]
    eye = tl.where(r[:, None] == d[None, :], 1.0, 0.0)
    x = eye
    if a == 0:
        tl.store(table + cells, x.to(m_ptr.dtype.element_ty))
    for back in range(0, a):
        c = a - 1 - back
        unit = group * fan + c
        e = unit_of(e_ptr + row * units * (BK * BK), unit, units, BK)
        x -= tl.dot(x, e, input_precision=PRECISION)
        tl.store(table + (a * (a - 1) // 2 + c + 1) * (BK * BK) + cells, x.to(m_ptr.dtype.element_ty))
    if JOIN:
        tl.store(joined_ptr + (row * groups + group) * (BK * BK) + cells, eye - x, mask=(r * 0 + a == fan)[:, None])


@triton.jit
def carry(
    x_ptr, out_ptr, m_ptr, tokens, fan, groups, entries, H, Hk,
    BK: tl.constexpr, UNIT: tl.constexpr, KEYS: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of queries moved to before its group, or of keys to its end: x and out [rows, tokens, BK]."""
    tiles = tokens // BM
    tile = tl.program_id(0) % tiles
    row = (tl.program_id(0) // tiles).to(tl.int64)
    unit = tile * BM // UNIT
    place = entry(unit % fan, -1)
    source = row
    if KEYS:
        place = entry(fan, unit % fan)
    else:
        source = row // H * Hk + row % H // (H // Hk)
    m = tl.load(matrix(m_ptr + ((source * groups + unit // fan) * entries + place) * (BK * BK), BK))
    at = (row * tokens + tile * BM + tl.arange(0, BM))[:, None] * BK + tl.arange(0, BK)[None, :]
    x = tl.load(x_ptr + at)
    if KEYS:
        moved = tl.dot(x, tl.trans(m), input_precision=PRECISION)
    else:
        moved = tl.dot(x, m, input_precision=PRECISION)
    tl.store(out_ptr + at, moved.to(out_ptr.dtype.element_ty))


@triton.jit
def uncarry(
    x_ptr, moved_ptr, out_ptr, m_ptr, dm_ptr, tokens, fan, groups, entries, H, Hk,
    BK: tl.constexpr, UNIT: tl.constexpr, PART: tl.constexpr, KEYS: tl.constexpr, BM: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of `carry` for PART tokens: of x, from `moved_ptr`, that of its result; of the matrix, a part each.

    dm of queries [rows, groups, UNIT / PART, entries, BK, BK] at (a, -1); of keys [rows, groups, UNIT / PART, fan, BK, BK]
    at b + 1."""
    parts = tl.cdiv(tokens, PART)
    part = tl.program_id(0) % parts
    row = (tl.program_id(0) // parts).to(tl.int64)
    unit = part * PART // UNIT
    group = unit // fan
    source = row
    if KEYS:
        place = entry(fan, unit % fan)
        slot = unit % fan + 1
        keep = unit % fan < fan - 1
        size = fan
    else:
        source = row // H * Hk + row % H // (H // Hk)
        place = entry(unit % fan, -1)
        slot = place
        keep = unit % fan > 0
        size = entries
    m = tl.load(matrix(m_ptr + ((source * groups + group) * entries + place) * (BK * BK), BK))
    total = tl.zeros([BK, BK], tl.float32)
    for start in range(part * PART, tl.minimum((part + 1) * PART, tokens), BM):
        at = (row * tokens + start + tl.arange(0, BM))[:, None] * BK + tl.arange(0, BK)[None, :]
        x = tl.load(x_ptr + at)
        grad = tl.load(moved_ptr + at)
        if KEYS:
            total = tl.dot(tl.trans(grad), x, total, input_precision=PRECISION)
            out = tl.dot(grad, m, input_precision=PRECISION)
        else:
            total = tl.dot(tl.trans(x), grad, total, input_precision=PRECISION)
            out = tl.dot(grad, tl.trans(m), input_precision=PRECISION)
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty))
    split = part % (UNIT // PART)
    to = dm_ptr + (((row * groups + group) * (UNIT // PART) + split) * size + slot) * (BK * BK)
    if keep:
        tl.store(matrix(to, BK), total.to(dm_ptr.dtype.element_ty))


@triton.jit
def unchain(
    e_ptr, m_ptr, dm_ptr, dlast_ptr, djoined_ptr, units, tokens, fan, groups, entries, H, Hk,
    BK: tl.constexpr, UNIT: tl.constexpr, PART: tl.constexpr, TOP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the gradients of M[a, b] for one a ask of each E_c, c < a, in the place of M[a, c - 1]'s first part.

    The gradient y of M[a, b], with what comes from those farther, is moved on: ``M[a, b] = M[a, b + 1] (I - E_{b+1})``."""
    a = tl.program_id(1) + 1
    group = tl.program_id(0) % groups
    row = (tl.program_id(0) // groups).to(tl.int64)
    split: tl.constexpr = UNIT // PART
    here = tl.minimum(units - group * fan, fan)
    if (a >= here) & ((a < fan) | TOP):
        return
    each = H // Hk
    table = m_ptr + (row * groups + group) * entries * (BK * BK)
    last = dlast_ptr + (row * groups + group) * split * fan * (BK * BK)
    y = tl.zeros([BK, BK], tl.float32)
    first = 0 if TOP else -1
    for b in range(first, a - 1):
        queries = dm_ptr + ((row // Hk * H + row % Hk * each) * groups + group) * split * entries * (BK * BK)
        queries += entry(a, b) * (BK * BK)
        to = queries
        source = group * fan + a
        heads = each
        pace = entries
        if (a == fan) & (not TOP):
            to = last + (b + 1) * (BK * BK)
            source = group * fan + b
            heads = 1
            pace = fan
            if b == -1:
                heads = 0
                y -= tl.load(matrix(djoined_ptr + (row * groups + group) * (BK * BK), BK))
        # Parts beyond the end were never written.
        parts = tl.minimum(split, tl.cdiv(tokens - source * UNIT, PART))
        for h in range(0, heads):
            for s in range(0, parts):
                at = to + (h * groups * split * entries + s * pace) * (BK * BK)
                y += tl.load(matrix(at, BK)).to(tl.float32)
        m = tl.load(matrix(table + entry(a, b + 1) * (BK * BK), BK)).to(tl.float32)
        de = -tl.dot(tl.trans(m), y, input_precision=PRECISION)
        tl.store(matrix(to, BK), de.to(dm_ptr.dtype.element_ty))
        unit = group * fan + b + 1
        e = unit_of(e_ptr + row * units * (BK * BK), unit, units, BK)
        y -= tl.dot(y, tl.trans(e), input_precision=PRECISION)


@triton.jit
def gather(
    dm_ptr, dlast_ptr, out_ptr, units, fan, groups, entries, H, Hk, BK: tl.constexpr, SPLIT: tl.constexpr,
    TOP: tl.constexpr,
):  # fmt: skip
    """Gradient of one E [rows, units, BK, BK] from what `unchain` left."""
    unit = tl.program_id(0) % units
    row = (tl.program_id(0) // units).to(tl.int64)
    group = unit // fan
    c = unit % fan
    here = tl.minimum(units - group * fan, fan)
    total = tl.zeros([BK, BK], tl.float32)
    dm_ptr += ((row // Hk * H + row % Hk * (H // Hk)) * groups + group) * SPLIT * entries * (BK * BK)
    if (c > 0) | (not TOP):  # nobody passes the first unit of all
        for a in range(c + 1, here):
            total += tl.load(matrix(dm_ptr + entry(a, c - 1) * (BK * BK), BK)).to(tl.float32)
        if not TOP:
            at = dlast_ptr + ((row * groups + group) * SPLIT * fan + c) * (BK * BK)
            total += tl.load(matrix(at, BK)).to(tl.float32)
    tl.store(matrix(out_ptr + (row * units + unit) * (BK * BK), BK), total)
