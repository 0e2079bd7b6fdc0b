"""PaTH's kernels, run by Triton's interpreter, equal plain parts; the tree built of them equals the definition."""

import pytest

pytest.importorskip("triton")

from tests.kernels import interpreter  # noqa: F401  isort: skip

import torch

from flame.kernels.path_attention import levels, path_attention, tree, triton_tree
from flame.kernels.path_attention.parts import PlainParts
from flame.kernels.path_attention.problem import Problem
from flame.kernels.path_attention.triton_parts import TritonParts
from flame.kernels.softmax_attention.gates import gate_gradient
from tests.kernels.test_path_attention import inputs


def close(got, want, tolerance=1e-5):
    for x, y in zip(got, want):
        assert (x is None) == (y is None)
        assert y is None or (x.double() - y).norm() <= tolerance * y.norm()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("queries, keys", [(40, 70), (64, 32)])
def test_part_and_its_gradients_equal_plain_attention(queries, keys, biased):
    g = torch.Generator().manual_seed(0)
    q, k, v, do = (torch.randn(2, n, d, generator=g) for n, d in ((queries, 16), (keys, 16), (keys, 12), (queries, 12)))
    bias = -torch.rand(2, keys, generator=g) if biased else None
    results = []
    for parts, dtype in ((TritonParts(), torch.float32), (PlainParts(), torch.float64)):
        call = [None if x is None else x.to(dtype) for x in (q, k, v, bias)]
        o, lse = parts.attend(*call, 0.3)
        # As if other keys had been seen too: the whole output and normalizer are not those of this part.
        rows = (call[0], o * 0.5, do.to(dtype), lse + 1)
        results.append([o, lse, *parts.differentiate(rows, *call[1:], 0.3)])
    close(*results)


def test_merge_equals_plain_parts():
    g = torch.Generator().manual_seed(0)
    call = [torch.randn(3, 5, 70, 12, generator=g), torch.randn(3, 5, 70, generator=g)]
    call += [torch.randn(15, 70, 12, generator=g).view(3, 5, 70, 12), 9 * torch.randn(3, 5, 70, generator=g)]
    results = []
    for parts, dtype in ((TritonParts(), torch.float32), (PlainParts(), torch.float64)):
        tensors = [x.to(dtype, copy=True) for x in call]
        parts.merge(*tensors)
        results.append(tensors[:2])
    close(*results)


def test_inverse_equals_plain_parts():
    system = 0.3 * torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0))
    close([TritonParts().inverse(system)], [PlainParts().inverse(system.double())])


@pytest.mark.parametrize("gate", [False, True])
def test_tree_of_triton_parts_equals_the_definition(monkeypatch, gate):
    monkeypatch.setattr(tree, "BASE", 16)
    monkeypatch.setattr(tree, "FAN", 3)  # two levels
    monkeypatch.setattr(tree, "SCRATCH", 1)  # a key head at a time
    call = inputs(70, batch=1, heads=4, kv_heads=2, K=16, V=16, gate=gate)
    bounds = torch.tensor([0, 30, 70], dtype=torch.int32) if gate else None
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in call.items()}
        o = path_attention(**leaves, cu_seqlens=bounds, backend=backend)
        results.append([o, *torch.autograd.grad(o.square().sum(), list(leaves.values()))])
    close(*results, tolerance=2e-5)


@pytest.mark.parametrize(
    "tokens, heads, batch, gate, share",
    [(1, 1, 1, False, 1 << 29), (200, 2, 1, False, 1 << 29), (600, 1, 1, True, 1 << 29), (160, 4, 2, True, 1)],
)
def test_walks_equal_the_definition(monkeypatch, tokens, heads, batch, gate, share):
    monkeypatch.setattr(levels, "FAN", 2)
    monkeypatch.setattr(levels, "LAST", 2)
    monkeypatch.setattr(levels, "PART", 128)  # upper units take several programs
    monkeypatch.setattr(triton_tree, "SHARE", share)  # or a key head at a time
    call = inputs(tokens, batch=batch, heads=heads, kv_heads=max(1, heads // 2), K=16, V=12, gate=gate)
    with torch.no_grad():  # so slow that far keys count
        call["beta"].mul_(0.3)
        call.get("log_forget", call["beta"].new_empty(0)).mul_(0.02)
    bounds = torch.tensor([0, tokens // 3, tokens // 3 + 5, tokens]) if batch == 1 and gate else None
    o = path_attention(**call, cu_seqlens=bounds, backend="chunked")
    do = torch.randn(o.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = dict(zip(call, torch.autograd.grad((o * do).sum(), list(call.values()))))
    leaves = {name: x.detach().float() for name, x in call.items()}
    p = Problem(**{"log_forget": None, **leaves}, scale=16**-0.5, cu_seqlens=bounds)
    got, lse, kept = triton_tree.forward(p)
    gradients = triton_tree.backward(p, got, lse, kept, do.float())
    close([got], [o])
    close([gradients[name] for name in "qkvw"] + [gradients["beta"]], [wanted[n] for n in (*"qkvw", "beta")])
    if gate:
        close([gate_gradient(gradients["gates"], bounds) * 16**-0.5], [wanted["log_forget"]])


@pytest.mark.parametrize("rounding", ["tf32", "bf16"])
def test_walks_in_bf16_stay_near_the_definition(monkeypatch, rounding):
    monkeypatch.setattr(levels, "LAST", 2)
    monkeypatch.setattr(triton_tree, "ROUNDING", rounding)
    call = {name: x.detach().float() for name, x in inputs(200, batch=1, heads=2, kv_heads=1, K=32, V=32).items()}
    call |= {name: call[name].bfloat16() for name in "qkv"}
    results = []
    for backend, dtype in (("triton", None), ("chunked", torch.float64)):
        leaves = {name: x.to(dtype or x.dtype).requires_grad_() for name, x in call.items()}
        o = path_attention(**leaves, backend=backend)
        results.append([o, *torch.autograd.grad(o, list(leaves.values()), torch.ones_like(o))])
    close(*results, tolerance=1e-2)


def test_operator_obeys_the_rules_of_torch_library():
    call = [x.detach().float() for x in inputs(20, batch=1, heads=2, kv_heads=1).values()]
    arguments = (*call, None, 0.25, False)
    torch.library.opcheck(
        torch.ops.flame.path_attention.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


def test_compiles_without_a_graph_break(monkeypatch):
    monkeypatch.setattr(tree, "BASE", 16)
    call = {name: x.detach().float().requires_grad_() for name, x in inputs(40, batch=1, heads=1, kv_heads=1).items()}
    bounds = torch.tensor([0, 30, 40], dtype=torch.int32)
    function = torch.compile(
        lambda **c: path_attention(**c, cu_seqlens=bounds, backend="triton"), fullgraph=True, backend="aot_eager"
    )
    (dq,) = torch.autograd.grad(function(**call).square().sum(), call["q"])
    (want,) = torch.autograd.grad(
        path_attention(**call, cu_seqlens=bounds, backend="reference").square().sum(), call["q"]
    )
    torch.testing.assert_close(dq, want, atol=1e-4, rtol=1e-4)


def test_activation_checkpointing_recomputes_the_same(monkeypatch):
    monkeypatch.setattr(tree, "BASE", 16)
    call = {name: x.detach().float().requires_grad_() for name, x in inputs(20, batch=1, heads=1, kv_heads=1).items()}
    o = torch.utils.checkpoint.checkpoint(lambda: path_attention(**call, backend="triton"), use_reentrant=False)
    got = torch.autograd.grad(o.square().sum(), list(call.values()))
    want = torch.autograd.grad(path_attention(**call, backend="triton").square().sum(), list(call.values()))
    assert all(torch.equal(one, other) for one, other in zip(got, want))
