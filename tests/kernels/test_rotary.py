"""rotary: half-split pairs, relative positions, restarts."""

import pytest
import torch

from flame.errors import FlameError
from flame.kernels.rotary import rotary


def test_pairs_are_half_split():
    x = torch.zeros(1, 1, 1, 8)
    x[..., 1] = 1.0  # pairs with channel 5
    angle = torch.tensor(3.0 * 100.0 ** (-2 / 8))
    want = torch.zeros(8)
    want[1], want[5] = angle.cos(), angle.sin()
    torch.testing.assert_close(rotary(x, torch.tensor([3]), 100.0)[0, 0, 0], want)


def test_scores_depend_on_distance_only():
    q, k = torch.randn(1, 1, 1, 16, dtype=torch.float64), torch.randn(1, 1, 1, 16, dtype=torch.float64)

    def score(i: int, j: int) -> torch.Tensor:
        return (rotary(q, torch.tensor([i])) * rotary(k, torch.tensor([j]))).sum()

    torch.testing.assert_close(score(7, 3), score(104, 100))


def test_positions_per_row_equal_rows_alone():
    x = torch.randn(2, 3, 2, 8)
    positions = torch.tensor([[0, 1, 2], [5, 0, 1]])
    for b in range(2):
        torch.testing.assert_close(rotary(x, positions)[b : b + 1], rotary(x[b : b + 1], positions[b]))


def test_tables_are_rounded_to_the_activation_dtype():
    x = torch.randn(1, 4, 1, 8, dtype=torch.bfloat16)
    positions = torch.arange(4) + 1000
    angles = positions.float()[:, None] * (1.0 / 10000.0 ** (torch.arange(0, 8, 2).float() / 8))
    cos, sin = angles.cos().bfloat16().float()[:, None], angles.sin().bfloat16().float()[:, None]
    a, b = x.float().chunk(2, -1)
    want = torch.cat([a * cos - b * sin, a * sin + b * cos], -1).bfloat16()
    torch.testing.assert_close(rotary(x, positions), want, rtol=0, atol=0)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernel_equals_definition(rows, dtype):
    packed = torch.randn(2, 5, 3, 20).to(dtype).requires_grad_()
    x = packed[..., :12]  # strided: part of a wider projection
    positions = torch.randint(0, 4000, (2, 5) if rows else (5,))
    want, got = (rotary(x, positions, 500.0, backend=b) for b in ("reference", "triton"))
    torch.testing.assert_close(got, want)
    w = torch.randn_like(want)
    expected = torch.autograd.grad((want * w).sum(), packed, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad((got * w).sum(), packed)[0], expected)


def test_misfit_is_named():
    with pytest.raises(FlameError, match="positions"):
        rotary(torch.randn(2, 3, 2, 8), torch.arange(4))
    with pytest.raises(FlameError, match="even"):
        rotary(torch.randn(2, 3, 2, 7), torch.arange(3))
