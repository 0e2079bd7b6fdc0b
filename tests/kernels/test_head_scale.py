"""scale_heads: the product with a factor per token and head, and its gradients, in one pass each."""

import pytest
import torch

from flame.errors import FlameError
from flame.kernels.linear_attention.head_scale import scale_heads


@pytest.mark.parametrize("width", [5, 64])
def test_kernel_equals_torch_on_strided_input(width):
    packed = torch.randn(2, 7, 3 * width + 4, requires_grad=True)
    factor = torch.rand(2, 7, 3, requires_grad=True)
    results = []
    for backend in ("chunked", "triton"):
        y = scale_heads(packed[..., : 3 * width].unflatten(-1, (3, width)), factor, backend=backend)
        results.append((y, *torch.autograd.grad((y * y).sum() + y.sum(), [packed, factor])))
    for want, got in zip(*results):
        torch.testing.assert_close(got, want)


def test_product_is_rounded_once():
    x, factor = torch.randn(1, 4, 2, 8).bfloat16(), torch.rand(1, 4, 2)
    torch.testing.assert_close(scale_heads(x, factor, backend="triton"), (x.float() * factor[..., None]).bfloat16())


def test_misfit_is_named():
    with pytest.raises(FlameError, match="factor"):
        scale_heads(torch.randn(1, 4, 2, 8), torch.rand(1, 4, 3))
