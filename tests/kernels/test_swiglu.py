"""swiglu: value and gradients of silu(gate) * up; only the inputs are kept."""

import pytest
import torch
import torch.nn.functional as F

from flame.errors import FlameError
from flame.kernels.swiglu import swiglu

BACKENDS = ["chunked", "reference", "triton"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_value_and_gradients_equal_torch(backend):
    packed = torch.randn(3, 5, 16, requires_grad=True)
    gate, up = packed.chunk(2, -1)  # strided views
    want = F.silu(gate) * up
    got = swiglu(gate, up, backend=backend)
    torch.testing.assert_close(got, want)
    w = torch.randn_like(want)
    expected = torch.autograd.grad((want * w).sum(), packed, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad((got * w).sum(), packed)[0], expected)


def test_gradients_are_exact():
    gate, up = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda g, u: swiglu(g, u), (gate, up))


def test_only_the_inputs_are_saved():
    gate, up = (torch.randn(64, 64, requires_grad=True) for _ in range(2))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        swiglu(gate, up)
    assert set(saved) == {gate.data_ptr(), up.data_ptr()}


def test_misfit_is_named():
    with pytest.raises(FlameError, match="one shape"):
        swiglu(torch.randn(2, 3), torch.randn(2, 4))
