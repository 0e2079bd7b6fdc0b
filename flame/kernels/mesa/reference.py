"""The recurrence as the paper writes it: both states of every token formed, one linear system a token."""

from __future__ import annotations

import torch
from torch import Tensor

from flame.kernels.mesa.problem import Problem
from flame.kernels.mesa.solver import solve


def recurrence(p: Problem) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """o [B, T, H, V] in v's dtype and the final states [N, H, K, K], [N, H, K, V]."""
    keys, values = p.initial_states()
    if p.cu_seqlens is None:
        o, last = _sequence(p, 0, p.q.shape[1], keys, values)
        return o.to(p.v.dtype), last
    bounds, pieces, finals = p.cu_seqlens.tolist(), [], []
    for n, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:])):
        o, last = _sequence(p, start, stop, keys[n : n + 1], values[n : n + 1])
        pieces.append(o)
        finals.append(last)
    tail = p.v.new_zeros(1, p.q.shape[1] - bounds[-1], *p.v.shape[2:], dtype=p.compute_dtype)
    keys, values = (torch.cat(states) for states in zip(*finals))
    return torch.cat([*pieces, tail], 1).to(p.v.dtype), (keys, values)


def _sequence(p: Problem, start: int, stop: int, keys: Tensor, values: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    q, k, v, decay, beta = (x[:, start:stop].to(p.compute_dtype) for x in (p.q, p.k, p.v, p.log_decay.exp(), p.beta))
    if start == stop:
        return v, (keys, values)
    all_keys, all_values = [], []
    for t in range(stop - start):
        factor, write = decay[:, t, :, None, None], beta[:, t, :, None] * k[:, t]
        keys = factor * keys + write.unsqueeze(-1) * k[:, t].unsqueeze(-2)
        values = factor * values + write.unsqueeze(-1) * v[:, t].unsqueeze(-2)
        all_keys.append(keys)
        all_values.append(values)
    matrices, ridge = torch.stack(all_keys, 1), p.regularizer.to(p.compute_dtype)

    def operator(x: Tensor) -> Tensor:
        return torch.einsum("bthij,bthj->bthi", matrices, x) + ridge * x

    x = solve(operator, q, p.steps, p.scale_gradient)
    return torch.einsum("bthk,bthkv->bthv", x, torch.stack(all_values, 1)), (keys, values)
