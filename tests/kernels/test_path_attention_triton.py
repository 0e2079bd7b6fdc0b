"""PaTH's parts in Triton, run by its interpreter, equal plain attention; the tree built of them equals the definition."""

import pytest

pytest.importorskip("triton")

from tests.kernels import interpreter  # noqa: F401  isort: skip

import torch

from flame.kernels.path_attention import path_attention, tree
from flame.kernels.path_attention.triton_parts import part_attention
from tests.kernels.test_path_attention import inputs


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("queries, keys", [(40, 70), (64, 32)])
def test_part_and_its_normalizer_equal_plain_attention(queries, keys, biased):
    g = torch.Generator().manual_seed(0)
    call = [torch.randn(2, n, d, generator=g) for n, d in ((queries, 16), (keys, 16), (keys, 12))]
    call.append(-torch.rand(2, keys, generator=g) if biased else None)
    results = []
    for function, dtype in ((part_attention, torch.float32), (tree.plain_part, torch.float64)):
        leaves = [None if x is None else x.to(dtype).requires_grad_() for x in call]
        o, lse = function(*leaves, 0.3)
        loss = (o * torch.arange(12)).sum() + (lse * torch.arange(queries)).sum() / 9
        wanted = [x for x in leaves if x is not None]
        results.append([o, lse, *torch.autograd.grad(loss, wanted)])
    for got, want in zip(*results):
        assert (got - want).norm() < 1e-5 * want.norm()


def test_tree_of_triton_parts_equals_the_definition(monkeypatch):
    monkeypatch.setattr(tree, "BASE", 16)
    call = inputs(70, batch=1, heads=2, kv_heads=1, K=16, V=16)
    bounds = torch.tensor([0, 30, 70], dtype=torch.int32)
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in call.items()}
        o = path_attention(**leaves, cu_seqlens=bounds, backend=backend)
        results.append([o, *torch.autograd.grad(o.square().sum(), list(leaves.values()))])
    for name, got, want in zip(("o", *call), *results):
        assert (got - want).norm() < 2e-5 * want.norm(), name


def test_operator_obeys_the_rules_of_torch_library():
    q, k, v = (torch.randn(2, 20, 16) for _ in range(3))
    arguments = (q, k, v, torch.zeros(2, 20), 0.25)
    torch.library.opcheck(
        torch.ops.flame.part_attention.default, arguments, test_utils=("test_schema", "test_faketensor")
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
