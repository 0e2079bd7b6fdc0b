"""path_attention: the block form equals the key-by-key definition; caches, packing, grouped heads and gates."""

import pytest
import torch
import torch.nn.functional as F

from flame.errors import FlameError
from flame.kernels.path_attention import chunked, path_attention, transport_keys, tree
from flame.kernels.path_attention.triton_op import path_tree


def inputs(tokens, batch=2, heads=4, kv_heads=2, K=8, V=6, gate=True, dtype=torch.float64):
    generator = torch.Generator().manual_seed(tokens)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)  # noqa: E731
    call = {
        "q": draw(batch, tokens, heads, K),
        "k": draw(batch, tokens, kv_heads, K),
        "v": draw(batch, tokens, kv_heads, V),
        "w": F.normalize(draw(batch, tokens, kv_heads, K), dim=-1),
        "beta": 2 * draw(batch, tokens, kv_heads).sigmoid(),
    }
    if gate:
        call["log_forget"] = -draw(batch, tokens, heads).abs()
    return {name: x.requires_grad_() for name, x in call.items()}


def outputs(call, backend, **options):
    o = path_attention(**call, backend=backend, **options)
    weight = torch.randn(o.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(o)
    gradients = torch.autograd.grad((o * weight).sum(), list(call.values()))
    return {"o": o, **dict(zip(call, gradients))}


def check(call, **options):
    got, expected = outputs(call, "chunked", **options), outputs(call, "reference", **options)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, atol=1e-10, rtol=1e-8, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("tokens", [1, 17, 64, 150])
def test_blocks_equal_the_definition(tokens, gate, monkeypatch):
    monkeypatch.setattr(chunked, "BLOCK", 16)
    monkeypatch.setattr(chunked, "BAND", 3)
    check(inputs(tokens, gate=gate))


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("tokens", [5, 33, 150])
@pytest.mark.parametrize("packed", [False, True])
def test_tree_of_blocks_equals_the_definition(tokens, gate, packed, monkeypatch):
    monkeypatch.setattr(tree, "BASE", 4)
    monkeypatch.setattr(tree, "FAN", 3)
    call = inputs(tokens, gate=gate, batch=1 if packed else 2)
    bounds = torch.tensor([0, 2, 2, tokens // 2, tokens], dtype=torch.int32) if packed else None
    expected = outputs(call, "reference", cu_seqlens=bounds)
    o, *_ = path_tree(*call.values(), *([] if gate else [None]), bounds, 8**-0.5, False)
    weight = torch.randn(o.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = {"o": o, **dict(zip(call, torch.autograd.grad((o * weight).sum(), list(call.values()))))}
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, atol=1e-8, rtol=1e-7, msg=lambda m, name=name: f"{name}: {m}")


def test_packed_documents_never_meet():
    check(inputs(60, batch=1), cu_seqlens=torch.tensor([0, 7, 7, 8, 60], dtype=torch.int32), scale=0.7)


@pytest.mark.parametrize("new", [1, 5, 40])
def test_cached_keys_need_only_their_transported_form(new, monkeypatch):
    monkeypatch.setattr(chunked, "BLOCK", 16)
    call = {name: x.detach() for name, x in inputs(90).items()}
    past = 90 - new
    whole = path_attention(**call)
    moved = transport_keys(call["k"][:, :past], call["w"][:, :past], call["beta"][:, :past])
    late = {name: call[name][:, past:] for name in ("q", "w", "beta")}
    step = {**call, **late, "k": torch.cat([moved, call["k"][:, past:]], 1)}
    torch.testing.assert_close(path_attention(**step), whole[:, past:])
    torch.testing.assert_close(path_attention(**step, backend="reference"), whole[:, past:])
    torch.testing.assert_close(
        transport_keys(step["k"], step["w"], step["beta"]), transport_keys(call["k"], call["w"], call["beta"])
    )


def test_beta_zero_is_plain_attention():
    call = {name: x.detach() for name, x in inputs(40, gate=False, kv_heads=4, V=8).items()}
    call["beta"] = torch.zeros_like(call["beta"])
    q, k, v = (call[name].transpose(1, 2) for name in "qkv")
    torch.testing.assert_close(
        path_attention(**call), F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    )


def test_correlated_keys_with_full_reflection_stay_accurate_in_fp32():
    call = {name: x.detach() for name, x in inputs(300, batch=1, heads=1, kv_heads=1).items()}
    call["w"] = F.normalize(call["w"][:, :1] + 0.05 * call["w"], dim=-1)
    call["beta"] = torch.full_like(call["beta"], 1.999)
    got = path_attention(**{name: x.float() for name, x in call.items()})
    torch.testing.assert_close(got.double(), path_attention(**call, backend="reference"), atol=2e-5, rtol=1e-4)


def test_misfit_is_named():
    call = inputs(8)
    with pytest.raises(FlameError, match="beta"):
        path_attention(**{**call, "beta": call["beta"][:, :4]})
    with pytest.raises(FlameError, match="log_forget"):
        path_attention(**{**call, "log_forget": call["log_forget"][..., :2]})
    with pytest.raises(FlameError, match="cu_seqlens"):
        path_attention(**call, cu_seqlens=torch.tensor([0, 8]))


def test_one_compiled_graph_serves_every_packing():
    call = {name: x.detach() for name, x in inputs(20, batch=1).items()}
    function = torch.compile(
        lambda bounds: path_attention(**call, cu_seqlens=bounds), fullgraph=True, backend="aot_eager"
    )
    for bounds in ([0, 7, 7, 8, 20], [0, 1, 2, 3, 20]):
        bounds = torch.tensor(bounds, dtype=torch.int32)
        torch.testing.assert_close(function(bounds), path_attention(**call, cu_seqlens=bounds))
