"""Products with a factor per token and head, alone and as the values of linear attention."""

import pytest
import torch

from flame.errors import FlameError
from flame.kernels.linear_attention import linear_attention
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


@pytest.mark.parametrize("backend", ["reference", "chunked", "triton"])
@pytest.mark.parametrize("heads", [2, 4])
def test_values_scaled_inside_equal_values_scaled_before(backend, heads):
    q, k, v = (torch.randn(1, 70, n, 16) for n in (2, 2, heads))
    factor, decay, state = torch.rand(1, 70, heads), -torch.rand(1, 70, 4), torch.randn(2, 4, 16, 16)
    bounds = torch.tensor([0, 33, 70], dtype=torch.int32)
    results = []
    for inside in (True, False):
        leaves = [x.clone().requires_grad_() for x in (q, k, v, factor, decay, state)]
        *qk, values, by, log, opening = leaves
        options = {"scalar_decay": log, "initial_state": opening, "output_final_state": True, "cu_seqlens": bounds}
        values, options = (values, {**options, "value_scale": by}) if inside else (values * by[..., None], options)
        o, final = linear_attention(*qk, values, **options, backend=backend)
        results.append((o, final, *torch.autograd.grad((o * o).sum() + final.sum(), leaves)))
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_scaled_values_are_not_kept():
    q, k = torch.randn(2, 1, 64, 1, 16, requires_grad=True).unbind(0)
    v, factor = torch.randn(1, 64, 4, 16, requires_grad=True), torch.rand(1, 64, 4, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        linear_attention(q, k, v, value_scale=factor, backend="triton")
    assert {x.data_ptr() for x in (q, k, v, factor)} >= {p for p in saved if p}


def test_scaled_values_obey_the_rules_of_registered_ops():
    from flame.kernels.linear_attention import triton_scaled  # noqa: F401  registers the op

    q, k = (torch.randn(1, 5, 1, 16, requires_grad=True) for _ in range(2))
    v, factor, decay = torch.randn(1, 5, 2, 16, requires_grad=True), torch.rand(1, 5, 2), -torch.rand(1, 5, 2)
    torch.library.opcheck(
        torch.ops.flame.scaled_linear_attention,
        (q, k, v, factor, decay, None, None, "scalar", 1.0, False),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )
