"""Maps of one input computed together equal the same maps apart, values and gradients."""

import pytest
import torch

from flame.kernels.projections import projections

WIDTHS = [(96, 128), (96, 6, 128, 10, 64), (6, 10), (5,)]


def problem(widths):
    generator = torch.Generator().manual_seed(0)
    make = {"generator": generator, "dtype": torch.float64, "requires_grad": True}
    return torch.randn(2, 5, 32, **make), [torch.randn(width, 32, **make) for width in widths]


@pytest.mark.parametrize("widths", WIDTHS)
def test_values_and_gradients_are_those_of_separate_products(widths):
    x, weights = problem(widths)
    together, apart = projections(x, weights), [x @ weight.t() for weight in weights]
    cotangents = [torch.randn_like(y) for y in apart]
    torch.testing.assert_close(together, apart)
    expected = torch.autograd.grad(apart, [x, *weights], cotangents)
    torch.testing.assert_close(torch.autograd.grad(together, [x, *weights], cotangents), expected)


def test_an_output_that_nobody_reads_has_no_gradient():
    x, weights = problem((96, 6, 10))
    projections(x, weights)[1].sum().backward()
    torch.testing.assert_close(x.grad, weights[1].detach().sum(0).expand_as(x))
    assert weights[0].grad.count_nonzero() == 0


def test_the_op_obeys_the_rules_of_registered_ops():
    torch.library.opcheck(torch.ops.flame.projections, problem((96, 6, 10)))
