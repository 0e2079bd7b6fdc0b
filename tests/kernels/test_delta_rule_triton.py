"""The Triton kernels, run by Triton's interpreter, equal the fp64 recurrence: outputs, states and every gradient."""

import pytest

pytest.importorskip("triton")

from tests.kernels import interpreter  # noqa: F401  isort: skip

import torch

from flame.kernels.delta_rule import plan, triton_op
from tests.kernels.test_delta_rule import call, gradients, make_inputs

VARIANTS = ["plain", "scalar", "key", "comba", "erase", "grouped", "product", "no_beta", "untied"]


def check(variant, inputs, tolerance=2e-5, dtype=torch.float32, **options):
    rounded = {n: x.detach().to(torch.float32 if n == "initial_state" else dtype) for n, x in inputs.items()}
    exact = {name: x.double().requires_grad_() for name, x in rounded.items()}
    got = gradients(variant, {name: x.requires_grad_() for name, x in rounded.items()}, backend="triton", **options)
    names = ["o", "final", *inputs]
    for name, have, want in zip(names, got, gradients(variant, exact, backend="reference", **options)):
        assert torch.isfinite(have).all(), name
        error = (have.double() - want).norm() / want.norm().clamp(min=1e-3)
        assert error < tolerance, (name, error.item())


@pytest.mark.parametrize("variant", VARIANTS)
def test_sweeps_equal_recurrence(variant):
    check(variant, make_inputs(variant, B=1, T=70, H=1, K=16, V=16))


@pytest.mark.parametrize("variant,K,V", [("scalar", 24, 40), ("scalar", 160, 16), ("key", 24, 40), ("untied", 72, 40)])
def test_sizes_that_are_no_powers_of_two_are_masked(variant, K, V):
    check(variant, make_inputs(variant, B=1, T=70, H=1, K=K, V=V))


def test_rows_of_a_batch_and_strided_views_stay_apart():
    inputs = make_inputs("scalar", B=2, T=67, H=2, K=16, V=16)
    wide = torch.randn(2, 67, 3, 2, 16, dtype=torch.float64)
    inputs["q"], inputs["k"] = (wide[:, :, n].requires_grad_() for n in range(2))
    check("scalar", inputs)


@pytest.mark.parametrize("variant", ["plain", "scalar", "comba", "key", "untied"])
def test_bf16_stays_within_rounding_of_the_recurrence(variant):
    inputs = make_inputs(variant, B=1, T=70, H=1, K=32, V=16)
    check(variant, inputs, tolerance=1e-2, dtype=torch.bfloat16)


def test_strong_decay_neither_overflows_nor_loses_gradients():
    for variant in ("scalar", "comba", "key", "untied"):
        name = "scalar_decay" if variant in ("scalar", "comba") else "key_decay"
        inputs = make_inputs(variant, B=1, T=70, H=1, K=16, V=16)
        strong = torch.where(torch.arange(70) % 3 == 0, -80.0, -1e-3).double()
        inputs[name] = (
            inputs[name].detach() * 1e-3 + strong.view(1, -1, 1, *(1,) * (name == "key_decay"))
        ).requires_grad_()
        check(variant, inputs, tolerance=1e-4)


def test_equal_keys_with_beta_near_two_stay_exact():
    inputs = make_inputs("plain", B=1, T=128, H=1, K=16, V=16)
    base = torch.randn(1, 1, 1, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    inputs["k"] = (base + 0.01 * inputs["k"]).detach().requires_grad_()
    inputs["beta"] = torch.full_like(inputs["beta"], 1.99).requires_grad_()
    check("plain", inputs, tolerance=1e-3)


@pytest.mark.parametrize("variant", ["scalar", "key"])
def test_equal_keys_stay_exact_with_a_weak_decay(variant):
    inputs = make_inputs(variant, B=1, T=128, H=1, K=16, V=16)
    base = torch.randn(1, 1, 1, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    inputs["k"] = (base + 0.01 * inputs["k"]).detach().requires_grad_()
    inputs["beta"] = torch.full_like(inputs["beta"], 1.99).requires_grad_()
    decay = "scalar_decay" if variant == "scalar" else "key_decay"
    inputs[decay] = (inputs[decay] * 1e-3).detach().requires_grad_()
    check(variant, inputs, tolerance=1e-3)


@pytest.mark.parametrize("variant", ["plain", "product", "key", "untied"])
def test_packed_documents_never_meet(variant):
    lengths = (5, 0, 70, 1)
    inputs = make_inputs(variant, B=1, T=sum(lengths) + 4, H=1, K=16, V=16, states=len(lengths))
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    check(variant, inputs, cu_seqlens=bounds)


@pytest.mark.parametrize("variant,packed", [("scalar", False), ("scalar", True), ("key", False), ("untied", True)])
def test_long_sequences_cut_in_segments_equal_the_recurrence(variant, packed, monkeypatch):
    monkeypatch.setattr(plan, "SHORTEST_SEGMENT", 1)
    inputs = make_inputs(variant, B=1, T=290, H=1, K=16, V=16, states=3 if packed else 1)
    options = {"cu_seqlens": torch.tensor([0, 0, 40, 290]).int()} if packed else {}
    assert plan.make_cut(1, 290, 3 if packed else None, 1, 132).cut
    check(variant, inputs, **options)


@pytest.mark.parametrize("variant", ["plain", "comba", "grouped"])
@pytest.mark.parametrize("cut", [False, True])
def test_a_backward_by_parts_of_the_batch_is_the_same(variant, cut, monkeypatch):
    inputs = make_inputs(variant, B=4, T=130, H=1, K=16, V=16)
    if cut:
        monkeypatch.setattr(plan, "SHORTEST_SEGMENT", 1)
    want = gradients(variant, {n: x.detach().float().requires_grad_() for n, x in inputs.items()}, backend="triton")
    asked = []
    monkeypatch.setattr(triton_op, "backward_parts", lambda *sizes: asked.append(sizes) or 2)
    got = gradients(variant, {n: x.detach().float().requires_grad_() for n, x in inputs.items()}, backend="triton")
    assert asked and asked[0][0].cut == cut
    for have, expected in zip(got, want):
        torch.testing.assert_close(have, expected, rtol=1e-6, atol=1e-6)


def test_parts_keep_a_program_for_each_processor_and_packed_rows_are_one():
    device = torch.device("cpu")
    cut = plan.make_cut(8, 4096, None, 32, 132)
    assert plan.backward_parts(cut, 8, 32, False, device) == 2
    assert plan.backward_parts(plan.make_cut(64, 4096, None, 32, 132), 64, 32, False, device) == 16
    assert plan.backward_parts(plan.make_cut(3, 64, None, 2, 132), 3, 2, False, device) == 1
    assert plan.backward_parts(cut, 8, 32, True, device) == 1


def test_states_merge_by_parts_where_keys_are_wide(monkeypatch):
    monkeypatch.setattr(plan, "SHORTEST_SEGMENT", 1)
    check("scalar", make_inputs("scalar", B=1, T=130, H=1, K=136, V=16))


@pytest.mark.parametrize("variant", ["scalar", "key", "untied"])
@pytest.mark.parametrize("tokens", [1, 63, 64, 65])
def test_lengths_around_a_chunk_agree(variant, tokens):
    # One token through the kernels too, though the op would take the recurrence for it.
    check(variant, make_inputs(variant, B=1, T=tokens, H=1, K=16, V=16))


@pytest.mark.parametrize("variant", ["scalar", "untied"])
def test_operator_has_fakes_and_compiles_whole(variant):
    inputs = make_inputs(variant, B=1, T=70, H=1, K=16, V=16, dtype=torch.float32)

    def loss(*tensors):
        o, final = call(variant, dict(zip(inputs, tensors)), backend="triton")
        return o.square().sum() + final.sum()

    tensors = list(inputs.values())
    want = torch.autograd.grad(loss(*tensors), tensors)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for got, expected in zip(torch.autograd.grad(compiled(*tensors), tensors), want):
        torch.testing.assert_close(got, expected)
