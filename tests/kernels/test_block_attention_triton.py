"""The block attention kernels under Triton's interpreter, against the definition in fp64."""

import pytest

pytest.importorskip("triton")

import torch

from tests.kernels import interpreter  # noqa: F401  isort: skip

from flame.errors import FlameError
from flame.kernels.block_attention import block_attention, triton_op
from flame.kernels.block_attention.selection import select_blocks

CASES = {  # tokens, heads (query, choosing, key), K, V, block, slots, bounds
    "group": (70, (4, 2, 2), 16, 16, 16, 2, None),
    "each head chooses": (70, (4, 4, 2), 16, 32, 32, 2, None),
    "block of several tiles": (200, (2, 2, 1), 16, 16, 100, 2, None),
    "odd sizes": (45, (3, 1, 1), 24, 20, 10, 3, None),
    "packed": (90, (2, 1, 1), 16, 16, 16, 2, (0, 1, 1, 40, 73, 90)),
}


def problem(tokens, heads, K, V, size, slots, bounds, dtype=torch.float32):
    generator = torch.Generator().manual_seed(tokens)
    batch = 2 if bounds is None else 1
    shapes = [(batch, tokens, h, D) for h, D in zip((heads[0], heads[2], heads[2]), (K, K, V))]
    leaves = [torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    scores = torch.rand(batch, tokens, heads[1], -(-tokens // size), generator=generator)
    bounds = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    place = torch.arange(tokens)
    if bounds is not None:
        place = torch.cat([torch.arange(n) for n in bounds.diff().tolist()])
    return leaves, select_blocks(scores, place // size, slots, neighbours=False), bounds


def outputs_and_gradients(leaves, indices, bounds, size, backend):
    o = block_attention(*leaves, indices, block_size=size, cu_seqlens=bounds, backend=backend)
    weight = torch.randn(o.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(o.dtype)
    return o, *torch.autograd.grad((o * weight).sum(), leaves)


@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_the_definition_with_gradients(name):
    size = CASES[name][4]
    leaves, indices, bounds = problem(*CASES[name])
    got = outputs_and_gradients(leaves, indices, bounds, size, "triton")
    exact = [x.detach().double().requires_grad_() for x in leaves]
    for one, other in zip(got, outputs_and_gradients(exact, indices, bounds, size, "reference")):
        torch.testing.assert_close(one.double(), other, atol=2e-5, rtol=2e-5)


def test_bands_and_pieces_of_a_bucket_add_up(monkeypatch):
    """Queries in two bands, buckets in several pieces: what long rows do."""
    from flame.kernels.block_attention import triton_backward

    monkeypatch.setattr(triton_op, "SCRATCH", 1)
    monkeypatch.setattr(triton_backward, "ROWS_PER_PIECE", 64)
    leaves, indices, bounds = problem(300, (2, 1, 1), 16, 16, 64, 3, None)
    got = outputs_and_gradients(leaves, indices, bounds, 64, "triton")
    exact = [x.detach().double().requires_grad_() for x in leaves]
    for one, other in zip(got, outputs_and_gradients(exact, indices, bounds, 64, "reference")):
        torch.testing.assert_close(one.double(), other, atol=2e-5, rtol=2e-5)


def test_flop_counters_see_both_passes():
    from torch.utils.flop_counter import FlopCounterMode

    leaves, indices, _ = problem(32, (2, 1, 1), 16, 16, 16, 2, None)
    with FlopCounterMode(display=False) as counter:
        block_attention(*leaves, indices, block_size=16, backend="triton").sum().backward()
    forward = 2 * 2 * 32 * 2 * (16 + 16) * 2 * 16
    assert counter.get_total_flops() == forward + 5 * forward // 2


def test_the_kernels_are_the_default_only_where_their_gradients_were_checked():
    from flame.kernels.block_attention import fast_or_plain

    def x(tokens, width, dtype=torch.float32):
        return torch.empty(1, tokens, 2, width, dtype=dtype)

    for q, k in ((x(4, 256), x(4, 256)), (x(1, 64), x(4, 64)), (x(4, 64, torch.float64), x(4, 64, torch.float64))):
        assert fast_or_plain(q, k, k, None) == "chunked"
    assert fast_or_plain(x(4, 256), x(4, 256), x(4, 256), "triton") == "triton"
    with pytest.raises(FlameError, match="Tq = Tk"):
        fast_or_plain(x(1, 64), x(4, 64), x(4, 64), "triton")
