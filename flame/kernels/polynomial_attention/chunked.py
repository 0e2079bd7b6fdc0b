"""Quadratic-score attention in chunks: pairs inside a chunk directly, earlier chunks through a feature-space state."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from flame.kernels.elementwise_scan.chunked import linear_scan
from flame.kernels.elementwise_scan.segments import document_ids

CHUNK = 64


def feature_count(dim: int, coefficients: tuple[float, float, float]) -> int:
    """Features of the map whose inner product is `c0 + c1 s + c2 s^2`."""
    sizes = (1, dim, dim * (dim + 1) // 2)
    return sum(size for size, coefficient in zip(sizes, coefficients) if coefficient)


def polynomial_features(x: Tensor, coefficients: tuple[float, float, float]) -> Tensor:
    """`[..., d] -> [..., F]` with `f(q) . f(k) = c0 + c1 s + c2 s^2`, `s = q k / sqrt(d)`."""
    dim = x.shape[-1]
    parts = []
    if coefficients[0]:
        parts.append(torch.full_like(x[..., :1], math.sqrt(coefficients[0])))
    if coefficients[1]:
        parts.append(x * math.sqrt(coefficients[1] / math.sqrt(dim)))
    if coefficients[2]:
        factor = math.sqrt(coefficients[2] / dim)
        rows, columns = torch.triu_indices(dim, dim, offset=1, device=x.device)
        parts += [x.square() * factor, x[..., rows] * x[..., columns] * (math.sqrt(2.0) * factor)]
    return torch.cat(parts, dim=-1)


def polynomial_attention_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coefficients: tuple[float, float, float],
    eps: float,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `flame.kernels.polynomial_attention.polynomial_attention`; always returns the final state too."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    length = q.shape[1]
    chunk = min(CHUNK, length)
    tail = -length % chunk
    ones = torch.ones_like(v[..., :1])
    q, k, v1 = (_chunks(x.to(dtype), chunk, tail) for x in (q, k, torch.cat((v, ones), dim=-1)))
    if cu_seqlens is None:
        ids = torch.zeros(length, dtype=torch.int32, device=v.device)
    else:
        ids = document_ids(cu_seqlens, length)
    ids = pad(ids, (0, tail), value=-1).view(-1, chunk)

    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # [B, H, NC, C, C]
    weights = (coefficients[0] + coefficients[1] * scores + coefficients[2] * scores.square()).tril()
    weights = weights.masked_fill(ids[:, :, None] != ids[:, None, :], 0.0)
    before, final = _chunk_states(polynomial_features(k, coefficients), v1, ids, length, initial_state)
    # A token sees the state before its chunk if its document was already open there.
    opened = torch.ones_like(ids[:, :1]) * ids[0, 0]
    opened = torch.cat((opened[:1], ids[:-1, -1:]))
    visible = (ids == opened)[..., None].to(dtype)
    o = weights @ v1 + (polynomial_features(q, coefficients) * visible) @ before
    o = o[..., :-1] / (o[..., -1:] + eps)
    return o.flatten(2, 3).transpose(1, 2)[:, :length].to(v.dtype), final


def _chunks(x: Tensor, chunk: int, tail: int) -> Tensor:
    """`[B, T, H, D] -> [B, H, NC, C, D]`, zeros after the end."""
    return pad(x, (0, 0, 0, 0, 0, tail)).transpose(1, 2).unflatten(2, (-1, chunk))


def _chunk_states(
    features: Tensor, v1: Tensor, ids: Tensor, length: int, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """State before every chunk `[B, H, NC, F, V + 1]` and after the last token, of the document open at that point."""
    last = ids[:, -1:].clone()
    last[-1] = ids.view(-1)[length - 1]  # the tail is padding
    kept = (ids == last)[..., None].to(v1.dtype)
    written = (features * kept).transpose(-1, -2) @ v1
    continued = torch.cat((torch.ones_like(last[:1, 0]), (last[1:, 0] == last[:-1, 0]).int()))  # chunk after chunk
    decay = continued.to(v1.dtype).view(1, -1, 1, 1)
    sums = written.flatten(0, 1)  # [B * H, NC, F, V + 1]
    if initial_state is not None:
        kept_on = (last[0] == ids[0, 0]).to(v1.dtype)  # the document that it belongs to may end in the first chunk
        sums = torch.cat(
            (sums[:, :1] + kept_on * initial_state.to(v1.dtype).flatten(0, 1)[:, None], sums[:, 1:]), dim=1
        )
    sums = linear_scan(decay.expand_as(sums), sums)
    first = torch.zeros_like(sums[:, :1])
    if initial_state is not None:
        first = first + initial_state.to(v1.dtype).flatten(0, 1)[:, None]
    before = torch.cat((first, sums[:, :-1]), dim=1)
    return before.unflatten(0, written.shape[:2]), sums[:, -1].unflatten(0, written.shape[:2])
