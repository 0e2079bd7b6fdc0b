"""What happens to keys before and after the products: unit length, the write strength, and the gradients of both."""

from __future__ import annotations

import triton
import triton.language as tl

UNIT_EPS = tl.constexpr(1e-6)  # that of `flame.kernels.normalization.l2_norm`


@triton.jit
def load_unit(base, row, stride, columns, keep, K: tl.constexpr, NORMALIZE: tl.constexpr):
    """Rows [R, BK] in fp32, of unit length if NORMALIZE; and what they were multiplied by, [R]."""
    mask = keep[:, None] & (columns < K)[None, :]
    x = tl.load(base + row[:, None] * stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    factor = tl.full([x.shape[0]], 1.0, tl.float32)
    if NORMALIZE:
        factor = tl.rsqrt(tl.sum(x * x, 1) + UNIT_EPS)
        x *= factor[:, None]
    return x, factor


@triton.jit
def unit_gradient(gradient, unit, factor, NORMALIZE: tl.constexpr):
    """Gradient of the rows that `load_unit` read, from that of the rows it gave."""
    if NORMALIZE:
        gradient = (gradient - unit * tl.sum(gradient * unit, 1)[:, None]) * factor[:, None]
    return gradient


@triton.jit
def prepare_keys(
    k_ptr,  # [T, H, K]
    beta_ptr,  # [T, H]
    unit_ptr,  # [T, H, K] fp16 or fp32, for the solver
    write_ptr,  # [T, H, K] beta times it
    rows,  # T * H
    stride_t,
    stride_h,
    H: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    columns = tl.arange(0, BK)
    keep = row < rows
    mask = keep[:, None] & (columns < K)[None, :]
    head = (row % H)[:, None] * stride_h
    k, _ = load_unit(k_ptr + head, row // H, stride_t, columns, keep, K, NORMALIZE)
    beta = tl.load(beta_ptr + row, mask=keep, other=0.0).to(tl.float32)
    at = row[:, None] * K + columns[None, :]
    tl.store(unit_ptr + at, k.to(unit_ptr.dtype.element_ty), mask=mask)
    tl.store(write_ptr + at, (k * beta[:, None]).to(write_ptr.dtype.element_ty), mask=mask)


@triton.jit
def finish_keys(
    k_ptr,  # [T, H, K]
    beta_ptr,  # [T, H]
    dunit_ptr,  # [T, H, K] gradient of the keys as what is written
    dwrite_ptr,  # [T, H, K] of beta times the keys, by the one state
    dwrite2_ptr,  # [T, H, K] and by the other
    dk_ptr,  # [T, H, K]
    dbeta_ptr,  # [T, H]
    rows,
    stride_t,
    stride_h,
    H: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    columns = tl.arange(0, BK)
    keep = row < rows
    mask = keep[:, None] & (columns < K)[None, :]
    head = (row % H)[:, None] * stride_h
    k, factor = load_unit(k_ptr + head, row // H, stride_t, columns, keep, K, NORMALIZE)
    beta = tl.load(beta_ptr + row, mask=keep, other=0.0).to(tl.float32)
    at = row[:, None] * K + columns[None, :]
    dwrite = tl.load(dwrite_ptr + at, mask=mask, other=0.0).to(tl.float32)
    dwrite += tl.load(dwrite2_ptr + at, mask=mask, other=0.0).to(tl.float32)
    dk = tl.load(dunit_ptr + at, mask=mask, other=0.0).to(tl.float32) + dwrite * beta[:, None]
    dk = unit_gradient(dk, k, factor, NORMALIZE)
    tl.store(dk_ptr + at, dk.to(dk_ptr.dtype.element_ty), mask=mask)
    tl.store(dbeta_ptr + row, tl.sum(dwrite * k, 1).to(dbeta_ptr.dtype.element_ty), mask=keep)
