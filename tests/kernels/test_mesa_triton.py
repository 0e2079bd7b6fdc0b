"""The Triton kernels, run by Triton's interpreter, equal the fp64 recurrence: outputs, states and every gradient."""

import pytest

pytest.importorskip("triton")

from tests.kernels import interpreter  # noqa: F401  isort: skip

import torch

from flame.kernels.linear_attention import triton_layout
from flame.kernels.mesa import mesa
from tests.kernels.test_mesa import gradients, make_inputs

FP32 = ("log_decay", "beta", "regularizer", "key_state", "value_state")


def check(inputs, tolerance=2e-5, dtype=torch.float32, **options):
    rounded = {n: x.detach().to(torch.float32 if n in FP32 else dtype) for n, x in inputs.items()}
    exact = {name: x.double().requires_grad_() for name, x in rounded.items()}
    got = gradients({name: x.requires_grad_() for name, x in rounded.items()}, backend="triton", **options)
    names = ["o", "key_state", "value_state", *(f"d{name}" for name in inputs)]
    for name, have, want in zip(names, got, gradients(exact, backend="reference", **options)):
        assert torch.isfinite(have).all(), name
        error = (have.double() - want).norm() / want.norm().clamp(min=1e-3)
        assert error < tolerance, (name, error.item())


@pytest.mark.parametrize("scale_gradient", [True, False])
def test_kernels_equal_recurrence(scale_gradient):
    check(make_inputs(B=2, T=70, H=2, K=16, V=16), scale_gradient=scale_gradient)


def test_normalizing_inside_equals_unit_inputs():
    inputs = make_inputs(B=1, T=70, H=2, K=16, V=16)
    inputs["q"], inputs["k"] = (3 * inputs[name].detach() for name in "qk")
    check({name: x.requires_grad_() for name, x in inputs.items()}, normalize=True)


def test_sizes_that_are_no_powers_of_two_are_masked():
    check(make_inputs(B=1, T=40, H=1, K=24, V=40))


def test_states_pass_through_many_chunks():
    check(make_inputs(B=1, T=10 * 64 + 5, H=1, K=16, V=16))


def test_few_steps_are_taken_as_defined():
    check(make_inputs(B=1, T=40, H=1, K=16, V=16), steps=3)


def test_long_sequences_cut_in_segments_equal_the_recurrence(monkeypatch):
    monkeypatch.setattr(triton_layout, "ANCHOR", 64)
    triton_layout.dense_items.cache_clear()
    check(make_inputs(B=1, T=140, H=1, K=16, V=16))
    triton_layout.dense_items.cache_clear()


def test_operator_has_fakes_and_compiles_whole():
    inputs = {name: x.detach().float().requires_grad_() for name, x in make_inputs(B=1, T=40, H=1, K=16, V=16).items()}

    def loss(*tensors):
        o, final = mesa(
            *tensors[:6], key_state=tensors[6], value_state=tensors[7], output_final_state=True, backend="triton"
        )
        return o.square().sum() + final[0].sum() + final[1].sum()

    tensors = list(inputs.values())
    want = torch.autograd.grad(loss(*tensors), tensors)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for got, expected in zip(torch.autograd.grad(compiled(*tensors), tensors), want):
        torch.testing.assert_close(got, expected)


def test_packed_documents_never_meet():
    lengths = (5, 0, 70, 1)
    inputs = make_inputs(B=1, T=sum(lengths), H=1, K=16, V=16, states=len(lengths))
    check(inputs, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_stays_within_rounding_of_the_recurrence(dtype):
    check(make_inputs(B=1, T=70, H=1, K=32, V=16), tolerance=1e-2, dtype=dtype)
