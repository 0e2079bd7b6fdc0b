"""The Triton sweeps, run by Triton's interpreter, equal the fp64 recurrence: outputs, states and every gradient."""

import pytest

pytest.importorskip("triton")

from tests.kernels import interpreter  # noqa: F401  isort: skip

import torch

from flame.kernels import tiles
from flame.kernels.linear_attention import linear_attention, triton_chunk_passes, triton_layout, triton_wide
from tests.kernels.test_linear_attention import KINDS, H, K, V, inputs, run

TOLERANCE = 1e-5


def check_triton(call, tolerance=TOLERANCE, dtype=torch.float32, **options):
    expected = run(call, "reference", **options)
    keep = ("initial_state", "bonus", "head_decay")
    rounded = {name: x.detach().to(torch.float32 if name in keep else dtype) for name, x in call.items()}
    if dtype != torch.float32:
        expected = run({name: x.double().requires_grad_() for name, x in rounded.items()}, "reference", **options)
    got = run({name: x.requires_grad_() for name, x in rounded.items()}, "triton", **options)
    for name, want in expected.items():
        assert torch.isfinite(got[name]).all(), name
        error = (got[name].double() - want).norm() / want.norm().clamp(min=1e-3)
        assert error < tolerance, (name, error.item())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 65])
def test_sweeps_equal_recurrence(kind, tokens):
    check_triton(inputs(kind, tokens, batch=1))


# Not "head": its gradient is one number, a sum over time that is small beside its terms, so bf16 leaves it no fixed
# relative accuracy. The kernel is that of "scalar".
@pytest.mark.parametrize("kind", ["none", "scalar", "key", "value", "bonus"])
def test_bf16_sweeps_stay_within_rounding_of_the_recurrence(kind):
    check_triton(inputs(kind, 65, batch=1, heads=(1, 1, 1)), tolerance=6e-3, dtype=torch.bfloat16)


@pytest.mark.parametrize("kind", KINDS[2:])
def test_strong_decay_takes_the_exact_way(kind):
    # A decay per token is summed over 64 tokens, to some 700 in base 2, where fp32 resolves 6e-5 of an exponent.
    tolerance = 3e-5 if kind == "scalar" else TOLERANCE
    check_triton(inputs(kind, 70, strong=True, batch=1), tolerance)


@pytest.mark.parametrize("kind", ["scalar", "key", "bonus"])
@pytest.mark.parametrize("heads", [(2, 1, 1), (1, 1, 2)])
def test_grouped_heads_share_their_tensors(kind, heads):
    check_triton(inputs(kind, 20, heads=heads, batch=1))


@pytest.mark.parametrize("kind", ["none", "scalar", "bonus", "value"])
def test_packed_documents_never_meet(kind):
    bounds = [0, 1, 1, 66, 80]
    call = inputs(kind, bounds[-1], batch=1, state=False, heads=(1, 1, 1))
    call["initial_state"] = torch.randn(len(bounds) - 1, 1, K, V, dtype=torch.float64).requires_grad_()
    check_triton(call, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))


@pytest.fixture
def short_segments(monkeypatch):
    """Cut time every 64 tokens, so that a short sequence takes the way of a long one."""
    monkeypatch.setattr(triton_layout, "ANCHOR", 64)
    monkeypatch.setattr(tiles, "multiprocessors", lambda device: 20)
    triton_layout.dense_items.cache_clear()
    yield
    triton_layout.dense_items.cache_clear()


@pytest.mark.parametrize("kind", KINDS)
def test_cut_sequences_equal_whole_ones(kind, short_segments):
    call = inputs(kind, 200, batch=1, heads=(1, 1, 1))
    items = triton_layout.dense_items(1, 200, 1, 20)
    assert items.cut and items.count > 1
    check_triton(call)


@pytest.mark.parametrize("kind", ["head", "key"])
def test_cut_packed_documents_equal_whole_ones(kind, short_segments):
    bounds = torch.tensor([0, 3, 190, 190, 200], dtype=torch.int32)
    call = inputs(kind, 200, batch=1, heads=(1, 1, 1), state=False)
    call["initial_state"] = torch.randn(4, 1, K, V, dtype=torch.float64).requires_grad_()
    assert triton_layout.packed_items(200, 1, bounds, 20).cut
    check_triton(call, cu_seqlens=bounds)


@pytest.mark.parametrize("kind, size", [("none", "V"), ("value", "V"), ("bonus", "V"), ("scalar", "K"), ("bonus", "K")])
def test_wide_heads_equal_narrow_ones(kind, size, monkeypatch):
    split = {"K": K, "V": V}[size]
    monkeypatch.setattr(triton_wide, "parts", lambda width: split if width == split else 1)
    heads = (2, 1, 1) if size == "V" else (1, 1, 2)
    check_triton(inputs(kind, 6, batch=1, heads=heads))


def test_parts_are_the_fewest_that_fit():
    assert [triton_wide.parts(width) for width in (64, 100, 153, 256, 300, 512, 4096)] == [1, 1, 3, 1, 3, 2, 16]


def test_strided_views_are_read_in_place():
    packed = torch.randn(1, 40, H, 2 * K + V, dtype=torch.float64)
    q, k, v = packed.split([K, K, V], -1)
    expected, _ = linear_attention(q, k, v, backend="reference")
    q, k, v = packed.float().split([K, K, V], -1)
    got, _ = linear_attention(q, k, v, backend="triton")
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["none", "bonus"])
def test_operator_obeys_the_rules_of_torch_library(kind):
    call = {name: x.detach().float().requires_grad_() for name, x in inputs(kind, 5, heads=(1, 1, 1), batch=1).items()}
    decay, bonus = call.get("key_decay"), call.get("bonus")
    arguments = (call["q"], call["k"], call["v"], decay, bonus, call["initial_state"], None)
    import flame.kernels.linear_attention.triton_op  # noqa: F401  (registers the operators)

    torch.library.opcheck(
        torch.ops.flame.linear_attention_forward.default,
        (*arguments, "key" if kind == "bonus" else "none", 0.5, True),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_compiles_without_a_graph_break():
    call = {name: x.detach().float().requires_grad_() for name, x in inputs("scalar", 33, batch=1).items()}
    function = torch.compile(
        lambda **c: linear_attention(**c, backend="triton")[0], fullgraph=True, backend="aot_eager"
    )
    o = function(**call)
    (dq,) = torch.autograd.grad(o.square().sum(), call["q"])
    expected, _ = linear_attention(**call, backend="chunked")
    (want,) = torch.autograd.grad(expected.square().sum(), call["q"])
    torch.testing.assert_close(dq, want, atol=1e-4, rtol=1e-4)


CHUNKS = {"FORM": triton_chunk_passes.CHUNKS, "num_warps": 4, "num_stages": 1}
ROLES = {"FORM": triton_chunk_passes.ROLES, "BV": 16, "num_warps": 4, "num_stages": 2}


@pytest.fixture(params=[CHUNKS, ROLES], ids=["chunks", "roles"])
def parallel(request, monkeypatch):
    """Gradients in parallel over chunks, in fp32 too, which leaves no rounding."""
    monkeypatch.setattr(triton_chunk_passes, "choose", lambda *arguments: request.param)
    monkeypatch.setattr(
        tiles, "multiprocessors", lambda device: 1
    )  # few programs suffice: one walks all heads of a group


@pytest.mark.parametrize("kind", ["none", "head", "scalar"])
@pytest.mark.parametrize("heads", [(2, 2, 2), (2, 1, 2)])
@pytest.mark.parametrize("strong", [False, True])
def test_gradients_of_chunks_equal_the_recurrence(kind, heads, strong, parallel):
    check_triton(inputs(kind, 130, strong=strong, batch=1, heads=heads), tolerance=3e-5)


@pytest.mark.parametrize("kind", ["none", "head", "scalar"])
@pytest.mark.parametrize("heads", [(1, 1, 4), (2, 2, 4)])
def test_gradients_of_chunks_sum_over_heads_that_share_keys(kind, heads, parallel):
    check_triton(inputs(kind, 130, batch=1, heads=heads))


@pytest.mark.parametrize("heads", [(2, 2, 2), (1, 1, 2)])
def test_gradients_of_chunks_end_at_the_last_key_channel(heads, parallel):
    g = torch.Generator().manual_seed(0)  # 48 channels in a block of 64, and not one of 16 is half full
    q, k, v = (torch.randn(1, 130, n, d, generator=g).double() for n, d in zip(heads, (48, 48, 16)))
    call = {"q": q, "k": k, "v": v, "scalar_decay": -torch.rand(1, 130, 2, generator=g).double() / 10}
    check_triton({name: x.requires_grad_() for name, x in call.items()})


def test_gradients_of_chunks_sum_over_tiles_of_values(parallel):
    g = torch.Generator().manual_seed(0)
    q, k, v, decay = (torch.randn(1, 70, *size, generator=g).double() for size in ((1, 5), (1, 5), (2, 37), (2,)))
    call = {"q": q, "k": k, "v": v, "scalar_decay": -decay.abs()}
    check_triton({name: x.requires_grad_() for name, x in call.items()})


def test_packed_documents_never_meet_in_gradients_of_chunks(parallel):
    bounds = [0, 1, 1, 66, 80]
    call = inputs("scalar", bounds[-1], batch=1, state=False, heads=(1, 1, 2))
    call["initial_state"] = torch.randn(len(bounds) - 1, 2, K, V, dtype=torch.float64).requires_grad_()
    check_triton(call, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))


def test_gradients_of_chunks_in_bf16_leave_the_decay_no_error_that_piles_up():
    check_triton(inputs("scalar", 200, batch=1, heads=(1, 1, 1)), tolerance=6e-3, dtype=torch.bfloat16)


def test_the_table_chooses_who_makes_the_gradients():
    key = triton_layout.backward_key("scalar", K, V, True, torch.bfloat16)
    call = inputs("scalar", 70, batch=1, heads=(1, 1, 2))
    with tiles.using("linear_attention", {key: ROLES}):
        check_triton(call, tolerance=6e-3, dtype=torch.bfloat16)
