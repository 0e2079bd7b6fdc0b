"""The tiled kernels, run by Triton's interpreter, equal the fp64 definitions: outputs and every gradient."""

import pytest

pytest.importorskip("triton")

from tests.kernels import interpreter  # noqa: F401  isort: skip

import math

import torch

from flame.kernels.forgetting_attention import forgetting_attention
from flame.kernels.softmax_attention import gates, softmax_attention, triton_gates, triton_pruning
from flame.kernels.softmax_attention.gates import running_sums

TOLERANCE = 1e-5


def inputs(Tq, Tk=None, B=1, H=2, Hk=1, K=16, V=16, strength=0.3):
    g = torch.Generator().manual_seed(Tq)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    Tk = Tk or Tq
    forget = -strength * draw(B, Tk, H).abs()
    return {"q": draw(B, Tq, H, K), "k": draw(B, Tk, Hk, K), "v": draw(B, Tk, Hk, V), "log_forget": forget}


def run(call, backend, dtype, **options):
    leaves = {name: x.to(dtype).requires_grad_() for name, x in call.items()}
    o = forgetting_attention(**leaves, backend=backend, **options)
    weight = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    gradients = torch.autograd.grad((o * weight).sum(), list(leaves.values()))
    return {"o": o.detach(), **dict(zip(call, gradients))}


def check(call, tolerance=TOLERANCE, **options):
    got = run(call, "triton", torch.float32, **options)
    options.pop("prune", None)
    for name, want in run(call, "reference", torch.float64, **options).items():
        assert torch.isfinite(got[name]).all(), name
        error = (got[name].double() - want).norm() / want.norm().clamp(min=1e-3)
        assert error < tolerance, (name, error.item())


@pytest.mark.parametrize("tokens", [2, 31, 64, 100])
def test_tiles_equal_the_definition(tokens):
    check(inputs(tokens))


def test_heads_that_are_no_power_of_two_are_padded():
    check(inputs(70, H=3, Hk=3, K=24, V=20))


def test_batches_and_late_queries():
    check(inputs(40, 90, B=2, H=4, Hk=2))


def test_packed_documents_never_meet():
    bounds = torch.tensor([0, 1, 1, 40, 45, 97, 130], dtype=torch.int32)
    check(inputs(130), cu_seqlens=bounds)
    check(inputs(50, 130), cu_seqlens=bounds)  # the last part of a row whose keys were gathered


def test_strong_forgetting_leaves_out_tiles_within_the_bound():
    call = inputs(200, strength=3.0)
    check(call)
    sums = running_sums(call["log_forget"])
    bound = triton_pruning.threshold(call["q"], call["k"], 0.25, 2.0**-20)
    first, last = (f(sums, bound, 200, 32, 32) for f in (triton_pruning.first_keys, triton_pruning.last_rows))
    assert first[0, 0].tolist()[-1] > 0
    assert last[0, 0].tolist()[0] < 200
    tiles = torch.arange(7) * 32
    needed = first[..., :, None] <= tiles  # [B, H, query tile, key tile]
    assert torch.equal(needed.tril(), (tiles[:, None] < last[..., None, :]).tril())


def test_bounds_of_pruning_equal_their_definition():
    g = torch.Generator().manual_seed(3)
    q, k = (torch.randn(2, tokens, heads, 24, generator=g) for tokens, heads in ((150, 4), (1100, 2)))
    sums = running_sums(-torch.rand(2, 1100, 4, generator=g) * 2)
    bound = triton_pruning.threshold(q, k, -0.2, 2.0**-20)
    reach = q.norm(dim=-1).amax(1) * k.norm(dim=-1).amax(1).repeat_interleave(2, 1) * 0.2
    torch.testing.assert_close(bound, -2 * reach / math.log(2) - 20 - math.log2(1100))
    total = (sums[0].double() + sums[1].double()).unsqueeze(-1)
    firsts, lasts = total[:, :, 950::64], total[:, :, 31::32].transpose(2, 3)
    lasts = torch.cat([lasts, total[:, :, -1:].transpose(2, 3)], 3)  # the last tile of keys is short
    for limit in (bound, torch.full_like(bound, -1.0), torch.full_like(bound, -1e6)):
        seen = firsts - lasts >= limit[..., None, None].double()  # [B, H, tiles of queries, tiles of keys]
        assert torch.equal(triton_pruning.first_keys(sums, limit, 150, 64, 32), (~seen).sum(3).int() * 32)
        assert torch.equal(triton_pruning.last_rows(sums, limit, 150, 64, 32), seen.sum(2).int() * 64)


def test_pruned_weight_is_below_its_share():
    call = {name: x.double() for name, x in inputs(150, strength=2.0).items()}
    exact = forgetting_attention(**call, backend="reference")
    for share in (1e-1, 1e-3):
        o = forgetting_attention(**{name: x.float() for name, x in call.items()}, prune=share, backend="triton")
        assert (o - exact).abs().max() <= 2 * share * call["v"].abs().max() + 1e-5


def test_long_sums_keep_their_differences():
    forget = -torch.rand(1, 20000, 1, generator=torch.Generator().manual_seed(0)) * 50
    high, low = running_sums(forget)[:, 0, 0]
    got = (high[-100:] - high[-50]) + (low[-100:] - low[-50])
    exact = (forget.double().cumsum(1) / torch.log(torch.tensor(2.0, dtype=torch.float64)))[0, :, 0]
    torch.testing.assert_close(got.double(), exact[-100:] - exact[-50], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_windows_and_sinks(packed):
    call = {name: x for name, x in inputs(130, H=2, Hk=1).items() if name != "log_forget"}
    call["sink"] = torch.tensor([-0.5, 3.0])
    bounds = torch.tensor([0, 3, 90, 130], dtype=torch.int32) if packed else None
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaves = {name: x.to(dtype).requires_grad_() for name, x in call.items()}
        o = softmax_attention(**leaves, window=40, cu_seqlens=bounds, backend=backend)
        weight = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        results.append([o, *torch.autograd.grad((o * weight).sum(), list(leaves.values()))])
    for name, got, want in zip(("o", *call), *results):
        assert (got - want).norm() < TOLERANCE * want.norm(), name


def test_operator_obeys_the_rules_of_torch_library():
    call = inputs(20)
    arguments = (call["q"], call["k"], call["v"], call["log_forget"], None, None, 0.25, 0, 0.1)
    torch.library.opcheck(
        torch.ops.flame.tiled_attention.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


def test_compiles_without_a_graph_break():
    call = {name: x.requires_grad_() for name, x in inputs(33).items()}
    function = torch.compile(
        lambda **c: forgetting_attention(**c, backend="triton"), fullgraph=True, backend="aot_eager"
    )
    (dq,) = torch.autograd.grad(function(**call).square().sum(), call["q"])
    (want,) = torch.autograd.grad(forgetting_attention(**call, backend="chunked").square().sum(), call["q"])
    torch.testing.assert_close(dq, want, atol=1e-4, rtol=1e-4)


def test_activation_checkpointing_recomputes_the_same():
    call = {name: x.requires_grad_() for name, x in inputs(33).items()}
    o = torch.utils.checkpoint.checkpoint(lambda: forgetting_attention(**call, backend="triton"), use_reentrant=False)
    got = torch.autograd.grad(o.square().sum(), list(call.values()))
    want = torch.autograd.grad(forgetting_attention(**call, backend="triton").square().sum(), list(call.values()))
    assert all(torch.equal(one, other) for one, other in zip(got, want))


def test_gates_in_one_kernel_equal_those_in_torch():
    g = torch.Generator().manual_seed(3)
    forget = -torch.rand(2, 1500, 3, generator=g)
    torch.testing.assert_close(
        triton_gates.running_sums(forget).double().sum(0), running_sums(forget).double().sum(0), atol=0, rtol=1e-12
    )
    rows, columns = torch.randn(2, 3, 1100, generator=g), torch.randn(2, 3, 1500, generator=g)
    total = -columns
    total[..., 400:] += rows
    torch.testing.assert_close(triton_gates.gate_gradient(rows, columns), gates.gate_gradient(total, None))
