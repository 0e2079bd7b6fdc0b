"""The recurrence as the papers write it, one token at a time. In fp64 it is the oracle of every other form."""

from __future__ import annotations

import torch
from torch import Tensor

from flame.kernels.linear_attention.problem import Problem


def recurrence(problem: Problem) -> tuple[Tensor, Tensor]:
    """o [B, T, H, V] in v's dtype and the final state [N, H, K, V]; states in fp32 (fp64 for fp64 inputs)."""
    p = problem
    state = _initial(p)
    if p.cu_seqlens is None:
        o, state = _sequence(p, slice(None), 0, p.q.shape[1], state)
        return o.to(p.v.dtype), state
    bounds = p.cu_seqlens.tolist()
    pieces, finals = [], []
    for n, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:])):
        o, final = _sequence(p, slice(None), start, stop, state[n : n + 1])
        pieces.append(o)
        finals.append(final)
    tail = p.v.new_zeros(1, p.q.shape[1] - bounds[-1], p.heads, p.v.shape[-1])
    return torch.cat([*pieces, tail.to(state)], 1).to(p.v.dtype), torch.cat(finals)


def _initial(p: Problem) -> Tensor:
    if p.initial_state is not None:
        return p.initial_state.to(p.compute_dtype)
    return p.q.new_zeros(p.state_shape, dtype=p.compute_dtype)


def _sequence(p: Problem, batch: slice, start: int, stop: int, state: Tensor) -> tuple[Tensor, Tensor]:
    outputs = []
    for t in range(start, stop):
        q, k, v = (_token(x[batch, t], p) for x in (p.q, p.k, p.v))
        decay = p.decay if p.decay is None or p.kind == "head" else p.decay[batch, t]
        o, state = token_step(p, q, k, v, decay, state)
        outputs.append(o)
    if not outputs:
        return p.v.new_zeros(state.shape[0], 0, p.heads, p.v.shape[-1], dtype=state.dtype), state
    return torch.stack(outputs, 1), state


def _token(x: Tensor, p: Problem) -> Tensor:
    """[B, Hx, D] to [B, H, D] in the compute dtype."""
    return x.to(p.compute_dtype).repeat_interleave(p.heads // x.shape[1], 1)


def token_step(
    p: Problem, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token. q, k [B, H, K], v [B, H, V], state [B, H, K, V]; `decay` without its time axis. With a bonus the
    read comes first (RWKV6), otherwise decay, then write, then read."""
    factor = _factor(p, decay)
    update = k.unsqueeze(-1) * v.unsqueeze(-2)
    if p.bonus is not None:
        bonus = p.bonus.to(p.compute_dtype).unsqueeze(-1)
        o = torch.einsum("bhk,bhkv->bhv", q * p.scale, state + bonus * update)
        return o, factor * state + update
    state = update + (state if factor is None else factor * state)
    return torch.einsum("bhk,bhkv->bhv", q * p.scale, state), state


def _factor(p: Problem, decay: Tensor | None) -> Tensor | None:
    """exp(decay), shaped to multiply a state [B, H, K, V]."""
    if decay is None:
        return None
    heads = 0 if p.kind == "head" else 1
    factor = decay.to(p.compute_dtype).repeat_interleave(p.heads // p.decay_heads, heads).exp()
    if p.kind == "value":
        return factor.unsqueeze(-2)
    return factor.unsqueeze(-1) if p.kind == "key" else factor[..., None, None]
