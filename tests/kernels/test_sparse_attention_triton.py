"""NSA's and MoBA's kernels under Triton's interpreter, against the definition in fp64."""

import pytest

pytest.importorskip("triton")

import torch

from tests.kernels import interpreter  # noqa: F401  isort: skip

from flame.kernels.block_attention import triton_select
from flame.kernels.block_attention.selection import select_blocks
from flame.kernels.block_attention.triton_common import Sizes
from flame.kernels.block_attention.triton_layout import make_blocks
from flame.kernels.moba import moba
from flame.kernels.native_sparse_attention import SparsePattern, native_sparse_attention, triton_compressed

PACKED = (0, 1, 1, 40, 73, 130)
NSA = {  # tokens, heads, key heads, K, V, pattern, bounds
    "group": (100, 4, 2, 16, 16, SparsePattern(16, 4, 20), None),
    "packed": (130, 2, 1, 16, 16, SparsePattern(8, 4, 20), PACKED),
    "odd sizes, no window": (70, 3, 1, 24, 20, SparsePattern(10, 2, 0), None),
    "no complete block": (10, 2, 2, 16, 16, SparsePattern(16, 3, 5), None),
}
MOBA = {  # tokens, heads, key heads, K, chunk, topk, bounds
    "heads": (100, 2, 2, 16, 16, 3, None),
    "grouped": (100, 4, 2, 16, 32, 2, None),
    "packed": (130, 2, 1, 16, 16, 3, PACKED),
}


def leaves_of(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(shapes[0]))
    return [torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def nsa_leaves(*shapes):
    """Those of q, k, v and gates, the gates from 0 to 1 and some of them 0."""
    *leaves, gates = leaves_of(*shapes)
    return [*leaves, (gates.detach().sigmoid() - 0.2).relu().requires_grad_()]


def assert_kernels_equal_definition(leaves, run, atol=3e-5):
    exact = [x.detach().double().requires_grad_() for x in leaves]
    results = []
    for inputs, backend in ((leaves, "triton"), (exact, "reference")):
        o = run(inputs, backend)
        weight = torch.randn(o.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(o.dtype)
        results.append((o, *torch.autograd.grad((o * weight).sum(), inputs)))
    for one, other in zip(*results):
        torch.testing.assert_close(one.double(), other, atol=atol, rtol=atol)


@pytest.mark.parametrize("name", NSA)
def test_nsa_kernels_equal_the_definition_with_gradients(name):
    tokens, H, Hk, K, V, pattern, bounds = NSA[name]
    batch = 2 if bounds is None else 1
    leaves = nsa_leaves((batch, tokens, H, K), (batch, tokens, Hk, K), (batch, tokens, Hk, V), (batch, tokens, H, 3))
    bounds = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    longest = None if bounds is None else int(bounds.diff().max())

    def run(inputs, backend):
        return native_sparse_attention(*inputs, pattern, cu_seqlens=bounds, max_seqlen=longest, backend=backend)

    assert_kernels_equal_definition(leaves, run)


@pytest.mark.parametrize("name", MOBA)
def test_moba_kernels_equal_the_definition_with_gradients(name):
    tokens, H, Hk, K, chunk, topk, bounds = MOBA[name]
    batch = 2 if bounds is None else 1
    leaves = leaves_of((batch, tokens, H, K), (batch, tokens, Hk, K), (batch, tokens, Hk, K))
    bounds = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    longest = None if bounds is None else int(bounds.diff().max())

    def run(inputs, backend):
        return moba(*inputs, chunk_size=chunk, topk=topk, cu_seqlens=bounds, max_seqlen=longest, backend=backend)

    assert_kernels_equal_definition(leaves, run)


@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_selection_equals_the_sorted_one_with_ties_and_negative_scores(neighbours, count):
    """Scores from a few values, so that most are equal; given in place of the kernel's own."""
    blocks = make_blocks(torch.empty(1, 120), 8, None)
    scores = torch.randint(-2, 3, (120, 2, 15), generator=torch.Generator().manual_seed(count)).float()
    expected = select_blocks(scores[None], torch.arange(120) // 8, count, neighbours=neighbours)
    out = torch.full((120, 2, count), -1, dtype=torch.int32)
    triton_select._select_kernel[(4,)](
        scores, blocks.origin, out, 240, 0, 8, 15, Hs=2, S=count, NEIGHBOURS=neighbours, BR=64, BC=16
    )
    assert out.tolist() == expected[0].tolist()


def test_bands_of_scores_do_not_change_the_choice(monkeypatch):
    q, k = (x.detach() for x in leaves_of((1, 600, 2, 16), (1, 600, 2, 16)))
    blocks, sizes = make_blocks(q, 32, None), Sizes(2, 2, 2, 16, 16, 0.25)
    means = triton_select.packed_means(k, blocks)
    whole = triton_select.choose_blocks(q, means, None, blocks, sizes, 3, False)
    monkeypatch.setattr(triton_select, "SCRATCH", 1)
    assert torch.equal(triton_select.choose_blocks(q, means, None, blocks, sizes, 3, False), whole)


def test_splits_of_the_queries_add_up_in_the_gradients_of_the_means(monkeypatch):
    monkeypatch.setattr(triton_compressed, "split_span", lambda *_: 64)
    leaves = nsa_leaves((2, 150, 2, 16), (2, 150, 1, 16), (2, 150, 1, 16), (2, 150, 2, 3))
    assert_kernels_equal_definition(
        leaves, lambda inputs, backend: native_sparse_attention(*inputs, SparsePattern(8, 3, 5), backend=backend)
    )


def test_the_operators_compile_without_breaks():
    leaves = nsa_leaves((1, 40, 2, 16), (1, 40, 1, 16), (1, 40, 1, 16), (1, 40, 2, 3))

    def run(q, k, v, gates):
        nsa = native_sparse_attention(q, k, v, gates, SparsePattern(8, 3, 0), backend="triton")
        return nsa + moba(q, k, v, chunk_size=16, topk=2, backend="triton")

    expected = run(*leaves)
    got = torch.compile(run, backend="aot_eager", fullgraph=True)(*leaves)
    torch.testing.assert_close(got, expected)
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(0))
    pairs = zip(
        torch.autograd.grad((got * weight).sum(), leaves), torch.autograd.grad((expected * weight).sum(), leaves)
    )
    for one, other in pairs:
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_activation_checkpointing_recomputes_the_same():
    leaves = nsa_leaves((1, 40, 2, 16), (1, 40, 1, 16), (1, 40, 1, 16), (1, 40, 2, 3))

    def run():
        return native_sparse_attention(*leaves, SparsePattern(8, 3, 5), backend="triton")

    o = torch.utils.checkpoint.checkpoint(run, use_reentrant=False)
    got = torch.autograd.grad(o.square().sum(), leaves)
    want = torch.autograd.grad(run().square().sum(), leaves)
    assert all(torch.equal(one, other) for one, other in zip(got, want))
