"""The recurrences as the papers write them, one token at a time. In fp64 they are the oracle of every other form."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flame.kernels.delta_rule.problem import (
    Problem,
    Tied,
    Untied,
    compute_dtype,
    initial_state,
    normalized,
    repeat_heads,
)

Step = Callable[[int, Tensor], Tensor]  # (t, state [N, H, K, V]) -> state


def recurrence(p: Problem) -> tuple[Tensor, Tensor]:
    """o [B, T, H, V] in v's dtype and the final state [N, H, K, V]; states in fp32 (fp64 for fp64 inputs)."""
    step = tied_step(p) if isinstance(p, Tied) else untied_step(p)
    q = repeat_heads((normalized(p).q if isinstance(p, Tied) else p.q).to(compute_dtype(p)) * p.scale, p.heads)
    state = initial_state(p)
    if p.cu_seqlens is None:
        o, state = _sequence(step, q, 0, q.shape[1], state)
        return _joined([o], q, p.v), state
    bounds = p.cu_seqlens.tolist()
    outputs, finals = [], []
    for n, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:])):
        o, final = _sequence(step, q, start, stop, state[n : n + 1])
        outputs.append(o)
        finals.append(final)
    return _joined(outputs, q, p.v), torch.cat(finals)


def _sequence(step: Step, q: Tensor, start: int, stop: int, state: Tensor) -> tuple[list[Tensor], Tensor]:
    outputs = []
    for t in range(start, stop):
        state = step(t, state)
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return outputs, state


def _joined(pieces: list[list[Tensor]], q: Tensor, v: Tensor) -> Tensor:
    """Token outputs to [B, T, H, V]; tokens outside every document are zero."""
    outputs = [o for piece in pieces for o in piece]
    tail = q.new_zeros(*q.shape[:3], v.shape[-1])[:, len(outputs) :]
    return (torch.cat([torch.stack(outputs, 1), tail], 1) if outputs else tail).to(v.dtype)


def tied_step(p: Tied) -> Step:
    """Decay, read by the erase key, write; an exclusive read comes before the decay."""
    n, dtype = normalized(p), compute_dtype(p)
    k, v = repeat_heads(n.k, n.heads), n.v.to(dtype)
    erase = k if n.erase is None else repeat_heads(n.erase, n.heads)
    beta = None if n.beta is None else n.beta.to(dtype).unsqueeze(-1)

    def step(t: int, state: Tensor) -> Tensor:
        decayed = state if n.decay is None else state * _factor(n.decay[:, t].to(dtype))
        read = state if n.exclusive else decayed
        error = v[:, t] - torch.einsum("bhk,bhkv->bhv", erase[:, t], read)
        error = error if beta is None else beta[:, t] * error
        return decayed + k[:, t].unsqueeze(-1) * error.unsqueeze(-2)

    return step


def untied_step(p: Untied) -> Step:
    dtype = compute_dtype(p)
    k, v, a, b, decay = (x.to(dtype) for x in (p.k, p.v, p.a, p.b, p.decay))

    def step(t: int, state: Tensor) -> Tensor:
        read = torch.einsum("bhk,bhkv->bhv", a[:, t], state)
        write = b[:, t].unsqueeze(-1) * read.unsqueeze(-2) + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        return state * _factor(decay[:, t]) + write

    return step


def _factor(decay: Tensor) -> Tensor:
    """exp of a log decay [B, H] or [B, H, K], shaped to multiply a state [B, H, K, V]."""
    return decay.exp().unsqueeze(-1) if decay.dim() == 3 else decay.exp()[..., None, None]
