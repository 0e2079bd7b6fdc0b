"""The Triton kernels, run by Triton's interpreter, equal all pairs in fp64: outputs and every gradient."""

import pytest

pytest.importorskip("triton")

from tests.kernels import interpreter  # noqa: F401  isort: skip

import torch

from flame.kernels import tiles
from flame.kernels.polynomial_attention import polynomial_attention, triton_op

SCORES = {"based": (1.0, 1.0, 0.5), "rebased": (0.0, 0.0, 1.0)}
SMALL = {"BT": 16, "BS": 16, "num_warps": 4, "num_stages": 1}


def check(kind, T=150, B=1, H=1, d=16, V=16, dtype=torch.float32, tolerance=2e-5, block=64, bounds=None, eps=0.1):
    g = torch.Generator().manual_seed(0)
    shapes = [(B, T, H, d), (B, T, H, d), (B, T, H, V)]
    rounded = [torch.randn(*shape, generator=g).to(dtype) for shape in shapes]
    cotangent = torch.randn(B, T, H, V, generator=g).to(dtype)
    # A larger eps keeps ReBased's first rows, which divide by one squared score, well conditioned.
    options = {"coefficients": SCORES[kind], "eps": eps}
    if bounds is not None:
        options["cu_seqlens"] = torch.tensor(bounds).int()
        cotangent[:, bounds[-1] :] = 0
    facts = {"K": d, "V": V, "dtype": dtype}
    forced = {tiles.key("block", **facts): {"ROWS": block}}
    forced |= {tiles.key(name, **facts): SMALL for name in ("forward", "dq", "dkv")}
    results = []
    for backend, wide in (("triton", dtype), ("reference", torch.float64)):
        leaves = [x.to(wide).requires_grad_() for x in rounded]
        with tiles.using("polynomial_attention", forced):
            o, _ = polynomial_attention(*leaves, **options, backend=backend)
            if bounds is not None:
                o = o[:, : bounds[-1]]
            gradients = torch.autograd.grad((o * cotangent[:, : o.shape[1]].to(wide)).sum(), leaves)
        results.append([o, *gradients])
    for name, have, want in zip(("o", "dq", "dk", "dv"), *results):
        assert torch.isfinite(have).all(), name
        error = (have.double() - want).norm() / want.norm()
        assert error < tolerance, (name, error.item())


@pytest.mark.parametrize("kind", SCORES)
def test_blocks_equal_all_pairs(kind):
    check(kind, B=2, T=100, H=2)


@pytest.mark.parametrize("kind", SCORES)
def test_one_block_needs_no_state(kind):
    check(kind, T=50)


def test_packed_documents_never_meet():
    check("based", T=148, bounds=[0, 5, 5, 75, 76, 140])


def test_odd_sizes_are_masked():
    check("based", d=12, V=24)


def test_fewer_channels_than_a_part_of_features():
    check("rebased", d=4, V=16)


def test_bf16_stays_within_rounding():
    check("based", dtype=torch.bfloat16, tolerance=1e-2)


def test_gradients_of_small_denominators_survive_bf16():
    check("rebased", dtype=torch.bfloat16, tolerance=1e-2, eps=1e-5)


@pytest.mark.parametrize("T", [1, 63, 64, 65])
def test_lengths_around_a_block_agree(T):
    check("based", T=T)


def test_operator_has_fakes_and_compiles_whole():
    leaves = [torch.randn(1, 40, 1, n, requires_grad=True) for n in (16, 16, 16)]

    def loss(*tensors):
        return polynomial_attention(*tensors, backend="triton")[0].square().sum()

    want = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for got, expected in zip(torch.autograd.grad(compiled(*leaves), leaves), want):
        torch.testing.assert_close(got, expected)


def test_sizes_beyond_the_kernels_take_the_torch_form():
    assert not triton_op.supported(torch.zeros(1, 1, 1, 32), torch.zeros(1, 1, 1, 64))
    q = torch.randn(1, 8, 1, 32)
    torch.testing.assert_close(
        polynomial_attention(q, q, q, backend="triton")[0], polynomial_attention(q, q, q, backend="chunked")[0]
    )
