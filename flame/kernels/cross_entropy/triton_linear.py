"""Linear + cross-entropy on a GPU: three matrix products of cuBLAS over few large chunks, and one row kernel.

Per chunk of tokens: logits = hidden @ weight.T into one buffer that is allocated once, the row kernel turns them into
gradients in place, then d hidden = dlogits @ weight and d weight += dlogits.T @ hidden with fp32 accumulation in memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flame.kernels.cross_entropy.options import Terms
from flame.kernels.cross_entropy.triton_rows import Rows, Tile, launch


@dataclass(frozen=True)
class Chunking:
    """Sizes of one run: bytes of logits alive, rows a step of logits and gradients (<= chunk), tile of the row kernel.

    d weight is accumulated once a chunk: a chunk costs a read and a write of its fp32 form. Within a chunk, steps small
    enough for the L2 cache (50 MB on Hopper) let the row kernel find the logits there.
    """

    bytes: int = 1 << 30
    step_rows: int = 0  # 0: the whole chunk
    tile: Tile | None = None


def padded_logits(rows: int, vocabulary: int, like: Tensor) -> Tensor:
    """`[rows, V]` uninitialised, rows 128 bytes aligned so that any V suits the tensor cores' loads."""
    stride = -(-vocabulary // 64) * 64
    return like.new_empty(rows, stride)[:, :vocabulary]


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total (fp32) = a @ b, or += a @ b; bf16 operands, fp32 in between and in memory."""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=0 if first else 1, out=total)
    elif not a.is_cuda:
        torch.addmm(total, a.to(total.dtype), b.to(total.dtype), beta=0 if first else 1, out=total)
    elif first:
        torch.ops.aten.mm.dtype_out(a, b, total.dtype, out=total)
    else:
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    terms: Terms,
    need_hidden: bool,
    need_weight: bool,
    chunking: Chunking = Chunking(),  # noqa: B008 - frozen
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss sum fp32, gradient of hidden in hidden.dtype, of weight in fp32 (empty where not needed)."""
    N, V = len(hidden), len(weight)
    labels = labels.contiguous()
    losses = hidden.new_empty(N, dtype=torch.float32)
    stats = None if need_hidden or need_weight else hidden.new_empty(N, 4, dtype=torch.float32)
    hidden_grad = torch.empty_like(hidden) if need_hidden else hidden.new_empty(0)
    weight_grad = hidden.new_empty(weight.shape if need_weight else (0,), dtype=torch.float32)
    chunk, step = chunk_rows(N, V, hidden.element_size(), chunking)
    buffer = padded_logits(chunk, V, hidden)
    for start in range(0, N, chunk):
        end = min(start + chunk, N)
        for at in range(start, end, step):
            rows = slice(at, min(at + step, end))
            logits = buffer[at - start : rows.stop - start]
            torch.mm(hidden[rows], weight.t(), out=logits)
            if stats is not None:
                launch(Rows(logits, labels[rows], loss=losses[rows], stats=stats[rows]), terms, True, chunking.tile)
                continue
            launch(Rows(logits, labels[rows], out=logits, loss=losses[rows]), terms, True, chunking.tile)
            if need_hidden:
                torch.mm(logits, weight, out=hidden_grad[rows])
        if need_weight:
            add_product(weight_grad, buffer[: end - start].t(), hidden[start:end], first=start == 0)
    if N == 0:
        weight_grad.zero_()
    return losses.sum(), hidden_grad, weight_grad


def chunk_rows(rows: int, vocabulary: int, element: int, chunking: Chunking) -> tuple[int, int]:
    """Rows a chunk and rows a step. Chunks are even, and a multiple of 128 rows (a tile of the matrix product)."""
    most = max(128, chunking.bytes // (vocabulary * element) // 128 * 128)
    count = max(1, -(-rows // most))
    chunk = max(1, min(rows, -(-rows // (count * 128)) * 128))
    return chunk, min(chunking.step_rows or chunk, chunk)
