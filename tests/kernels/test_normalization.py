"""Norms: agree with torch's own and with each other's definitions, gradients included."""

import pytest
import torch
import torch.nn.functional as F

from flame.errors import FlameError
from flame.kernels.normalization import gated_rms_norm, group_norm, l2_norm, layer_norm, rms_norm


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_rms_and_layer_norm_equal_torch():
    x, w, b = torch.randn(3, 5, 12), torch.randn(12), torch.randn(12)
    torch.testing.assert_close(rms_norm(x, w, 1e-5), F.rms_norm(x, (12,), w, 1e-5))
    torch.testing.assert_close(layer_norm(x, w, b, 1e-5), F.layer_norm(x, (12,), w, b, 1e-5))


def test_group_norm_equals_torch_over_flat_positions():
    x, w, b = torch.randn(3, 5, 12), torch.randn(12), torch.randn(12)
    want = F.group_norm(x.flatten(0, 1), 4, w, b, 1e-3).view_as(x)
    torch.testing.assert_close(group_norm(x, 4, w, b, 1e-3), want)


def test_grouped_rms_is_rms_of_every_group():
    x, w = torch.randn(2, 3, 12), torch.randn(12)
    want = rms_norm(x.view(2, 3, 4, 3)).flatten(-2) * w
    torch.testing.assert_close(rms_norm(x, w, groups=4), want)


def test_residual_sum_is_normalised_unrounded_and_stored_rounded():
    x, r = torch.randn(4, 64, dtype=torch.bfloat16), torch.randn(4, 64, dtype=torch.bfloat16)
    y, total = rms_norm(x, None, 1e-6, r)
    exact = x.float() + r.float()
    assert total.dtype == torch.bfloat16
    torch.testing.assert_close(total, exact.bfloat16(), rtol=0, atol=0)
    torch.testing.assert_close(y, rms_norm(exact).bfloat16(), rtol=0, atol=0)
    assert not torch.equal(y, rms_norm(total))  # which normalises the rounded sum


@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_gate_after_and_before(activation):
    x, g, w = torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.randn(8)
    opened = F.silu(g) if activation == "silu" else g.sigmoid()
    torch.testing.assert_close(gated_rms_norm(x, g, w, 1e-5, activation), rms_norm(x, w, 1e-5) * opened)
    torch.testing.assert_close(
        gated_rms_norm(x, g, w, 1e-5, activation, gate_first=True), rms_norm(x * opened, w, 1e-5)
    )


def test_l2_norm_adds_eps_to_the_sum_of_squares():
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(l2_norm(x, 0.5), x / (x.square().sum(-1, keepdim=True) + 0.5).sqrt())
    assert l2_norm(torch.zeros(1, 8)).isfinite().all()


NORMS = {
    "rms": (lambda t, b: rms_norm(t["x"], t["weight"], 1e-5, backend=b), "x weight"),
    "rms_plain": (lambda t, b: rms_norm(t["x"], backend=b), "x"),
    "rms_groups": (lambda t, b: rms_norm(t["x"], t["weight"], 1e-5, groups=3, backend=b), "x weight"),
    "rms_residual": (lambda t, b: rms_norm(t["x"], t["weight"], 1e-5, t["beside"], backend=b), "x weight beside"),
    "rms_of_sum": (lambda t, b: rms_norm(t["x"], t["weight"], 1e-5, t["beside"], backend=b)[0], "x weight beside"),
    "layer": (lambda t, b: layer_norm(t["x"], t["weight"], t["bias"], 1e-5, backend=b), "x weight bias"),
    "layer_residual": (
        lambda t, b: layer_norm(t["x"], t["weight"], t["bias"], 1e-5, t["beside"], backend=b),
        "x weight bias beside",
    ),
    "group": (lambda t, b: group_norm(t["x"], 4, t["weight"], t["bias"], 1e-3, backend=b), "x weight bias"),
    "l2": (lambda t, b: l2_norm(t["x"], backend=b), "x"),
    **{
        f"gated_{act}_{first}_{groups}": (
            lambda t, b, a=act, f=first, g=groups: gated_rms_norm(t["x"], t["beside"], t["weight"], 1e-5, a, f, g, b),
            "x beside weight",
        )
        for act, first, groups in (("silu", False, 1), ("silu", True, 3), ("sigmoid", False, 3), ("sigmoid", True, 1))
    },
}


@pytest.mark.parametrize(
    ("name", "dtype"), [(n, torch.float32) for n in NORMS] + [(n, torch.float16) for n in ("rms_residual", "layer")]
)
def test_kernel_equals_definition(name, dtype):
    norm, names = NORMS[name]
    tensors = {"x": torch.randn(3, 7, 24)[..., :12], "beside": torch.randn(3, 7, 12)}
    tensors |= {"weight": torch.randn(12), "bias": torch.randn(12)}

    def run(backend: str):
        leaves = {n: tensors[n].detach().to(dtype).requires_grad_() for n in names.split()}
        out = norm(leaves, backend)
        out = out if isinstance(out, tuple) else (out,)
        loss = sum((o.float() * torch.linspace(-1, 1, o.numel()).cos().view_as(o)).sum() for o in out)
        return [*out, *torch.autograd.grad(loss, list(leaves.values()))]

    for got, want in zip(run("triton"), run("reference")):
        tolerance = {"rtol": 1e-5, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 3e-3, "atol": 3e-3}
        torch.testing.assert_close(got, want, **tolerance)


def test_weight_gradient_over_many_programs_is_repeatable():
    x, w = torch.randn(300, 16), torch.randn(16, requires_grad=True)
    grads = [torch.autograd.grad(rms_norm(x, w, backend="triton").sum(), w)[0] for _ in range(2)]
    torch.testing.assert_close(*grads, rtol=0, atol=0)
    torch.testing.assert_close(grads[0], torch.autograd.grad(rms_norm(x, w, backend="reference").sum(), w)[0])


def test_kernel_compiles_without_graph_breaks():
    x, r, w = (t.requires_grad_() for t in (torch.randn(3, 7, 12), torch.randn(3, 7, 12), torch.randn(12)))

    def both(x, r, w):
        y, total = rms_norm(x, w, 1e-5, r, backend="triton")
        return gated_rms_norm(y, total, w, backend="triton").square().sum()

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(both(x, r, w), (x, r, w))
    for a, b in zip(torch.autograd.grad(compiled(x, r, w), (x, r, w)), expected):
        torch.testing.assert_close(a, b)


def test_misfit_is_named():
    x = torch.randn(2, 8)
    with pytest.raises(FlameError, match="groups"):
        group_norm(x, 3)
    with pytest.raises(FlameError, match="weight"):
        rms_norm(x, torch.ones(4))
    with pytest.raises(FlameError, match="activation"):
        gated_rms_norm(x, x, activation="gelu")
