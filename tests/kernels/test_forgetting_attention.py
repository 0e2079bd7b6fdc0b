import pytest
import torch

from flame.errors import FlameError
from flame.kernels.forgetting_attention import forgetting_attention


def inputs(tokens, queries=None, heads=4, kv_heads=2, dtype=torch.float64, strength=1.0):
    generator = torch.Generator().manual_seed(tokens)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)  # noqa: E731
    q = draw(2, queries or tokens, heads, 8)
    forget = -strength * draw(2, tokens, heads).abs()
    return [x.requires_grad_() for x in (q, draw(2, tokens, kv_heads, 8), draw(2, tokens, kv_heads, 6), forget)]


@pytest.mark.parametrize("tokens, queries", [(1, 1), (63, 63), (300, 300), (600, 600), (40, 1), (300, 5)])
def test_bands_equal_the_definition(tokens, queries):
    arguments = inputs(tokens, queries, dtype=torch.float32)
    o = forgetting_attention(*arguments, backend="chunked")
    exact = [x.detach().double().requires_grad_() for x in arguments]
    expected = forgetting_attention(*exact, backend="reference")
    torch.testing.assert_close(o.double(), expected, atol=1e-5, rtol=1e-5)
    weight = torch.randn(o.shape, generator=torch.Generator().manual_seed(0))
    got = torch.autograd.grad((o * weight).sum(), arguments)
    wanted = torch.autograd.grad((expected * weight).sum(), exact)
    for actual, reference in zip(got, wanted):
        torch.testing.assert_close(actual.double(), reference, atol=2e-5, rtol=1e-4)


def test_packed_documents_equal_separate_ones():
    q, k, v, forget = (x[:1] for x in inputs(50))
    bounds = torch.tensor([0, 7, 8, 50], dtype=torch.int32)
    packed = forgetting_attention(q, k, v, forget, cu_seqlens=bounds)
    pairs = zip(*(x.split([7, 1, 42], 1) for x in (q, k, v, forget)))
    torch.testing.assert_close(packed, torch.cat([forgetting_attention(*document) for document in pairs], 1))


def test_one_compiled_graph_serves_every_packing():
    call = [x[:1].detach() for x in inputs(20)]
    function = torch.compile(
        lambda bounds: forgetting_attention(*call, cu_seqlens=bounds), fullgraph=True, backend="aot_eager"
    )
    for bounds in ([0, 7, 7, 8, 20], [0, 1, 2, 3, 20]):
        bounds = torch.tensor(bounds, dtype=torch.int32)
        expected = forgetting_attention(*call, cu_seqlens=bounds)
        torch.testing.assert_close(function(bounds), expected, atol=5e-6, rtol=1e-5)  # sums of gates are fp32


def test_strong_forgetting_over_a_long_row_keeps_the_near_biases():
    q, k, v, forget = inputs(4000, 1, dtype=torch.float32, strength=5.0)
    expected = forgetting_attention(*(x.detach().double() for x in (q, k, v, forget)), backend="reference")
    got = forgetting_attention(q, k, v, forget)
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)


def test_gates_of_the_wrong_shape_are_refused():
    q, k, v, forget = inputs(8)
    with pytest.raises(FlameError, match="log_forget"):
        forgetting_attention(q, k, v, forget[:, :4])
