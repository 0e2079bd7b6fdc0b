"""A loss of projected tokens without all their logits: three matrix products over few large chunks, on any device.

Per chunk of tokens: logits = hidden @ weight.T into one buffer that is allocated once; the loss's own row function turns
them into gradients in place; then d hidden = dlogits @ weight and d weight += dlogits.T @ hidden, accumulated in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MakeGradient = Callable[[Tensor, slice], None]  # (logits [n, V] of these tokens, in place; which tokens)


@dataclass(frozen=True)
class Chunking:
    """How many tokens' logits are alive at a time: at most `rows`, and at most `bytes` of them.

    Adding to the fp32 gradient of weight costs a read and a write of it a chunk. Chunks of 8192 tokens took the time of chunks
    of 11008 on an H200 (32768 x 2048 x 32000) and 172 MiB less.
    """

    rows: int = 8192
    bytes: int = 1 << 30
    multiple: int = 128  # of rows in a chunk: a tile of the matrix product

    def size(self, tokens: int, row_bytes: int) -> int:
        """Tokens a chunk, for `tokens` in all: even chunks, whole tiles."""
        most = max(self.multiple, min(self.rows, self.bytes // row_bytes) // self.multiple * self.multiple)
        count = max(1, -(-tokens // most))
        return max(1, min(tokens, -(-tokens // (count * self.multiple)) * self.multiple))


def default_chunking(hidden: Tensor) -> Chunking:
    """The measured choice for a GPU; little memory on a CPU."""
    return Chunking() if hidden.is_cuda else Chunking(bytes=1 << 25)


def through_logits(
    hidden: Tensor,
    weight: Tensor,
    make_gradient: MakeGradient,
    need_hidden: bool,
    need_weight: bool,
    chunking: Chunking,
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden `[N, D]`, in its dtype, and of weight `[V, D]`, in at least fp32; empty where not needed."""
    N, V = len(hidden), len(weight)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    hidden_grad = torch.empty_like(hidden) if need_hidden else hidden.new_empty(0)
    weight_grad = hidden.new_empty(weight.shape if need_weight else (0,), dtype=wide)
    size = chunking.size(N, V * hidden.element_size())
    buffer = padded_logits(size, V, hidden)
    for start in range(0, N, size):
        rows = slice(start, min(start + size, N))
        logits = buffer[: rows.stop - start]
        torch.mm(hidden[rows], weight.t(), out=logits)
        make_gradient(logits, rows)
        if need_hidden:
            torch.mm(logits, weight, out=hidden_grad[rows])
        if need_weight:
            add_product(weight_grad, logits.t(), hidden[rows], first=start == 0)
    if N == 0:
        weight_grad.zero_()
    return hidden_grad, weight_grad


def padded_logits(rows: int, vocabulary: int, like: Tensor) -> Tensor:
    """`[rows, V]` uninitialised, rows 128 bytes aligned so that any V suits the tensor cores' loads."""
    stride = -(-vocabulary // 64) * 64
    return like.new_empty(rows, stride)[:, :vocabulary]


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total (fp32) = a @ b, or += a @ b; bf16 operands, fp32 in between and in memory."""
    beta = 0 if first else 1
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
    elif not a.is_cuda:
        torch.addmm(total, a.to(total.dtype), b.to(total.dtype), beta=beta, out=total)
    elif first:
        torch.ops.aten.mm.dtype_out(a, b, total.dtype, out=total)
    else:
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
