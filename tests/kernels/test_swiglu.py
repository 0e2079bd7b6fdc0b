"""swiglu: value and gradients of silu(gate) * up; only the inputs are kept."""

import pytest
import torch
import torch.nn.functional as F

from flame.errors import FlameError
from flame.kernels.swiglu import swiglu, swiglu_linear

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


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_product_after_it_has_the_same_values_and_gradients_and_keeps_only_inputs(backend):
    gate, up = torch.randn(3, 5, 32, requires_grad=True).chunk(2, -1)  # strided views
    weight = torch.randn(8, 16, requires_grad=True)
    want = F.silu(gate) * up @ weight.t()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        got = swiglu_linear(gate, up, weight, backend=backend)
    torch.testing.assert_close(got, want)
    assert sorted(saved) == sorted([gate.shape, up.shape, weight.shape])
    cotangent = torch.randn_like(want)
    expected = torch.autograd.grad(want, (gate, up, weight), cotangent)
    torch.testing.assert_close(torch.autograd.grad(got, (gate, up, weight), cotangent), expected)


def test_the_product_after_it_obeys_the_rules_of_registered_ops():
    gate, up = (torch.randn(2, 3, 8, requires_grad=True) for _ in range(2))
    torch.library.opcheck(torch.ops.flame.swiglu_linear, (gate, up, torch.randn(4, 8, requires_grad=True), "reference"))


def test_a_weight_that_does_not_fit_is_named():
    with pytest.raises(FlameError, match="swiglu_linear"):
        swiglu_linear(torch.randn(2, 3), torch.randn(2, 3), torch.randn(4, 5))
