"""Native sparse attention and MoBA in torch, against masks written out from the papers."""

import pytest
import torch

from flame.errors import FlameError
from flame.kernels.block_attention import block_attention, chunked
from flame.kernels.block_attention.selection import select_blocks
from flame.kernels.moba import moba
from flame.kernels.native_sparse_attention import SparsePattern, native_sparse_attention
from tests.kernels.sparse_oracle import by_document, moba_one_document, nsa_one_document

FORMS = ("reference", "chunked")
NSA = [  # keys, queries, heads, key heads, block, count, window, bounds
    (37, 37, 4, 2, 4, 3, 5, None),
    (50, 50, 4, 1, 8, 4, 1, None),
    (3, 3, 2, 2, 4, 3, 7, None),
    (41, 6, 4, 2, 4, 5, 9, None),
    (33, 1, 2, 1, 8, 1, 4, None),
    (40, 40, 6, 2, 4, 2, 6, None),
    (60, 60, 4, 2, 4, 4, 6, (0, 1, 1, 22, 35, 60)),
]
MOBA = [  # keys, queries, heads, key heads, chunk, topk, bounds
    (37, 37, 2, 2, 4, 3, None),
    (50, 50, 4, 2, 8, 2, None),
    (7, 7, 2, 1, 8, 3, None),
    (45, 5, 2, 2, 4, 4, None),
    (60, 60, 2, 1, 4, 3, (0, 1, 1, 22, 35, 60)),
]


def draw(*shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(sum(shapes[0]))
    return [torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def nsa_inputs(keys, queries, heads, kv_heads, batch=2, dtype=torch.float64):
    shapes = (batch, queries, heads, 8), (batch, keys, kv_heads, 8), (batch, keys, kv_heads, 6)
    return draw(*shapes, (batch, queries, heads, 3), dtype=dtype)


def assert_same_with_gradients(got, expected, got_leaves, expected_leaves, atol=1e-10):
    torch.testing.assert_close(got.to(expected), expected, atol=atol, rtol=atol)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3), dtype=expected.dtype)
    mine = torch.autograd.grad((got * weight).sum(), got_leaves)
    for one, other in zip(mine, torch.autograd.grad((expected * weight).sum(), expected_leaves)):
        torch.testing.assert_close(one.to(other), other, atol=10 * atol, rtol=10 * atol)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("keys, queries, heads, kv_heads, size, count, window, bounds", NSA)
def test_nsa_equals_the_paper_with_gradients(
    monkeypatch, form, keys, queries, heads, kv_heads, size, count, window, bounds
):
    monkeypatch.setattr(chunked, "_ELEMENTS", 1 << 10)  # several bands
    leaves = nsa_inputs(keys, queries, heads, kv_heads, batch=2 if bounds is None else 1)
    bounds = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    got = native_sparse_attention(*leaves, SparsePattern(size, count, window), cu_seqlens=bounds, backend=form)
    expected = by_document(nsa_one_document, bounds, leaves, size, count, window)
    assert_same_with_gradients(got, expected, leaves, leaves)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("keys, queries, heads, kv_heads, size, topk, bounds", MOBA)
def test_moba_equals_the_paper_with_gradients(monkeypatch, form, keys, queries, heads, kv_heads, size, topk, bounds):
    monkeypatch.setattr(chunked, "_ELEMENTS", 1 << 10)
    batch = 2 if bounds is None else 1
    leaves = draw((batch, queries, heads, 8), (batch, keys, kv_heads, 8), (batch, keys, kv_heads, 6))
    bounds = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    got = moba(*leaves, chunk_size=size, topk=topk, cu_seqlens=bounds, backend=form)
    expected = by_document(moba_one_document, bounds, leaves, size, topk)
    assert_same_with_gradients(got, expected, leaves, leaves)


@pytest.mark.parametrize("share", [1, 2])
def test_gathered_blocks_equal_masked_keys(share):
    """A long row with few blocks gathers them; choices shared by a group of heads or one for each head."""
    q, k, v = draw((1, 90, 4, 8), (1, 90, 2, 8), (1, 90, 2, 8))
    scores = torch.rand(1, 90, 4 // share, 23, generator=torch.Generator().manual_seed(0))
    indices = select_blocks(scores, torch.arange(90) // 4, 3, neighbours=False)
    options = {"block_size": 4, "scale": 0.3}
    assert k.shape[1] > 4 * 3 * 4
    got = block_attention(q, k, v, indices, **options, backend="chunked")
    expected = block_attention(q, k, v, indices, **options, backend="reference")
    assert_same_with_gradients(got, expected, (q, k, v), (q, k, v))


def test_equal_scores_choose_the_earlier_blocks():
    current = torch.tensor([0, 5, 6])
    scores = torch.zeros(1, 3, 1, 7)
    scores[..., 4] = 1.0
    nsa = select_blocks(scores, current, 5, neighbours=True)
    assert nsa.squeeze().tolist() == [[0, -1, -1, -1, -1], [0, 1, 2, 4, 5], [0, 1, 4, 5, 6]]
    own = select_blocks(scores, current, 3, neighbours=False)
    assert own.squeeze().tolist() == [[0, -1, -1], [0, 4, 5], [0, 4, 6]]


@pytest.mark.parametrize("count, expected", [(1, [6]), (2, [5, 6]), (3, [0, 5, 6])])
def test_few_blocks_keep_the_current_one_first_and_the_previous_second(count, expected):
    scores = torch.rand(1, 1, 1, 7, generator=torch.Generator().manual_seed(0))
    assert select_blocks(scores, torch.tensor([6]), count, neighbours=True).flatten().tolist() == expected


def test_more_blocks_than_there_are_equal_full_attention():
    q, k, v = draw((1, 40, 2, 8), (1, 40, 2, 8), (1, 40, 2, 8))
    full = moba(q, k, v, chunk_size=4, topk=1)
    torch.testing.assert_close(moba(q, k, v, chunk_size=4, topk=10), full)
    gates = torch.zeros(1, 40, 2, 3, dtype=torch.float64)
    gates[..., 1] = 1
    torch.testing.assert_close(native_sparse_attention(q, k, v, gates, SparsePattern(4, 10, 3)), full)


def test_no_window_leaves_its_gate_without_effect():
    leaves = nsa_inputs(20, 20, 2, 1)
    o = native_sparse_attention(*leaves, SparsePattern(4, 3, 0))
    (gradient,) = torch.autograd.grad(o.sum(), leaves[3])
    assert not gradient[..., 2].any() and gradient[..., 1].any()


def test_what_nsa_keeps_for_the_backward_pass_is_linear_in_time():
    def kept(length):
        leaves = nsa_inputs(length, length, 2, 1, batch=1, dtype=torch.float32)
        total = 0

        def note(x):
            nonlocal total
            total += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            native_sparse_attention(*leaves, SparsePattern(16, 4, 32))
        return total

    assert kept(4096) < 2.1 * kept(2048)


def test_shapes_that_do_not_fit_are_refused():
    q, k, v, gates = nsa_inputs(8, 8, 4, 2)
    with pytest.raises(FlameError, match="gates"):
        native_sparse_attention(q, k, v, gates[..., :2], SparsePattern())
    with pytest.raises(FlameError, match="block_count"):
        native_sparse_attention(q, k, v, gates, SparsePattern(block_count=0))
    with pytest.raises(FlameError, match="dividing H"):
        moba(q[:, :, :3], k, v, chunk_size=4, topk=2)
    with pytest.raises(FlameError, match="chunk_size"):
        moba(q, k, v, chunk_size=0, topk=2)
    with pytest.raises(FlameError, match="indices"):
        block_attention(q, k, v, torch.zeros(2, 8, 3, 1, dtype=torch.int32), block_size=4)
