"""The recurrence as the paper's algebra gives it, one token at a time: the sequence so far is cut into the blocks that the
binary digits of its length name (a Fenwick tree), and every block has its own state."""

from __future__ import annotations

import torch
from torch import Tensor

from flame.kernels.log_linear_attention.problem import LevelStates, Problem, bit_length


def recurrence(p: Problem) -> tuple[Tensor, LevelStates]:
    """o [B, T, H, V] in v's dtype and the final states; states in fp32 (fp64 for fp64 inputs)."""
    initial = _initial(p)
    tensors = (p.wide(p.q) * p.scale, p.wide(p.k), p.wide(p.v), p.weights.to(p.compute_dtype), p.log_decay)
    beta = None if p.beta is None else p.beta.to(p.compute_dtype)
    if p.cu_seqlens is None:
        o, final = _sequence(tensors, beta, 0, p.q.shape[1], initial)
        return o.to(p.v.dtype), final
    bounds = p.cu_seqlens.tolist()
    pieces, states, counts = [], [], []
    for n, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:])):
        o, final = _sequence(tensors, beta, start, stop, LevelStates(*(x[n : n + 1] for x in initial)))
        pieces.append(o)
        states.append(final.states)
        counts.append(final.count)
    tail = tensors[2].new_zeros(tensors[2].shape)[:, bounds[-1] :]  # tokens outside every document
    return torch.cat([*pieces, tail], 1).to(p.v.dtype), LevelStates(torch.cat(states), torch.cat(counts))


def _initial(p: Problem) -> LevelStates:
    if p.initial is not None:
        return LevelStates(p.initial.states.to(p.compute_dtype), p.initial.count)
    shape = p.sequences, p.levels - 1, p.heads, p.k.shape[-1], p.v.shape[-1]
    return LevelStates(
        p.v.new_zeros(shape, dtype=p.compute_dtype), torch.zeros(shape[0], dtype=torch.int64, device=p.v.device)
    )


def _sequence(
    tensors: tuple[Tensor, ...], beta: Tensor | None, start: int, stop: int, state: LevelStates
) -> tuple[Tensor, LevelStates]:
    outputs = []
    for t in range(start, stop):
        q, k, v, weights, decay = (x[:, t] for x in tensors)
        o, state = token_step(q, k, v, weights, decay, None if beta is None else beta[:, t], state)
        outputs.append(o)
    return (torch.stack(outputs, 1) if outputs else tensors[2][:, :0]), state


def token_step(
    q: Tensor, k: Tensor, v: Tensor, weights: Tensor, decay: Tensor, beta: Tensor | None, state: LevelStates
) -> tuple[Tensor, LevelStates]:
    """Every state decays (and, by the delta rule, forgets what it holds under k); the token's own write is level 0.

    q, k [N, H, K], v [N, H, V], weights [N, H, L], decay and beta [N, H].
    """
    states = state.states * decay.exp()[:, None, :, None, None]
    write = k
    if beta is not None:
        write = k * beta.unsqueeze(-1)
        states = states - write[:, None, :, :, None] * torch.einsum("nhk,njhkv->njhv", k, states).unsqueeze(-2)
    update = write.unsqueeze(-1) * v.unsqueeze(-2)  # [N, H, K, V]
    read = torch.einsum("nhk,njhkv->nhjv", q, states)
    o = (weights[:, :, 1:, None] * read).sum(2) + weights[:, :, :1] * (q * write).sum(-1, keepdim=True) * v
    return o, LevelStates(merge(states, update, state.count), state.count + 1)


def merge(states: Tensor, update: Tensor, count: Tensor) -> Tensor:
    """Add a block of one to a counter at `count`: it and the blocks of its trailing ones become one block of the next size."""
    slots = states.shape[1]
    carried = bit_length(count ^ (count + 1)) - 1  # trailing ones of count
    target = carried.clamp(max=slots - 1).view(-1, 1, 1, 1, 1)
    slot = torch.arange(slots, device=states.device).view(1, -1, 1, 1, 1)
    below = states.masked_fill(slot >= target, 0.0).sum(1)
    merged = states + (below + update).unsqueeze(1)
    return torch.where(slot == target, merged, states.masked_fill(slot < target, 0.0))
