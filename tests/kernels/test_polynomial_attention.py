"""Quadratic-score attention: the chunked form equals all pairs, documents stay apart, a state continues a prefix."""

import pytest
import torch

from flame.errors import FlameError
from flame.kernels.polynomial_attention import feature_count, polynomial_attention

BASED, REBASED = (1.0, 1.0, 0.5), (0.0, 0.0, 1.0)


def inputs(length, batch=2):
    torch.manual_seed(0)
    q, k = (torch.randn(batch, length, 2, 4, dtype=torch.float64).requires_grad_() for _ in range(2))
    return q, k, torch.randn(batch, length, 2, 3, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("coefficients", [BASED, REBASED])
@pytest.mark.parametrize("length", [1, 64, 150])
def test_chunked_equals_all_pairs(coefficients, length):
    leaves = inputs(length)
    outputs = [polynomial_attention(*leaves, coefficients=coefficients, backend=b)[0] for b in ("chunked", "reference")]
    weight = torch.randn_like(outputs[0])
    grads = [torch.autograd.grad((o * weight).sum(), leaves) for o in outputs]
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("bounds", [[0, 150], [0, 1, 64, 65, 150], [0, 20, 20, 130, 150, 150]])
def test_packed_equals_separate(bounds):
    leaves = inputs(150, batch=1)
    packed, _ = polynomial_attention(*leaves, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    parts = [
        polynomial_attention(*(x[:, begin:end] for x in leaves), backend="reference")[0]
        for begin, end in zip(bounds, bounds[1:])
        if end > begin
    ]
    torch.testing.assert_close(packed, torch.cat(parts, dim=1))


def test_a_state_continues_a_prefix():
    leaves = inputs(150)
    whole, _ = polynomial_attention(*leaves, coefficients=REBASED)
    _, state = polynomial_attention(*(x[:, :70] for x in leaves), coefficients=REBASED, output_final_state=True)
    assert state.shape == (2, 2, feature_count(4, REBASED), 4)
    rest, _ = polynomial_attention(*(x[:, 70:] for x in leaves), coefficients=REBASED, initial_state=state)
    torch.testing.assert_close(rest, whole[:, 70:])


def test_small_scores_do_not_cancel():
    """Early tokens with nearly orthogonal queries: the feature map alone would lose their squared scores to rounding."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 8, 1, 16), torch.randn(1, 8, 1, 16)
    k = k - (k * q).sum(-1, keepdim=True) / q.square().sum(-1, keepdim=True) * q * 0.9999
    v = torch.randn(1, 8, 1, 5)
    got, _ = polynomial_attention(q, k, v, coefficients=REBASED, eps=1e-10)
    expected, _ = polynomial_attention(q.double(), k.double(), v.double(), coefficients=REBASED, eps=1e-10)
    torch.testing.assert_close(got.double(), expected, atol=1e-2, rtol=1e-2)


def test_packed_documents_with_a_state_are_refused():
    q, k, v = inputs(8, batch=1)
    with pytest.raises(FlameError, match="cu_seqlens"):
        polynomial_attention(q, k, v, cu_seqlens=torch.tensor([0, 8], dtype=torch.int32), output_final_state=True)
