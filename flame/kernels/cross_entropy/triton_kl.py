"""Row kernel of the KL divergence: student and teacher logits in, loss out, the student's logits turned into gradients."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flame.kernels.layout import power_of_2

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _kl_kernel(
    student, teacher, valid_ptr, loss, student_stride, teacher_stride, V, inverse_temperature,
    WRITE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row, read in tiles twice: running max and sums of both distributions, then the gradient in place."""
    index = tl.program_id(0).to(tl.int64)
    s_row = student + index * student_stride
    t_row = teacher + index * teacher_stride
    valid = tl.load(valid_ptr + index) != 0
    s_max = float("-inf")
    t_max = float("-inf")
    s_sum = tl.zeros((BLOCK,), tl.float32)
    t_sum = tl.zeros((BLOCK,), tl.float32)
    cross = tl.zeros((BLOCK,), tl.float32)  # sum of exp(t - max) * (t - s)
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        s = tl.load(s_row + column, mask=column < V, other=float("-inf")).to(tl.float32) * inverse_temperature
        t = tl.load(t_row + column, mask=column < V, other=float("-inf")).to(tl.float32) * inverse_temperature
        s_new = tl.maximum(s_max, tl.max(s, axis=0))
        t_new = tl.maximum(t_max, tl.max(t, axis=0))
        s_sum = s_sum * tl.exp2((s_max - s_new) * _LOG2E) + tl.exp2((s - s_new) * _LOG2E)
        decay = tl.exp2((t_max - t_new) * _LOG2E)
        weight = tl.exp2((t - t_new) * _LOG2E)
        t_sum = t_sum * decay + weight
        cross = cross * decay + tl.where(column < V, weight * (t - s), 0.0)
        s_max = s_new
        t_max = t_new
    t_total = tl.sum(t_sum, axis=0)
    s_lse = s_max + tl.log2(tl.sum(s_sum, axis=0)) / _LOG2E
    t_lse = t_max + tl.log2(t_total) / _LOG2E
    tl.store(loss + index, tl.where(valid, tl.sum(cross, axis=0) / t_total - t_lse + s_lse, 0.0))
    if WRITE:
        for start in range(0, V, BLOCK):
            column = start + tl.arange(0, BLOCK)
            s = tl.load(s_row + column, mask=column < V, other=0.0).to(tl.float32) * inverse_temperature
            t = tl.load(t_row + column, mask=column < V, other=0.0).to(tl.float32) * inverse_temperature
            grad = (tl.exp2((s - s_lse) * _LOG2E) - tl.exp2((t - t_lse) * _LOG2E)) * inverse_temperature
            grad = tl.where(valid, grad, 0.0).to(student.dtype.element_ty)
            tl.store(s_row + column, grad, mask=column < V)


def kl_rows(logits: Tensor, teacher: Tensor, valid: Tensor, temperature: float, write: bool) -> Tensor:
    """KL(teacher || student) of each valid row (fp32), and with `write` its gradient in place of the student's logits."""
    n, V = logits.shape
    loss = logits.new_empty(n, dtype=torch.float32)
    _kl_kernel[(n,)](
        logits, teacher, valid.to(torch.int8), loss, logits.stride(0), teacher.stride(0), V, 1.0 / temperature,
        WRITE=write, BLOCK=min(4096, power_of_2(V)), num_warps=8,
    )  # fmt: skip
    return loss
