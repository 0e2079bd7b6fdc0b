"""SwiGLU, the gated unit of the MLP (Shazeer, arXiv 2002.05202)."""

from __future__ import annotations

from torch import Tensor

from flame.errors import FlameError
from flame.kernels.layout import pointwise_backend
from flame.kernels.swiglu import linear, reference

__all__ = ["swiglu", "swiglu_linear"]


def swiglu(gate: Tensor, up: Tensor, *, backend: str | None = None) -> Tensor:
    """`silu(gate) * up`, elementwise.

    gate and up have one shape and dtype, any layout (views of a packed projection are fine); computed in fp32, rounded
    once to gate.dtype. Only the two inputs are saved for backward. backend: 'triton', 'chunked' or 'reference' (the
    latter two are the same form). Raises FlameError when the shapes differ.
    """
    if gate.shape != up.shape:
        raise FlameError(f"swiglu: gate {tuple(gate.shape)} and up {tuple(up.shape)} must have one shape.")
    chosen = pointwise_backend(gate, backend)
    if chosen == "triton":
        from flame.kernels.swiglu import triton_swiglu  # imports triton, which a CPU does not need

        return triton_swiglu.swiglu(gate, up)
    if chosen == "reference":
        return reference.swiglu(gate, up)
    return reference.SwiGLU.apply(gate, up)


def swiglu_linear(gate: Tensor, up: Tensor, weight: Tensor, *, backend: str | None = None) -> Tensor:
    """`swiglu(gate, up) @ weight.T` for gate, up [..., C] and weight [D, C], all of one dtype: [..., D].

    Only the three inputs are saved for backward; it makes the elementwise part again while it reads gate and up for their
    gradients. Raises FlameError when shapes or dtypes do not fit.
    """
    if gate.shape != up.shape or weight.shape[1:] != gate.shape[-1:] or not gate.dtype == up.dtype == weight.dtype:
        shapes = ", ".join(
            f"{name} {tuple(x.shape)} {x.dtype}" for name, x in (("gate", gate), ("up", up), ("weight", weight))
        )
        raise FlameError(f"swiglu_linear: {shapes}; needs gate and up [..., C] and weight [D, C] of one dtype.")
    return linear.swiglu_linear(gate, up, weight, pointwise_backend(gate, backend))
