"""The convolution as defined, one token at a time with a state of the last W inputs. Any dtype; fp64 is the oracle."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Step through every sequence of x `[B, T, C]`; returns y and the states `[N, C, W]` after the last token."""
    sequences = list(x) if cu_seqlens is None else list(x[0].split(cu_seqlens.diff().tolist()))
    outputs, states = [], []
    for n, sequence in enumerate(sequences):
        state = x.new_zeros(weight.shape) if initial_state is None else initial_state[n].to(x.dtype)
        steps = []
        for token in sequence:
            state = torch.cat([state[:, 1:], token[:, None]], dim=1)
            steps.append(step(state, weight, bias, activation))
        outputs.append(torch.stack(steps) if steps else sequence)
        states.append(state)
    y = torch.stack(outputs) if cu_seqlens is None else torch.cat(outputs)[None]
    return y, torch.stack(states)


def step(state: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """Output `[..., C]` of the token that is newest in `state` `[..., C, W]`."""
    wide = torch.promote_types(state.dtype, torch.float32)
    y = (state.to(wide) * weight.to(wide)).sum(-1)
    if bias is not None:
        y = y + bias.to(wide)
    return (F.silu(y) if activation == "silu" else y).to(state.dtype)
