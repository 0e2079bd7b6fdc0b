"""All tokens at once: W shifted copies of the input, weighted and summed. No host synchronisation."""

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
) -> Tensor:
    """y `[B, T, C]` in x.dtype; sums in at least fp32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    taps = weight.to(wide).unbind(-1)  # W of [C], the last multiplies the current token
    y = x.to(wide) * taps[-1]
    for shift in range(1, len(taps)):
        y = y + _shifted(x, shift, initial_state, cu_seqlens).to(wide) * taps[-1 - shift]
    if bias is not None:
        y = y + bias.to(wide)
    return (F.silu(y) if activation == "silu" else y).to(x.dtype)


def _shifted(x: Tensor, shift: int, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """x_{t-shift} `[B, T, C]`; what lies before a sequence comes from its state, or is zero."""
    T = x.shape[1]
    if cu_seqlens is None:
        before = x.new_zeros(x.shape[0], shift, x.shape[2])
        if initial_state is not None:
            before = initial_state[..., -shift:].transpose(1, 2).to(x.dtype)
        return torch.cat([before, x], dim=1)[:, :T]
    sequence, position = positions_in_sequences(cu_seqlens, T)
    earlier = F.pad(x, (0, 0, shift, 0))[:, :T]
    before = x.new_zeros(())
    if initial_state is not None:
        slot = (initial_state.shape[-1] + position - shift).clamp(max=initial_state.shape[-1] - 1)
        before = initial_state.transpose(1, 2)[sequence, slot].to(x.dtype)  # [T, C]
    return torch.where((position >= shift)[:, None], earlier, before)


def positions_in_sequences(cu_seqlens: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """For every packed token, which sequence it belongs to and its index therein, both `[length]` int64."""
    token = torch.arange(length, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True).clamp(max=len(cu_seqlens) - 2)
    return sequence, token - cu_seqlens[sequence]


def final_state(x: Tensor, width: int, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """The last `width` raw inputs of every sequence, newest last, older ones from the state: `[N, C, width]`."""
    if cu_seqlens is None:
        last = x[:, -width:].transpose(1, 2)  # [B, C, up to W]
        missing = width - last.shape[2]
        if missing == 0:
            return last.contiguous()  # not a view, which would keep all of x alive
        if initial_state is None:
            return F.pad(last, (missing, 0))
        return torch.cat([initial_state[..., -missing:].to(x.dtype), last], dim=2)
    slot = torch.arange(width, device=x.device)
    position = cu_seqlens.diff()[:, None] - width + slot  # [N, W], negative before the sequence
    inputs = x[0][(cu_seqlens[:-1, None] + position).clamp(0, x.shape[1] - 1)]  # [N, W, C]
    before = x.new_zeros(())
    if initial_state is not None:
        before_slot = (width + position).clamp(0, width - 1)[..., None].expand(-1, -1, x.shape[2])
        before = initial_state.transpose(1, 2).to(x.dtype).gather(1, before_slot.long())
    return torch.where((position >= 0)[..., None], inputs, before).transpose(1, 2)
