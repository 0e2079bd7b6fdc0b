"""PaTH as defined: every step reflects all keys so far, appends its own, and attends. Any dtype; fp64 is the oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from flame.kernels.path_attention.problem import Problem


def path_attention(p: Problem) -> Tensor:
    documents = [_attend(document) for document in p.documents()]
    return torch.cat(documents, 1) if documents else p.q.new_empty(*p.q.shape[:3], p.v.shape[3])


def _attend(p: Problem) -> Tensor:
    wide = torch.promote_types(p.q.dtype, torch.float32)
    q, k, v, w, beta = (x.to(wide) for x in (p.q, p.k, p.v, p.w, p.beta))
    groups, cached = q.shape[2] // k.shape[2], k.shape[1] - q.shape[1]
    gates = q.new_zeros(*k.shape[:2], q.shape[2]) if p.log_forget is None else p.log_forget.to(wide)
    keys, outputs = k[:, :cached], []  # [B, t, Hk, K]
    for t in range(q.shape[1]):
        reach = torch.einsum("bthk,bhk->bth", keys, w[:, t]) * beta[:, t, None]
        keys = torch.cat([keys - reach[..., None] * w[:, t, None], k[:, cached + t, None]], 1)
        seen = slice(0, cached + t + 1)
        forget = gates[:, seen].flip(1).cumsum(1).flip(1) - gates[:, seen]  # over j + 1 .. t
        scores = torch.einsum("bthk,bhk->bth", keys.repeat_interleave(groups, 2), q[:, t]) + forget
        weights = (scores * p.scale).softmax(1)
        outputs.append(torch.einsum("bth,bthv->bhv", weights, v[:, seen].repeat_interleave(groups, 2)))
    return torch.stack(outputs, 1).to(p.q.dtype) if outputs else p.q.new_empty(*p.q.shape[:3], v.shape[3])
