"""softmax_attention: torch's kernels, cut to documents and windows, equal the definition."""

import pytest
import torch

from flame.errors import FlameError
from flame.kernels.softmax_attention import chunked, softmax_attention

PACKED = torch.tensor([0, 1, 4, 4, 20], dtype=torch.int32)


def make(B=1, Tq=20, Tk=20, H=4, Hk=4, Hv=4, D=8, Dv=8):
    g = torch.Generator().manual_seed(0)
    shapes = (B, Tq, H, D), (B, Tk, Hk, D), (B, Tk, Hv, Dv)
    return [torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes]


def agree(inputs, **options):
    want = softmax_attention(*inputs, backend="reference", **options)
    got = softmax_attention(*inputs, backend="chunked", **options)
    torch.testing.assert_close(got, want)
    w = torch.randn_like(want)
    expected = torch.autograd.grad((want * w).sum(), inputs)
    for a, b in zip(torch.autograd.grad((got * w).sum(), inputs), expected):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("window", [None, 1, 5, 64])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (2, 2), (1, 4)])
def test_backends_agree(window, packed, heads, monkeypatch):
    monkeypatch.setattr(chunked, "_BAND", 3)
    agree(make(Hk=heads[0], Hv=heads[1]), window=window, cu_seqlens=PACKED if packed else None)


def test_value_dimension_may_differ():
    agree(make(B=2, D=8, Dv=12))
    agree(make(B=2, D=12, Dv=4), scale=0.3)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("packed", [False, True])
def test_sinks_take_weight_and_carry_no_value(window, packed, monkeypatch):
    monkeypatch.setattr(chunked, "_BAND", 3)
    q, k, v = make(Hk=2, Hv=2)
    sink = torch.tensor([-1.0, 0.0, 2.0, 30.0], dtype=torch.float64, requires_grad=True)
    options = {"window": window, "cu_seqlens": PACKED if packed else None}
    agree([q, k, v], sink=sink, **options)
    want, got = (softmax_attention(q, k, v, sink=sink, backend=name, **options) for name in ("reference", "chunked"))
    for a, b in zip(*(torch.autograd.grad(o.square().sum(), (q, sink)) for o in (got, want))):
        torch.testing.assert_close(a, b)
    assert got[:, :, 3].abs().max() < 1e-6 < got[:, :, 0].abs().max()


@pytest.mark.parametrize("window", [None, 5])
def test_one_compiled_graph_serves_every_packing(window):
    q, k, v = (x.detach() for x in make())
    function = torch.compile(
        lambda bounds: softmax_attention(q, k, v, window=window, cu_seqlens=bounds), fullgraph=True, backend="aot_eager"
    )
    for bounds in (PACKED, torch.tensor([0, 8, 9, 15, 20], dtype=torch.int32)):
        want = softmax_attention(q, k, v, window=window, cu_seqlens=bounds, backend="reference")
        torch.testing.assert_close(function(bounds), want)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("queries", [1, 3])
def test_last_query_meets_last_key(window, queries):
    q, k, v = make(B=2)
    whole = softmax_attention(q, k, v, window=window)
    agree((q[:, -queries:], k, v), window=window)
    torch.testing.assert_close(softmax_attention(q[:, -queries:], k, v, window=window), whole[:, -queries:])


def test_misfit_is_named():
    q, k, v = make()
    with pytest.raises(FlameError, match="divide"):
        softmax_attention(q, k[:, :, :3], v)
    with pytest.raises(FlameError, match="window"):
        softmax_attention(q, k, v, window=0)
    with pytest.raises(FlameError, match="at least as many"):
        softmax_attention(q, k[:, :5], v[:, :5])


def test_library_plain_form_equals_definition():
    inputs = make(B=2, Hk=2, Hv=2)
    torch.testing.assert_close(softmax_attention(*inputs, backend="library"), softmax_attention(*inputs))
    q, k, v = inputs
    last = softmax_attention(q[:, -1:], k, v, backend="library")
    torch.testing.assert_close(last, softmax_attention(*inputs)[:, -1:])


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("packed", [False, True])
def test_library_hands_varlen_the_same_problem(window, packed, monkeypatch):
    """varlen_attn needs a GPU; a stand-in of the same signature proves the boundaries, windows, heads and padding."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")

    def stand_in(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
        left, right = window_size
        assert right == 0
        assert q.shape[2] == k.shape[2] == v.shape[2]
        parts = []
        for i in range(len(cu_q) - 1):
            mine, theirs = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
            assert mine.stop - mine.start <= max_q
            assert theirs.stop - theirs.start <= max_k
            w = None if left < 0 else left + 1
            parts.append(chunked.softmax_attention(q[None, mine], k[None, theirs], v[None, theirs], scale, w, None)[0])
        return torch.cat(parts)

    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    cu = PACKED if packed else None
    q, k, v = make(B=1 if packed else 2, Hk=2, Hv=2, D=8, Dv=5)
    queries = q if packed else q[:, -3:]  # a chunk on a longer cache
    got = softmax_attention(queries, k, v, window=window, cu_seqlens=cu, backend="library")
    want = softmax_attention(queries, k, v, window=window, cu_seqlens=cu, backend="reference")
    torch.testing.assert_close(got, want)
