"""Running sums of long, narrow rows, computed in blocks."""

import pytest
import torch

from flame.kernels.sequence import running_sum


@pytest.mark.parametrize("length", [1, 7, 8, 9, 50, 64])
def test_blocks_equal_one_scan_forward_and_backward(length):
    x = torch.randn(2, length, 3, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, length, 3, 2, dtype=torch.float64)
    expected, found = x.cumsum(1), running_sum(x, block=8)
    torch.testing.assert_close(found, expected)
    (other,) = torch.autograd.grad((expected * weight).sum(), x)
    (own,) = torch.autograd.grad((found * weight).sum(), x)
    torch.testing.assert_close(own, other)
